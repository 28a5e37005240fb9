"""About 6,000 clip arts of Open Clip Art Library 0.18 (public domain): titles as their authors left them, a third of them copied from
another file; the file names stayed right."""

import argparse
import functools
import hashlib
import html
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError
from tools.sources._packages import from_debian
from tools.sources.base import Pair, Plan, add_set_arguments, shuffled, split_of
from tools.sources.base import Source as Base
from tools.sources.tuxpaint import draw

PACKAGE, LICENCE = "openclipart-svg", "public domain"
_INSIDE = "usr/share/openclipart/svg"
_STARS = "shapes/stars"  # 1,378 drawings that a program made


class Clip(NamedTuple):
    """One drawing. path: from the folder of all, with extension. name: its file name as words. body: a hash of what is drawn."""

    path: str
    name: str
    title: str
    body: bytes = b""

    @property
    def noisy(self) -> bool | None:
        """Whether title and file name have no word in common; None where one of them has none."""
        title, name = words(self.title), words(self.name)
        if not title or not name:
            return None
        return not any(a == b or (len(a) > 3 and len(b) > 3 and (a in b or b in a)) for a in title for b in name)


class Source(Base):
    """Captions are titles, with the truth about each by the file-name rule; or file names, for evaluation."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 64)
        parser.add_argument(
            "--captions", choices=("title", "name"), default="title", help="the authors' titles (default), or the file names"
        )
        parser.add_argument("--unique", action="store_true", help="one drawing of each title: repetition says nothing then")
        parser.add_argument("--svg", help=f"folder of drawings (default: Debian's {PACKAGE}, 25 MB, fetched by apt-get into the cache)")

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.noise and options.captions == "title":
            raise DataError("--noise: titles have noise of their own; with --captions name captions can be swapped")
        self.folder = str(Path(options.svg).absolute() if options.svg else from_debian(PACKAGE, LICENCE, 25, _INSIDE, "--svg"))
        if not os.path.isdir(self.folder):
            raise DataError(f"--svg {self.folder}: no such folder; expected one with animals/, food/ and others, such as /{_INSIDE}")

    def fingerprint(self) -> dict:
        files = hashlib.sha256("\n".join(f"{one.path} {one.title}" for one in clips(self.folder)[0]).encode()).hexdigest()
        given = {name: getattr(self.options, name) for name in ("split", "size", "limit", "captions", "unique")}
        apart = {"without_train": True} if self.options.split == "test" else {}
        return {"source": "openclipart", "licence": LICENCE, "files": files, "natural": self.options.captions == "title"} | given | apart

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        found = self._found()
        if not found:
            raise DataError(f"{self.folder}: no drawings there; expected folders such as animals/ with SVG files")
        rows = shuffled(len(found), self.options, seed)
        chosen = [found[row] for row in rows]
        if self.options.captions == "name":
            return Plan(rows, [one.name for one in chosen])
        return Plan(rows, [one.name for one in chosen], [one.title for one in chosen], [one.noisy for one in chosen])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        found = self._found()
        for row in rows:
            try:
                yield Pair("png", draw(Path(self.folder, found[row].path), self.options.size), found[row].name)
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                yield BadSample("cannot_be_drawn", f"{found[row].path}: {error}")

    def notice(self) -> str:
        return "Drawings of the Open Clip Art Library 0.18 (openclipart.org), dedicated to the public domain by their authors.\n"

    def about(self) -> str:
        left = ", ".join(f"{cause} {count}" for cause, count in sorted(clips(self.folder)[1].items()))
        told = Counter({True: "noisy", False: "clean", None: "unclear"}[one.noisy] for one in self._found())
        rule = ", ".join(f"{name} {count}" for name, count in sorted(told.items()))
        twins = f", drawings of train under another name {count}" if (count := self._of_split()[1]) else ""
        return f"licence {LICENCE}; titles by the file-name rule: {rule}; not taken: {left}{twins}"

    def _of_split(self) -> tuple[list[Clip], int]:
        """The drawings of the split, which their names decide; and how many of `test` are left out, being in `train` under another name."""
        parts = {split: [] for split in ("train", "test")}
        for one in clips(self.folder)[0]:
            parts[split_of(re.sub(r"[\d\s]+$", "", one.name))].append(one)
        trained = {one.body for one in parts["train"]} if self.options.split == "test" else set()
        found = [one for one in parts[self.options.split] if one.body not in trained]
        return found, len(parts[self.options.split]) - len(found)

    def _found(self) -> list[Clip]:
        found, _ = self._of_split()
        return list({one.title: one for one in found}.values()) if self.options.unique else found


def words(text: str) -> set[str]:
    """Its words of two letters or more, in lower case, without the s of a plural."""
    parts = re.findall(r"[^\W\d_]{2,}", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())
    return {part.removesuffix("s") if len(part) > 3 else part for part in parts}


@functools.cache
def clips(folder: str) -> tuple[list[Clip], Counter[str]]:
    """All drawings that can be used, and how many were not taken, by cause."""
    found, left = [], Counter()
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.relpath(os.path.join(root, name), folder)
            if not name.endswith(".svg"):
                left["no_svg"] += 1
            elif os.path.islink(os.path.join(root, name)):
                left["links"] += 1
            elif path.startswith(_STARS):
                left["procedural_stars"] += 1
            else:
                text = Path(root, name).read_text(encoding="utf-8", errors="replace")
                title = _title(text)
                left["no_title"] += not title
                found += [Clip(path, re.sub(r"[\W_]+", " ", name[:-4]).strip(), title, _body(text))] if title else []
    return found, +left


def _title(text: str) -> str:
    found = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", text, re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", found[1])).split()) if found else ""


def _body(text: str) -> bytes:
    """A hash of the drawing: without metadata, title, description, comments, what editors note for themselves, and white space."""
    text = re.sub(r"<!--.*?-->|<(metadata|title|desc|sodipodi:namedview)\b[^>]*?(/>|>.*?</\1>)", "", text, flags=re.DOTALL)
    text = re.sub(r"""\s(sodipodi|inkscape|xmlns):[\w-]+=("[^"]*"|'[^']*')""", "", text)
    return hashlib.sha256("".join(text.split()).encode()).digest()
