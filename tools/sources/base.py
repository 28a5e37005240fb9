"""What a source of pairs must offer to tools.make_shards; the modules of this folder are the registry."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from pipeline.data.errors import BadSample


class Plan(NamedTuple):
    """The samples of a data set in the order in which they are written. rows: int64 [N], ids of the source.
    captions: their true captions where the source knows them beforehand (noise needs them), else None."""

    rows: np.ndarray
    captions: list[str] | None


class Pair(NamedTuple):
    """One image, encoded, and its true caption."""

    extension: str
    image: bytes
    caption: str


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
