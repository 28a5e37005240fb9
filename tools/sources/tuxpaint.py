"""About 800 stamps of Tux Paint (GPL-2): image, caption, human speech in several languages, sound effect, folder as class."""

import argparse
import functools
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError
from tools import espeak
from tools.sources._packages import from_debian
from tools.sources.base import Pair, Plan, add_set_arguments, on_white, shuffled, split_of
from tools.sources.base import Source as Base

PACKAGE, LICENCE = "tuxpaint-stamps-default", "GPL-2"
# the folders with 40 spoken images or more; stamps of other folders have no class
CLASSES = ("animals", "clothes", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")
_INSIDE = "usr/share/tuxpaint/stamps"
_AUDIO = (".ogg", ".wav")
_PIXELS = {"pt": 1.25, "mm": 90 / 25.4, "cm": 90 / 2.54, "in": 90.0}


class Stamp(NamedTuple):
    """One stamp. path: from the folder of all stamps, without extension. captions: by language."""

    path: str
    image: str
    captions: dict[str, str]
    sounds: dict[str, str]  # member -> file


class Source(Base):
    """Members `image.png`, `caption.<language>.txt`, `speech.<language>.ogg`, `effect.ogg`, `json`; what a stamp lacks is not there.

    With --synthetic also `synthetic.<language>.wav`: no recording, the caption read by a program."""

    shard_size = 200

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 64)
        parser.add_argument(
            "--languages", default="fr,es,ru", help="of speech and further captions, separated by commas (default fr,es,ru)"
        )
        parser.add_argument(
            "--synthetic",
            metavar="LANGUAGE",
            help="also the English caption read by espeak-ng's voice of this language: synthetic.LANGUAGE.wav",
        )
        parser.add_argument("--stamps", help=f"folder of stamps (default: Debian's {PACKAGE}, 161 MB, fetched by apt-get into the cache)")

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.spoken_by = espeak.version() if options.synthetic else None
        self.languages = tuple(sorted({language.strip() for language in options.languages.split(",")} - {""}))
        self.folder = str(Path(options.stamps).absolute() if options.stamps else from_debian(PACKAGE, LICENCE, 161, _INSIDE, "--stamps"))
        if not os.path.isdir(self.folder):
            raise DataError(f"--stamps {self.folder}: no such folder; expected one with animals/, food/ and others, such as /{_INSIDE}")

    def fingerprint(self) -> dict:
        files = hashlib.sha256()
        for root, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(root, name)
                files.update(f"{os.path.relpath(path, self.folder)} {os.path.getsize(path)}\n".encode())
        given = {"split": self.options.split, "size": self.options.size, "limit": self.options.limit, "languages": list(self.languages)}
        given |= {"synthetic": f"{self.spoken_by}, {self.options.synthetic}"} if self.spoken_by else {}
        return {"source": "tuxpaint", "licence": LICENCE, "classes": list(CLASSES), "files": files.hexdigest()} | given

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        found = stamps(self.folder, self.languages)[0][self.options.split]
        if not found:
            raise DataError(f"{self.folder}: no stamps there; expected folders such as animals/ with X.png and X.txt")
        rows = shuffled(len(found), self.options, seed)
        return Plan(rows, [found[row].captions["en"] for row in rows])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        found = stamps(self.folder, self.languages)[0][self.options.split]
        for row in rows:
            one = found[row]
            try:
                image = draw(Path(self.folder, one.image), self.options.size)
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                yield BadSample("cannot_be_drawn", f"{one.image}: {error}")
                continue
            name = one.path.split("/")[0]
            label = {"label": CLASSES.index(name), "class": name} if name in CLASSES else {}
            more = {"json": json.dumps(label | {"folder": os.path.dirname(one.path)}).encode()}
            more |= {f"caption.{lang}.txt".lower(): text.encode() for lang, text in one.captions.items() if lang != "en"}
            more |= {member: Path(self.folder, file).read_bytes() for member, file in one.sounds.items()}
            if self.spoken_by:
                language = self.options.synthetic
                more |= {f"synthetic.{language}.wav".lower(): espeak.speak(one.captions["en"], language)}
            yield Pair("image.png", image, one.captions["en"], more)

    def notice(self) -> str:
        return "Stamps of Tux Paint, copyright 2002-2022 Bill Kendrick and contributors (tuxpaint.org). Licence: GPL-2.\n" + (
            f"The members synthetic.* are no recordings: the captions, read by {self.spoken_by}.\n" if self.spoken_by else ""
        )

    def about(self) -> str:
        found, left = stamps(self.folder, self.languages)
        have = Counter(member for one in found[self.options.split] for member in one.sounds)
        return (
            f"licence {LICENCE}; recordings in this split: {', '.join(f'{m} {n}' for m, n in sorted(have.items()))}; "
            f"not taken: {', '.join(f'{cause} {count}' for cause, count in sorted(left.items()))}"
            + (f"; synthetic speech by {self.spoken_by}" if self.spoken_by else "")
        )


