"""The data module: lanes say which samples, workers fetch whole batches by id, the next batch is on its way while this one is used."""

import atexit
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy.random  # noqa: F401 (torch seeds it in every worker, which imported it there each time: 25 ms of CPU)
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Layout, RankLanes, Rows
from pipeline.data.sources import DataConfig
from pipeline.data.walk import Rule, Walk
from pipeline.distributed.comm import Comm, LocalComm, add_up
from pipeline.types import Batch, Selection

CAP_AFTER = 1000  # samples; before that one bad sample would already be past a small cap


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
    """The trainer's view of the data. Its state is the step; where that lies in which shard is arithmetic, and under a rule a walk."""

    def __init__(
        self, config: DataConfig, layout: Layout, rank: int, world_size: int, fetch: Fetch, steps: int, device: torch.device
    ) -> None:
        self.config, self.fetch, self.steps, self.device = config, fetch, steps, device
        self.lanes = RankLanes(layout, rank, world_size)
        self.world_size = world_size
        self.walk: Walk | None = None
        self.follow(config.skip.rule(self.lanes, device) if config.skip else None)
        self.passed = 0  # samples of this rank's lanes that were offered or skipped, in all visits
        self.bad: Counter[str] = Counter()  # of this rank, since the start
        self.counted: Counter[str] = Counter()  # of all ranks, up to the newest checkpoint
        self.trouble: DataError | None = None  # with several ranks: why this one cannot go on
        self.step = 0
        self._before: Counter[str] = Counter()  # of all ranks, up to the checkpoint that was loaded
        self._iterator: Iterator[Batch] | None = None
        self._ahead: Batch | None = None

    def follow(self, rule: Rule | None) -> None:
        """Before it starts: samples that `rule` passes over are not read; None changes nothing. Raises ConfigError as Limits.check does."""
        if rule is not None:
            self.walk = Walk(self.lanes, rule, self.device)

    @property
    def offered(self) -> int:
        """Rows of one rank, up to and with the batch last returned."""
        return self.step * self.lanes.layout.batch // self.world_size

    @property
    def visit(self) -> float:
        """How often a sample was offered or skipped, on average; of this rank's samples where some are skipped."""
        plan = self.lanes.layout
        return self.passed / self.lanes.num_samples if self.walk else self.step * plan.batch / plan.num_samples

    def note(self, batch: Batch, selection: Selection) -> None:
        """Takes notice of a choice that the selector made; nothing to do without a rule."""
        if self.walk:
            self.walk.rule.note(batch, selection)

    def start(self) -> None:
        """Begins to read, unless that was done."""
        if self._iterator is None:
            requests: Any = _Requests(self.lanes, self.step, self.steps)
            if self.walk:
                self.passed = self.walk.begin(self.step)
                requests = (self.walk.next() for _ in range(self.step, self.steps))
            self._iterator = batches(self.fetch, requests, self.config.workers, self.config.prefetch, self.device.type == "cuda")
            self._ahead = self._advance(None)

    def next(self) -> Batch:
        """The batch of the current step, on the device; the one after it starts its way there.

        Raises DataError, also past the cap of bad samples, where there is one rank. Of several none may leave alone, for the others would
        wait for it: the error is kept in `trouble` until all have agreed to stop, and batches whose rows are not valid pass the time.
        """
        self.start()
        batch = self._ahead
        if batch is None:
            raise self.trouble or StopIteration(f"the data module was made for {self.steps} steps")
        if self.walk:
            self.walk.advance(self.step)
        self._ahead = self._advance(batch)
        self.step += 1
        self.passed += len(batch) + batch.skipped
        self._count(batch)
        return batch

    def peek(self) -> Batch | None:
        """The batch that `next` will give, on its way to the device; None after the last one."""
        self.start()
        return self._ahead

    def _advance(self, shape: Batch | None) -> Batch | None:
        """The batch that comes next; after an error one like `shape` without valid rows."""
        if self.trouble is None:
            try:
                batch = next(self._iterator, None)
                return batch.to(self.device) if batch is not None else None
            except DataError as error:
                self._fail(error)
        return None if shape is None else replace(shape, valid=torch.zeros_like(shape.valid), bad=(), skipped=0)

    def _fail(self, error: DataError) -> None:
        if self.world_size == 1:
            raise error
        self.trouble = self.trouble or error

    def _count(self, batch: Batch) -> None:
        self.bad.update(cause for _, cause in batch.bad)
        total = self.bad.total() + self._before.total() / self.world_size
        if self.offered >= min(CAP_AFTER, self.lanes.num_samples) and total > self.config.max_bad_fraction * self.offered:
            causes = ", ".join(f"{cause} {count}" for cause, count in (self.bad + self._before).most_common())
            last = ", ".join(f"{sample} ({cause})" for sample, cause in batch.bad[:5])
            error = DataError(
                f"data: {total:g} of {self.offered} samples could not be used, more than data.max_bad_fraction {self.config.max_bad_fraction} allows: {causes}. "
                f"Sample ids of this batch: {last or 'none'}. Look at the shards with tools.check_shards --decode, or raise the cap"
            )
            self._fail(error)

    def state_dict(self, comm: Comm | None = None) -> dict[str, Any]:
        """The step after the batch last returned, and how many rows of all ranks were offered, and were bad, by cause. Collective where `comm` is given."""
        self.counted = self._before + (self.bad if comm is None else add_up(self.bad, comm, self.device))
        walk = {"walk": self.walk.state(comm or LocalComm())} if self.walk else {}
        return {"step": self.step, "offered": self.step * self.lanes.layout.batch, "bad": dict(self.counted)} | walk

    def columns(self) -> dict[str, Tensor]:
        """What is saved of each of this rank's samples, beside its scores; [N] each."""
        return self.walk.columns() if self.walk else {}

    def load_state_dict(self, state: dict[str, Any], columns: dict[str, Tensor] | None = None) -> None:
        """Continues at `state["step"]`; the cost does not depend on how far that is. Takes its own out of the `columns` that were saved."""
        if self.walk:
            self.walk.load(state["walk"], {name: columns.pop(name) for name in self.columns()})
        self.step, self.bad, self.trouble = state["step"], Counter(), None
        self._before = self.counted = Counter(state["bad"])
        self._iterator = self._ahead = None
