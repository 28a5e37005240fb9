"""What a source of pairs must offer to tools.make_shards; the modules of this folder are the registry."""

import argparse
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.errors import BadSample, DataError


class Plan(NamedTuple):
    """The samples of a data set in the order in which they are written. rows: int64 [N], ids of the source.
    captions: their true captions where the source knows them beforehand (noise needs them), else None.
    given, noisy: where the source has noise of its own, the captions that are written, and which of them are wrong; None: nobody knows."""

    rows: np.ndarray
    captions: list[str] | None
    given: list[str] | None = None
    noisy: list[bool | None] | None = None


class Pair(NamedTuple):
    """One image, encoded, and its true caption; `more` holds further members by extension, such as `line.png` or `json`. None: it has none."""

    extension: str
    image: bytes | None
    caption: str | None
    more: Mapping[str, bytes | None] = MappingProxyType({})


class Source(ABC):
    """Pairs to be written as shards. Travels to the workers by pickle, so what is large is opened where it is used."""

    shard_size: ClassVar[int] = 1000

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options of this source."""

    @abstractmethod
    def __init__(self, options: argparse.Namespace) -> None:
        """Checks the options; cheap. Raises DataError."""

    @abstractmethod
    def fingerprint(self) -> dict:
        """Everything of this source that decides the bytes of the shards, as JSON values; cheap, called on every rerun."""

    @abstractmethod
    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        """The order of writing, shuffled by the seed, a large source at least within windows of `window` samples; with the captions if
        they are asked for. Raises DataError."""

    @abstractmethod
    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        """One item per row, in order; a row that cannot be used gives the BadSample that says why. Raises DataError."""

    def notice(self) -> str | None:
        """Licences and names of the authors, for a file beside the shards."""
        return None

    def about(self) -> str:
        """Printed when the shards are there: the licence, and what was not taken of the source and why."""
        return ""


SPLITS = ("train", "test")


def split_of(name: str) -> str:
    """`test` for a fifth of the names, by their hash: a name stays where it is, whatever the seed and whatever else there is."""
    return SPLITS[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 5 == 0]


def add_set_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    """The options that the sets with several modalities share."""
    parser.add_argument("--split", choices=SPLITS, default="train", help="a fifth of the names is the test split (default train)")
    parser.add_argument("--size", type=int, default=size, help="side of the square images in pixels (default %(default)s)")
    parser.add_argument("--limit", type=int, help="a seeded subset of this many samples (default: all)")


def shuffled(count: int, options: argparse.Namespace, seed: int) -> np.ndarray:
    """int64: the rows 0..count-1 in the seed's order, as many as --limit allows. Raises DataError."""
    if options.size < 1:
        raise DataError(f"--size {options.size}: expected a number of pixels of at least 1")
    if options.limit is not None and not 0 < options.limit <= count:
        raise DataError(f"--limit {options.limit}: there are {count} samples with these options; expected 1 to {count}")
    return np.random.default_rng([seed, 0x6F72646572]).permutation(count)[: options.limit]


def png(image: Image.Image) -> bytes:
    """Encoded, the same bytes for the same image."""
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def on_white(image: Image.Image, size: int, mode: str = "RGB") -> bytes:
    """A PNG of `size` x `size`: transparency on white, what is not square padded and not stretched."""
    image = image.convert("RGBA")
    side = max(image.size)
    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return png(page.convert(mode).resize((size, size), Image.Resampling.LANCZOS))
