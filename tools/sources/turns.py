"""Icons that move: two weights of one drawing rendered as a short video in which two of three things happen, rotate, grow and swap.

The class is which two and in what order; the drawing is a nuisance. Split by the drawing's name, as icon_weights.
"""

import argparse
import io
import json
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError
from tools.sources import _video, icon_weights
from tools.sources.base import Pair

EVENTS = ("rotate", "grow", "swap")
PAIRS = tuple((a, b) for a in EVENTS for b in EVENTS if a != b)
CLASSES = tuple(f"{a} then {b}" for a, b in PAIRS)
FRAMES, EVENT = 16, 5  # of the video; of each event, somewhere in its half


class Source(icon_weights.Source):
    """Members `video.webp` and `video.mp4` (--kinds), black on white, the class's name as caption, and `json`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        icon_weights.Source.add_arguments(parser)
        parser.set_defaults(size=32, weights="thin,fill")
        parser.add_argument("--kinds", default="webp,mp4", help="how they are encoded: some of webp, zip, mp4 (default %(default)s)")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.kinds = tuple(options.kinds.split(","))
        _video.check(self.kinds)
        if len(self.weights) != 2:
            raise DataError(f"--weights {','.join(self.weights)}: expected two, the one before the swap and the one after")
        self.seed = options.seed

    def fingerprint(self) -> dict:
        mine = {"source": "turns", "classes": list(CLASSES), "kinds": list(self.kinds)}
        return super().fingerprint() | mine

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        for row, drawn in zip(rows, super().pairs(rows)):
            if isinstance(drawn, BadSample):
                yield drawn
                continue
            rng = np.random.default_rng([self.seed, 0x7475726E73, self.options.split == "test", int(row)])
            label = int(rng.integers(len(PAIRS)))
            both = [np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in (drawn.image, drawn.more[f"{self.weights[1]}.png"])]
            frames = moving(*both, PAIRS[label], rng)
            more = {f"video.{kind}": _video.encode(frames, kind) for kind in self.kinds}
            (first, data), *others = more.items()
            about = {"label": label, "class": CLASSES[label], "drawing": drawn.caption}
            yield Pair(first, data, CLASSES[label], dict(others) | {"json": json.dumps(about).encode()})


def moving(before: np.ndarray, after: np.ndarray, events: tuple[str, str], rng: np.random.Generator) -> np.ndarray:
    """uint8 [S, S] of two weights -> uint8 [16, S, S]. What has happened stays: a drawing that has turned stays turned."""
    done = {event: np.zeros(FRAMES) for event in EVENTS}
    for half, event in enumerate(events):
        start = half * FRAMES // 2 + int(rng.integers(FRAMES // 2 - EVENT + 1))
        done[event] = ((np.arange(FRAMES) - start + 1) / EVENT).clip(0, 1)
    size, out = len(before), []
    for rotated, grown, swapped in zip(*(done[event] for event in EVENTS)):
        drawing = Image.fromarray((before + swapped * (after.astype(np.float32) - before)).round().astype(np.uint8))
        side = max(1, round(size * (0.5 + 0.25 * grown)))
        small = drawing.resize((side, side), Image.Resampling.LANCZOS).rotate(-90 * rotated, Image.Resampling.BILINEAR, fillcolor=255)
        page = Image.new("L", (size, size), 255)
        page.paste(small, ((size - side) // 2, (size - side) // 2))
        out.append(np.asarray(page))
    return np.stack(out)
