"""The data module: lanes say which samples, workers fetch whole batches by id, the next batch is on its way while this one is used."""

import atexit
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.config import Strict
from pipeline.data.cache import ShardCache
from pipeline.data.decode import Decoder, LabelDecoder, captions, members_of
from pipeline.data.errors import BadSample, DataError
from pipeline.data.index import Index
from pipeline.data.lanes import Layout, RankLanes, Rows, SourceShape
from pipeline.data.read import Reader
from pipeline.data.storage import is_local
from pipeline.hashing import hash_ids
from pipeline.types import Batch

CAPTIONS_FOR_TOKENIZER = 200_000
CAP_AFTER = 1000  # samples; before that one bad sample would already be past a small cap


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
    batch: int = Field(ge=1, description="candidate rows of one step, all ranks together")
    lanes: int | None = Field(None, ge=1, description="None: the largest power of two that divides the batch, at most 1,024")
    groups: int = Field(8, ge=1, description="selection groups; top-k is taken inside each")
    window: int = Field(4, ge=1, description="shards that are shuffled together")
    workers: int = Field(2, ge=0, description="loader processes of each rank")
    prefetch: int = Field(2, ge=1, description="batches that each worker prepares ahead")
    cache: str | None = Field(
        None, description="folder for whole remote shards on this node, or 'off' to read them by ranges; None: the user's cache folder"
    )
    cache_gb: float = Field(50.0, gt=0)
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of undecodable samples that stops the run")


