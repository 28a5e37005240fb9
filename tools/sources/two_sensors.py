"""Synthetic land cover seen by two sensors in four seasons: label maps of which nearly half the pixels are wrong, and clean ones for testing."""

import argparse
import importlib.metadata
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data.errors import BadSample, DataError
from pipeline.data.maps import label_priors
from tools.sources.base import Pair, Plan, add_set_arguments, shuffled
from tools.sources.base import Source as Base

CLASSES, SEASONS, BANDS = 5, 4, {"s1": 2, "s2": 4}
SCENES = {"train": 192, "test": 64}
PRIOR_SIGMA = 1.0  # the paper's 3 pixels are for maps of 256; these have 32
_SPECKLE, _HAZE, _CLOUDS = 1.0, 0.35, 0.15  # noise of s1 and of s2, where the circles' radius is 1.5; share of s2 that clouds hide
_COARSE, _FINE = 3.0, 2.0  # pixels: how smooth the land is, and regions of wrong labels and clouds
_FOLLOWS = 0.8  # share of the wrong labels that say the next class; the others are drawn
# the classes stand on circles, on s2's second one in another order: which are alike differs between the sensors
_ANGLES = 2 * np.pi * np.arange(CLASSES)[:, None] * [1, 1, 2] / CLASSES
_SPECTRA = 1.5 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 2).reshape(CLASSES, -1)


class Scene(NamedTuple):
    """One place; bands as bytes. s1: [4, 2, h, w], s2: [4, 4, h, w], noisy: [4, h, w] and clean: [h, w], classes."""

    s1: np.ndarray
    s2: np.ndarray
    noisy: np.ndarray
    clean: np.ndarray


class Source(Base):
    """Members `s1.npy`, `s2.npy` (bytes, seasons first), `segmentation.npy` (noisy in every season; of the test split one clean map) and
    `prior.npy`. The seed draws every scene: paired seeds."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_set_arguments(parser, 32)
        parser.add_argument("--wrong", type=float, default=0.45, help="share of training pixels in regions of wrong labels (default 0.45)")

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if not 0 <= options.wrong < 1:
            raise DataError(f"--wrong {options.wrong}: expected a share from 0 to below 1")

    def fingerprint(self) -> dict:
        packages = {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
        about = {name: getattr(self.options, name) for name in ("split", "size", "limit", "wrong")}
        return {"source": "two_sensors", "licence": "none, drawn at random", "classes": CLASSES, "packages": packages} | about

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        rows = shuffled(SCENES[self.options.split], self.options, seed)
        return Plan(rows, [f"scene {row}" for row in rows])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        train = self.options.split == "train"
        for row in rows:
            scene = draw(int(row), self.options.seed, train, self.options.size, self.options.wrong)
            labels = scene.noisy if train else scene.clean[None]
            more = {"s2.npy": npy(scene.s2), "segmentation.npy": npy(labels), "prior.npy": npy(label_priors(labels, CLASSES, PRIOR_SIGMA))}
            yield Pair("s1.npy", npy(scene.s1), f"scene {row}", more)


def draw(number: int, seed: int, train: bool, size: int = 32, wrong: float = 0.45) -> Scene:
    """Scene `number` of a seed. Land: the strongest of five smooth random fields. s1 is noisy everywhere, s2 is not but has clouds;
    the labels of each season are wrong in other regions."""
    rng = np.random.default_rng([seed, train, number, 0x7363656E65])
    clean = smooth(rng, (CLASSES, size, size), _COARSE).argmax(0)
    spectra = _SPECTRA[clean].transpose(2, 0, 1)  # [bands, h, w]
    split = BANDS["s1"]
    s1 = spectra[:split] + rng.normal(0, _SPECKLE, (SEASONS, split, size, size))
    s2 = spectra[split:] + rng.normal(0, _HAZE, (SEASONS, BANDS["s2"], size, size))
    s2 = np.where(highest(smooth(rng, (SEASONS, 1, size, size), _FINE), _CLOUDS), 2.5 + rng.normal(0, 0.3, s2.shape), s2)
    drawn = np.where(rng.random((SEASONS, size, size)) < _FOLLOWS, clean + 1, rng.integers(0, CLASSES, (SEASONS, size, size)))
    noisy = np.where(highest(smooth(rng, (SEASONS, size, size), _FINE), wrong), drawn % CLASSES, clean)
    return Scene(_bytes(s1), _bytes(s2), noisy.astype(np.uint8), clean.astype(np.uint8))


def smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian noise, smoothed over the last two axes."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(rng.normal(size=shape), (0,) * (len(shape) - 2) + (sigma, sigma), mode="wrap")


def highest(fields: np.ndarray, share: float) -> np.ndarray:
    """bool: the highest `share` of each map's pixels."""
    return fields > np.quantile(fields, 1 - share, axis=(-2, -1), keepdims=True)


def _bytes(bands: np.ndarray) -> np.ndarray:
    return (128 + 30 * bands).round().clip(0, 255).astype(np.uint8)


def npy(values: np.ndarray) -> bytes:
    """A member in numpy's format."""
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()
