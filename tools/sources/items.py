"""Pairs of related icons, to learn vectors of items: one concept (the first word of both names), one artist and style, two drawings.

Members of a sample: png and txt of the first, related_image.png and related_text.txt of the other. No drawing is in two pairs, so the
first sides of a data set are queries and the other sides a disjoint pool.
"""

import argparse
import functools
from collections.abc import Iterator

import numpy as np

from pipeline.data.errors import BadSample, DataError
from pipeline.hashing import hash_ids
from tools.sources import icons
from tools.sources.base import Pair, Plan, add_set_arguments, shuffled

SIDES = ("", "related_")  # what the names of a side's members begin with; the first side's are the plain ones
_SHARE = {"without_image": "lack the image", "without_text": "lack the text", "short_text": "have the last word of their text alone"}


class Source(icons.Source):
    """A row is a pair; the artists of `--split` are those of the source icons. No item lacks both image and text."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 64)
        parser.add_argument(
            "--per-group", type=int, default=0, help="pairs of one concept, artist and style at most; 1: each has one right answer (0: all)"
        )
        for name, what in _SHARE.items():
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=float, default=0.0, metavar="RATE", help=f"share of the items that {what}"
            )

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(argparse.Namespace(**vars(options) | {"min_count": 0, "shared": False}))
        self.options, self.shares = options, {name: getattr(options, name) for name in _SHARE}
        if options.per_group < 0 or any(not 0 <= share <= 1 for share in self.shares.values()):
            raise DataError(f"--per-group {options.per_group}, {self.shares}: expected 0 or more, and shares from 0 to 1")
        if self.shares["without_image"] + self.shares["without_text"] > 1:
            raise DataError("--without-image and --without-text: together at most 1, an item has one of the two")

    def fingerprint(self) -> dict:
        return super().fingerprint() | {"source": "items", "per_group": self.options.per_group, "seed": self.options.seed} | self.shares

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        if captions and (self.shares["without_text"] or self.shares["short_text"]):
            raise DataError("--noise swaps the texts of the first items; it does not go with --without-text or --short-text")
        found, every = pairs_of(self.split, self.options.per_group), icons.icons(self.split)
        rows = shuffled(len(found), self.options, seed)
        return Plan(rows, [every[found[row][0]].name for row in rows])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        found, every = pairs_of(self.split, self.options.per_group), icons.icons(self.split)
        for row in rows:
            members: dict[str, bytes | None] = {}
            try:
                for side, which in zip(SIDES, found[row]):
                    icon = every[which]
                    image, text = self._variant(which, icon.name)
                    svg = icons.archive(icon.pack).read(icon.entry).decode("utf-8") if image else None
                    members[f"{side}image"] = None if svg is None else icons.draw(svg, self.size)
                    members[f"{side}text"] = None if text is None else text.encode()
            except ValueError as error:
                yield BadSample("cannot_be_drawn", f"{icon.pack}/{icon.entry}: {error}")
                continue
            text = members["text"]
            more = {"related_image.png": members["related_image"], "related_text.txt": members["related_text"]}
            yield Pair("png", members["image"], None if text is None else text.decode(), more)

    def _variant(self, icon: int, name: str) -> tuple[bool, str | None]:
        """Whether this item has its image, and its text, by the seed."""
        draw, other = (hash_ids(self.options.seed, key, icon) / 2**63 for key in (0x6C61636B, 0x73686F7274))
        without_image = self.shares["without_image"]
        without_text = without_image <= draw < without_image + self.shares["without_text"]
        text = name.rpartition(" ")[2] if other < self.shares["short_text"] else name
        return draw >= without_image, None if without_text else text


@functools.cache
def pairs_of(split: str, per_group: int) -> tuple[tuple[int, int], ...]:
    """The pairs of a split as rows of icons.icons(split), in a fixed order: the same whatever is drawn of them afterwards."""
    groups: dict[tuple[str, str, str], dict[str, int]] = {}
    for row, icon in enumerate(icons.icons(split)):
        style = icon.entry.rpartition("/")[0]
        groups.setdefault((icon.pack, style, icon.name.split()[0]), {}).setdefault(icon.name, row)
    found = []
    for group in groups.values():
        rows = np.array(list(group.values()))
        rows = rows[hash_ids(0, rows).argsort(kind="stable")].tolist()  # names next to each other in the alphabet are often near twins
        pairs = list(zip(rows[::2], rows[1::2]))
        found += pairs[: per_group or None]
    return tuple(found)