def cache_folder(config: DataConfig) -> Path:
    """Where whole remote shards and memory-mapped indices are kept on this node."""
    if config.cache and config.cache != "off":
        return Path(config.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dissect-pipeline"


class Sources:
    """The sources of a run as one range of global sample ids: source i begins where source i - 1 ends."""

    def __init__(self, indices: list[Index], readers: list[Reader], weights: list[float | None], config: DataConfig) -> None:
        self.indices, self.readers = indices, readers
        self.modalities, self.classes = config.modalities, config.classes
        self.shapes = [SourceShape(i.shard_start, w if w is not None else float(i.num_samples)) for i, w in zip(indices, weights)]
        self.bases = np.cumsum([0] + [index.num_samples for index in indices])

    @classmethod
    def open(cls, config: DataConfig) -> "Sources":
        """Opens every index and compares every shard with it by size. Raises DataError."""
        folder = cache_folder(config)
        indices = [Index.open(source.url, config.cache if config.cache != "off" else None) for source in config.sources]
        for index in indices:
            index.check_shards()
        cache = ShardCache(folder / "shards", int(config.cache_gb * 1e9)) if config.cache != "off" else ShardCache(None, 0)
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


class Fetch(Dataset):
    """One item is one whole batch: `Rows` in, `Batch` out. Holds nothing that changes, so any worker gives the same answer."""

    def __init__(self, sources: Sources, decoders: dict[str, Decoder], seed: int | None) -> None:
        self.sources, self.seed = sources, seed
        self.decoders = decoders if sources.classes is None else decoders | {"label": LabelDecoder(sources.classes)}
        given = sources.modalities
        self.members = {name: members_of(name, d, given[name].members if name in given else None) for name, d in self.decoders.items()}
        self.masked = [name for name in self.decoders if name in given and given[name].optional]
        self._check()

    def _check(self) -> None:
        """Raises DataError for a field that no sample has, as far as the index tells; evaluation may lack what is optional."""
        there = sorted({extension for index in self.sources.indices for extension in index.extensions})
        for name, members in self.members.items():
            if not set(members) & set(there) and (self.seed is not None or not self._optional(name)):
                raise DataError(
                    f"data: no sample has the modality {name!r}: it is read from {', '.join(members)}, the shards hold {', '.join(there)}. "
                    f"Name its members in data.modalities.{name}.members"
                )
        unread = [name for name in self.sources.modalities if name not in self.decoders]
        if unread and self.seed is not None:
            raise DataError(f"data.modalities: no tower reads {', '.join(unread)}; the towers read {', '.join(self.decoders)}")

    def _optional(self, name: str) -> bool:
        return name in self.masked or getattr(self.decoders[name], "optional", False)

    def __getitem__(self, rows: Rows) -> Batch | DataError:
        """What stops the run comes as a value: raised in a worker, it would reach people inside of torch's traceback."""
        try:
            return self._batch(rows)
        except DataError as error:
            return error

    def _batch(self, rows: Rows) -> Batch:
        items: dict[str, list[Any]] = {name: [] for name in self.decoders}
        valid, bad = np.ones(len(rows.sample), bool), []
        seeds = hash_ids(self.seed, rows.sample, rows.visit).tolist() if self.seed is not None else [None] * len(rows.sample)
        for i, (sample, seed) in enumerate(zip(rows.sample.tolist(), seeds)):
            try:
                decoded = self._decode(sample, seed)
            except BadSample as error:
                decoded, valid[i] = dict.fromkeys(self.decoders), False
                bad.append((sample, error.cause))
            for name, item in decoded.items():
                items[name].append(item)
        fields: dict[str, Tensor] = {name: decoder.collate(items[name]) for name, decoder in self.decoders.items()}
        for name in self.masked:
            fields[f"{name}.present"] = torch.tensor([item is not None for item in items[name]])
        return Batch(*map(torch.from_numpy, (rows.sample, rows.slot, rows.visit, valid)), fields=fields, bad=tuple(bad))

    def _decode(self, sample: int, seed: int | None) -> dict[str, Any]:
        members = self.sources.members(sample)
        out = {}
        for name, decoder in self.decoders.items():
            member = next((m for m in self.members[name] if m in members), None)
            if member is None and not self._optional(name):
                raise BadSample("missing_member", f"{name}: none of {', '.join(self.members[name])}")
            out[name] = None if member is None else decoder(members[member], member.rsplit(".", 1)[-1], seed)
        return out


class _Requests:
    """The sampler: the rank's rows at one step after the other, without end. Computed in the trainer's process."""

    def __init__(self, lanes: RankLanes, start: int, steps: int) -> None:
        self.lanes, self.start, self.steps = lanes, start, steps

    def __iter__(self) -> Iterator[Rows]:
        return (self.lanes.rows(step) for step in range(self.start, self.steps))

    def __len__(self) -> int:
        return max(0, self.steps - self.start)


def _quiet_worker(_: int) -> None:
    """A signal to stop is for the trainer, which finishes its step and needs its workers for that."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers() -> None:
    """At exit multiprocessing ends its daemons by SIGTERM, which ours ignore, and waits for them: after an error, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the workers that end here as failed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def batches(fetch: Fetch, requests: Any, workers: int, prefetch: int = 2, pin: bool = False) -> Iterator[Batch]:
    """Whole batches from a torch DataLoader; it keeps their order for any number of workers. Raises DataError."""
    more = {"prefetch_factor": prefetch, "worker_init_fn": _quiet_worker} if workers else {}
    found = iter(DataLoader(fetch, batch_size=None, sampler=requests, num_workers=workers, pin_memory=pin, **more))
    if workers:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # the last one registered is the first to run
    for batch in found:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class DataModule:
    """The trainer's view of the data. Its state is the step; where that lies in which shard is arithmetic."""

    def __init__(
        self, config: DataConfig, layout: Layout, rank: int, world_size: int, fetch: Fetch, steps: int, device: torch.device
    ) -> None:
        self.config, self.fetch, self.steps, self.device = config, fetch, steps, device
        self.lanes = RankLanes(layout, rank, world_size)
        self.bad: Counter[str] = Counter()
        self.offered = 0  # rows of this rank, up to and with the batch last returned
        self.step = 0
        self._iterator: Iterator[Batch] | None = None
        self._ahead: Batch | None = None

    def next(self) -> Batch:
        """The batch of the current step, on the device; the one after it starts its way there. Raises DataError past the cap of bad samples."""
        if self._iterator is None:
            requests = _Requests(self.lanes, self.step, self.steps)
            self._iterator = batches(self.fetch, requests, self.config.workers, self.config.prefetch, self.device.type == "cuda")
            self._ahead = self._advance()
        batch, self._ahead = self._ahead, self._advance()
        if batch is None:
            raise StopIteration(f"the data module was made for {self.steps} steps")
        self.step += 1
        self._count(batch)
        return batch

    def _advance(self) -> Batch | None:
        batch = next(self._iterator, None)
        return batch.to(self.device) if batch is not None else None

    def _count(self, batch: Batch) -> None:
        self.offered += len(batch)
        self.bad.update(cause for _, cause in batch.bad)
        total = self.bad.total()
        if self.offered >= min(CAP_AFTER, self.lanes.num_samples) and total > self.config.max_bad_fraction * self.offered:
            causes = ", ".join(f"{cause} {count}" for cause, count in self.bad.most_common())
            last = ", ".join(f"{sample} ({cause})" for sample, cause in batch.bad[:5])
            raise DataError(
                f"data: {total} of {self.offered} samples could not be used, more than data.max_bad_fraction {self.config.max_bad_fraction} allows: {causes}. "
                f"Sample ids of this batch: {last or 'none'}. Look at the shards with tools.check_shards --decode, or raise the cap"
            )

    def state_dict(self) -> dict[str, Any]:
        """The step after the batch last returned, and what was counted so far."""
        return {"step": self.step, "offered": self.offered, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at `state["step"]`; the cost does not depend on how far that is."""
        self.step, self.offered, self.bad = state["step"], state["offered"], Counter(state["bad"])
        self._iterator = self._ahead = None
