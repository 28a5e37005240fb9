"""Where samples come from: the configuration of the data, and the sources of a run as one range of global sample ids."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from pipeline.config import Strict
from pipeline.data.cache import ShardCache
from pipeline.data.decode import captions
from pipeline.data.errors import BadSample, DataError
from pipeline.data.index import Index
from pipeline.data.lanes import RankLanes, SourceShape
from pipeline.data.read import Reader
from pipeline.data.skip import SkipConfig
from pipeline.data.storage import OUTAGE_S, is_local

CAPTIONS_FOR_TOKENIZER = 200_000


class SourceConfig(Strict):
    """One set of shards with its index."""

    url: str = Field(description="folder that holds index.parquet, any fsspec URL")
    weight: float | None = Field(None, gt=0, description="relative share of the candidates; None: its number of samples")


class ModalityConfig(Strict):
    """Where one field of the batch comes from."""

    members: list[str] | None = Field(
        None,
        description="the first one that a sample has is read: [speech.fr, speech.es]; None: the field's name, such as line.png for line",
    )
    optional: bool = Field(False, description="a sample may lack it: its row is zeros, and False in the field <name>.present")


class DataConfig(Strict):
    """What is read, how it is dealt, and how much of it may be bad."""

    sources: list[SourceConfig] = Field(min_length=1)
    modalities: dict[str, ModalityConfig] = Field(
        default_factory=dict, description="fields that are read from other members than those of their name, or that samples may lack"
    )
    classes: list[str] | int | None = Field(
        None,
        description="names, or number, of the classes: adds the field label, read from json or cls members; -1 where a sample has none",
    )
    labelled: float = Field(
        1.0, gt=0, le=1, description="share of the training samples whose label is shown, drawn by the run's seed; the others have label -1"
    )
    batch: int = Field(ge=1, description="candidate rows of one step, all ranks together")
    candidates: int = Field(
        1,
        ge=1,
        description="super-batch: n times as many candidates; with selector.rate 1/n a step still trains `batch` rows, all of them well chosen",
    )
    lanes: int | None = Field(None, ge=1, description="None: the largest power of two that divides the batch, at most 1,024")
    groups: int = Field(8, ge=1, description="selection groups; top-k is taken inside each")
    window: int = Field(4, ge=1, description="shards that are shuffled together")
    skip: SkipConfig | None = Field(
        None, description="pass over what was rejected again and again, before it is read; null: read everything"
    )
    workers: int = Field(2, ge=0, description="loader processes of each rank")
    prefetch: int = Field(2, ge=1, description="batches that each worker prepares ahead")
    cache: str | None = Field(
        None, description="folder for whole remote shards on this node, or 'off' to read them by ranges; None: the user's cache folder"
    )
    cache_gb: float = Field(50.0, gt=0)
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="share of undecodable samples, of those that one rank reads, that stops the run"
    )

    @property
    def pool(self) -> int:
        """Candidate rows of one step, all ranks together: N_b."""
        return self.batch * self.candidates


def cache_folder(config: DataConfig) -> Path:
    """Where whole remote shards and memory-mapped indices are kept on this node."""
    if config.cache and config.cache != "off":
        return Path(config.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dissect-pipeline"


class Sources:
    """The sources of a run as one range of global sample ids: source i begins where source i - 1 ends."""

    def __init__(self, indices: list[Index], readers: list[Reader], weights: list[float | None], config: DataConfig) -> None:
        self.indices, self.readers, self.config = indices, readers, config
        self.modalities, self.classes, self.labelled = config.modalities, config.classes, config.labelled
        self.shapes = [SourceShape(i.shard_start, w if w is not None else float(i.num_samples)) for i, w in zip(indices, weights)]
        self.bases = np.cumsum([0] + [index.num_samples for index in indices])

    @classmethod
    def open(cls, config: DataConfig) -> "Sources":
        """Opens every index and compares every shard with it by size. Raises DataError."""
        folder = cache_folder(config)
        indices = [Index.open(source.url, config.cache if config.cache != "off" else None) for source in config.sources]
        for index in indices:
            index.check_shards()
        place = (None, 0) if config.cache == "off" else (folder / "shards", int(config.cache_gb * 1e9))
        cache = ShardCache(*place, outage_s=OUTAGE_S)
        return cls(indices, [Reader(index, cache) for index in indices], [source.weight for source in config.sources], config)

    @property
    def num_samples(self) -> int:
        return int(self.bases[-1])

    @property
    def digest(self) -> str:
        """One digest for all the indices; a checkpoint made with another is refused."""
        return "+".join(index.digest for index in self.indices)

    def check_cache(self, config: DataConfig, lanes: RankLanes, local_ranks: int) -> None:
        """Raises DataError when the node's cache cannot hold the windows of its lanes: every shard would be fetched again and again."""
        remote = [index for index in self.indices if any(not is_local(url) for url in index.shards)]
        if not remote or config.cache == "off":
            return
        largest = max(int(index.shard_bytes.max()) for index in remote)
        need = min(lanes.open_pieces() * local_ranks * largest, sum(int(index.shard_bytes.sum()) for index in remote))
        if need > config.cache_gb * 1e9:
            raise DataError(
                f"data.cache_gb {config.cache_gb}: the lanes of this node read {lanes.open_pieces() * local_ranks} shards of up to {largest / 1e6:.0f} MB at a "
                f"time, {need / 1e9:.1f} GB. Raise data.cache_gb, lower data.lanes or data.window, write smaller shards, or set data.cache to 'off'"
            )
        print(f"shard cache {cache_folder(config)}: {need / 1e9:.2f} GB needed at a time, {config.cache_gb:g} GB allowed", flush=True)

    def locate(self, sample: int) -> tuple[int, int]:
        """Global sample id -> (source, row of its index)."""
        source = int(np.searchsorted(self.bases, sample, side="right")) - 1
        return source, sample - int(self.bases[source])

    def members(self, sample: int) -> dict[str, bytes]:
        """Extension -> bytes of the members that a sample has. Raises BadSample, DataError."""
        source, row = self.locate(sample)
        return self.readers[source].read(row)

    def captions(self, limit: int = CAPTIONS_FOR_TOKENIZER) -> Iterator[str]:
        """Training captions in id order, evenly thinned where there are more than `limit`; undecodable ones are left out."""
        for sample in range(0, self.num_samples, max(1, -(-self.num_samples // limit))):
            try:
                yield from captions(self.members(sample)["txt"])
            except (BadSample, KeyError):
                continue  # training counts it, with its cause
