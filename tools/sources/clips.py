"""Two-event clips, drawn by the seed: each event shows one of four glyphs in a quadrant of a noisy 8 x 8 video; the class is the order of quadrants."""

import argparse
import importlib.metadata
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data.errors import BadSample, DataError
from tools.sources import _video
from tools.sources.base import SPLITS, Pair, Plan
from tools.sources.base import Source as Base

FRAMES, SIDE, EVENT, NOISE = 32, 8, 10, 0.15
ZERO, SCALE = 64, 128  # pixel = 64 + 128 x: room for 3 standard deviations of the noise on both sides
PAIRS = tuple((a, b) for a in range(4) for b in range(4) if a != b)
PLACES = ("top left", "top right", "bottom left", "bottom right")
CLASSES = tuple(f"{PLACES[a]} then {PLACES[b]}" for a, b in PAIRS)
GLYPHS = np.array(
    [
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]],
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
    ],
    np.float32,
)


class Source(Base):
    """Members `video` (noisy) and `clean` (the same clip without noise and blanks), and `json`; the two splits share no draw."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--split", choices=SPLITS, default="train")
        parser.add_argument("--count", type=int, default=3000, help="clips (default %(default)s)")
        parser.add_argument("--kinds", default="webp", help="how they are encoded: webp, zip or mp4 (default %(default)s)")

    def __init__(self, options: argparse.Namespace) -> None:
        self.split, self.count, self.seed, self.kind = options.split, options.count, options.seed, options.kinds
        _video.check((self.kind,))
        if self.count < 1:
            raise DataError(f"--count {self.count}: expected at least 1")

    def fingerprint(self) -> dict:
        packages = {name: importlib.metadata.version(name) for name in ("numpy", "pillow")}
        mine = {"source": "clips", "licence": "none needed, drawn by a program", "classes": list(CLASSES), "kind": self.kind}
        return mine | {"split": self.split, "count": self.count, "packages": packages}

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        return Plan(np.arange(self.count), None if not captions else [CLASSES[draw(self._rng(row)).label] for row in range(self.count)])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        for row in rows:
            rng = self._rng(int(row))
            one = draw(rng)
            label = {"label": one.label, "class": CLASSES[one.label], "glyphs": one.glyphs}
            more = {f"clean.{self.kind}": _video.encode(pixels(one.clean), self.kind), "json": json.dumps(label).encode()}
            yield Pair(f"video.{self.kind}", _video.encode(pixels(noisy(one.shown, rng)), self.kind), CLASSES[one.label], more)

    def _rng(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), 0x636C697073, row])


class Clip(NamedTuple):
    """`shown` and `clean`: float32 [32, 8, 8] in 0..1; in `shown` half of each event's frames are blank."""

    label: int
    glyphs: list[int]
    shown: np.ndarray
    clean: np.ndarray


def draw(rng: np.random.Generator) -> Clip:
    """Event 1 somewhere in the first half, event 2 in the second, 10 frames each."""
    label, glyphs = int(rng.integers(len(PAIRS))), [int(glyph) for glyph in rng.integers(0, 4, 2)]
    clean, shown = (np.zeros((FRAMES, SIDE, SIDE), np.float32) for _ in range(2))
    for half, (place, glyph) in enumerate(zip(PAIRS[label], glyphs)):
        start = half * FRAMES // 2 + int(rng.integers(FRAMES // 2 - EVENT + 1))
        square = (slice(4 * (place // 2), 4 * (place // 2) + 4), slice(4 * (place % 2), 4 * (place % 2) + 4))
        clean[start : start + EVENT, *square] = GLYPHS[glyph]
        for at in rng.permutation(EVENT)[: EVENT // 2]:
            shown[start + at, *square] = GLYPHS[glyph]
    return Clip(label, glyphs, shown, clean)


def noisy(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With Gaussian noise of 0.15 on every pixel."""
    return frames + rng.normal(0, NOISE, frames.shape).astype(np.float32)


def pixels(frames: np.ndarray) -> np.ndarray:
    """float32 in about 0..1 -> uint8."""
    return (ZERO + SCALE * frames).round().clip(0, 255).astype(np.uint8)