@functools.cache
def stamps(folder: str, languages: tuple[str, ...]) -> tuple[dict[str, list[Stamp]], Counter[str]]:
    """The stamps of each split, and how many were not taken, by cause. Variants of a stamp (potato, potato2) are in one split."""
    files = {os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names}
    found, left = {"train": [], "test": []}, Counter()
    for path in sorted({file[:-4] for file in files if file.endswith((".png", ".svg"))}):
        if path.startswith("symbols/alphabets/"):
            left["alphabets"] += 1
        elif re.search(r"_(mirror|flip)$", path):
            left["mirrored"] += 1
        elif f"{path}.txt" not in files:
            left["no_caption"] += 1
        else:
            image = f"{path}.png" if f"{path}.png" in files else f"{path}.svg"
            sounds = {"effect": path} | {f"speech.{lang}": f"{path}_desc" + (f"_{lang}" if lang != "en" else "") for lang in languages}
            members = {f"{m}{ext}".lower(): f"{f}{ext}" for m, f in sounds.items() for ext in _AUDIO if f"{f}{ext}" in files}
            captions = _captions(Path(folder, f"{path}.txt").read_text(encoding="utf-8", errors="replace"), languages)
            found[split_of(re.sub(r"[\d_-]+$", "", os.path.basename(path).lower()))].append(Stamp(path, image, captions, members))
    return found, left


def _captions(text: str, languages: tuple[str, ...]) -> dict[str, str]:
    """Line 1 is English, the others are `fr.utf8=...`."""
    first, *others = text.splitlines() or [""]
    given = dict(line.split(".utf8=", 1) for line in others if ".utf8=" in line)
    return {"en": first.strip()} | {lang: given[lang].strip() for lang in languages if lang != "en" and given.get(lang, "").strip()}


def draw(path: Path, size: int) -> bytes:
    """A stamp as a square PNG on white. Raises ValueError, OSError."""
    if path.suffix == ".png":
        return on_white(Image.open(path), size)
    import resvg_py

    svg = path.read_text(encoding="utf-8", errors="replace")
    if not (tag := re.search(r"<svg\b[^>]*>", svg)):
        raise ValueError("no <svg> in it")
    if box := re.search(r'viewBox="([^"]+)"', tag[0]):
        box = re.split(r"[\s,]+", box[1].strip())
    else:  # resvg refuses pt and mm without a viewBox; these drawings are of a time when an inch had 90 pixels
        sides = [re.search(rf'\s{side}="([\d.]+)([a-z]*)"', tag[0]) for side in ("width", "height")]
        if not all(sides):
            raise ValueError("it has no size")
        box = ["0", "0", *(f"{float(side[1]) * _PIXELS.get(side[2], 1):g}" for side in sides)]
    plain = re.sub(r'\s(?:width|height|viewBox)="[^"]*"', "", tag[0])
    svg = svg.replace(tag[0], f'{plain[:4]} width="{box[2]}" height="{box[3]}" viewBox="{" ".join(box)}"{plain[4:]}', 1)
    drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, skip_system_fonts=True))
    return on_white(Image.open(io.BytesIO(drawn)), size)
