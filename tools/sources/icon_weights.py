"""Aligned renderings of one icon (thin, regular, fill, duotone), a member each: 1,248 names of Phosphor (MIT), 1,293 of Material icons.

A quarter of Phosphor's names begin with a word that twelve or more share (arrow, file, number ...): that family is the class; the others have none.
"""

import argparse
import functools
import json
from collections.abc import Iterator

import numpy as np

from pipeline.data.errors import BadSample, DataError
from tools.sources import icons
from tools.sources.base import Pair, Plan, add_set_arguments, shuffled, split_of

WEIGHTS = {
    "phosphor": ("thin", "light", "regular", "bold", "fill", "duotone"),
    "material_icons": ("outlined", "rounded", "sharp", "filled", "two-tone"),
}
DEFAULT = {"phosphor": "thin,regular,fill,duotone", "material_icons": "outlined,rounded,filled,two-tone"}
FAMILIES = (  # first words of twelve Phosphor names or more
    "align",
    "arrow",
    "arrows",
    "battery",
    "caret",
    "chat",
    "cloud",
    "currency",
    "file",
    "folder",
    "hand",
    "number",
    "text",
    "user",
)
LICENCES = {"phosphor": "MIT", "material_icons": "Apache-2.0"}


class Source(icons.Source):
    """Members `thin.png`, `regular.png`, ..., the name and `json` (the family); split by name, so that no rendering of a held-out drawing is trained on."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 64)
        parser.add_argument("--pack", choices=sorted(WEIGHTS), default="phosphor", help="whose drawings (default phosphor)")
        parser.add_argument("--weights", help=f"renderings, separated by commas (default {DEFAULT['phosphor']})")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(argparse.Namespace(**vars(options) | {"min_count": 0, "shared": False, "split": "train"}))
        self.options, self.pack = options, options.pack
        self.weights = tuple((options.weights or DEFAULT[options.pack]).split(","))
        unknown = [weight for weight in self.weights if weight not in WEIGHTS[self.pack]]
        if unknown or len(set(self.weights)) < max(2, len(self.weights)):
            raise DataError(f"--weights {options.weights}: expected two or more different ones of {', '.join(WEIGHTS[self.pack])}")

    def fingerprint(self) -> dict:
        mine = {"source": "icon_weights", "licence": LICENCES[self.pack], "pack": self.pack, "weights": list(self.weights)}
        mine |= {"classes": list(FAMILIES)} if self.pack == "phosphor" else {}
        return super().fingerprint() | mine | {"split": self.options.split}

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        found = drawings(self.pack, self.weights)[self.options.split]
        rows = shuffled(len(found), self.options, seed)
        return Plan(rows, [found[row][0] for row in rows])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        found = drawings(self.pack, self.weights)[self.options.split]
        archive = icons.archive(self.pack)
        for row in rows:
            name, entries = found[row]
            try:
                drawn = {f"{w}.png": icons.draw(archive.read(entry).decode("utf-8"), self.size) for w, entry in zip(self.weights, entries)}
            except ValueError as error:
                yield BadSample("cannot_be_drawn", f"{self.pack}/{name}: {error}")
                continue
            first, *others = drawn.items()
            family = name.split()[0]
            label = {"label": FAMILIES.index(family), "class": family} if self.pack == "phosphor" and family in FAMILIES else {}
            yield Pair(*first, name, dict(others) | {"json": json.dumps(label).encode()})

    def about(self) -> str:
        return (
            f"licence {LICENCES[self.pack]}; {', '.join(self.weights)} of {sum(map(len, drawings(self.pack, self.weights).values()))} names"
        )


@functools.cache
def drawings(pack: str, weights: tuple[str, ...]) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Of each split: (name, entry of every weight) of the drawings that have them all."""
    entries: dict[str, dict[str, str]] = {}
    for icon in icons.icons("train"):
        if icon.pack == pack:
            entries.setdefault(icon.name, {})[icon.entry.split("/")[0]] = icon.entry
    found: dict[str, list] = {"train": [], "test": []}
    for name, by_weight in sorted(entries.items()):
        if all(weight in by_weight for weight in weights):
            found[split_of(name)].append((name, tuple(by_weight[weight] for weight in weights)))
    return found
