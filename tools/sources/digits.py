"""The 1,797 digits of scikit-learn in two views: pasted into a noisy canvas (what the student sees), and clean (what training has besides)."""

import argparse
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError
from tools.sources.base import Pair, Plan, png
from tools.sources.base import Source as Base

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CANVAS, NOISE = 12, 0.1
# pixel = 48 + 160 x: room for noise of 3 standard deviations below 0 and above 1; the rounding is 16 times smaller than the noise
ZERO, SCALE = 48, 160


class Source(Base):
    """Members `image.png` (12 x 12) and `clean.png` (8 x 8), grey, and `json`. The seed draws split, offsets and noise: paired seeds."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--split", choices=("train", "test"), default="train")
        parser.add_argument(
            "--num-train", type=int, default=300, help="samples of the train split, the others are the test split (default 300)"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self.split, self.num_train, self.seed = options.split, options.num_train, options.seed
        if importlib.util.find_spec("sklearn") is None:
            raise DataError(
                "package scikit-learn, which holds the digits, is not installed. Install it with pip install 'dissect-pipeline[train]'"
            )
        if not 0 < self.num_train < 1797:
            raise DataError(f"--num-train {self.num_train}: expected 1 to 1796")

    def fingerprint(self) -> dict:
        packages = {name: importlib.metadata.version(name) for name in ("scikit-learn", "numpy", "pillow")}
        licence = {"source": "digits", "licence": "CC BY 4.0", "classes": list(NAMES)}
        return licence | {"split": self.split, "num_train": self.num_train, "packages": packages}

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        from sklearn.datasets import load_digits

        order = np.random.default_rng([seed, 0x6F72646572]).permutation(1797)
        rows = order[: self.num_train] if self.split == "train" else order[self.num_train :]
        return Plan(rows, [NAMES[label] for label in load_digits().target[rows]])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        clean, noisy = digits.images / 16, canvases(digits.images / 16, self.seed)
        for row in rows:
            label = int(digits.target[row])
            more = {"clean.png": _grey(clean[row]), "json": json.dumps({"label": label, "class": NAMES[label]}).encode()}
            yield Pair("image.png", _grey(noisy[row]), NAMES[label], more)

    def about(self) -> str:
        return "licence CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)"


def canvases(images: np.ndarray, seed: int) -> np.ndarray:
    """float64 [N, 8, 8] in 0..1 -> [N, 12, 12]: each at a random offset, with Gaussian noise of 0.1 on every pixel."""
    rng = np.random.default_rng([seed, 0x63616E766173])
    places = rng.integers(0, CANVAS - 8 + 1, (len(images), 2))
    canvas = rng.normal(0, NOISE, (len(images), CANVAS, CANVAS))
    for page, image, (top, left) in zip(canvas, images, places):
        page[top : top + 8, left : left + 8] += image
    return canvas


def _grey(image: np.ndarray) -> bytes:
    return png(Image.fromarray((ZERO + SCALE * image).round().clip(0, 255).astype(np.uint8)))
