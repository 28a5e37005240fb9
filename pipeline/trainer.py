"""The loop: fetch, score, select, train, record, save. No torch.distributed, no deepspeed, one screen."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.errors import DataError, StorageError
from pipeline.data.loader import DataModule
from pipeline.distributed import checkpoint
from pipeline.distributed.engine import Engine
from pipeline.distributed.host import Files, Host
from pipeline.distributed.saver import Saver
from pipeline.distributed.stop import Stop
from pipeline.distributed.watchdog import Watchdog
from pipeline.record.metrics import Record
from pipeline.selection import cost
from pipeline.selection.groups import GroupSelector
from pipeline.selection.scoring import Choice, Scoring
from pipeline.teachers.base import Teachers
from pipeline.types import Batch


@dataclass
class Progress:
    """Where a run is; counts are global. Saved with every checkpoint."""

    step: int = 0
    offered: int = 0
    scored: int = 0
    trained: int = 0
    padded: int = 0  # rows that selector.scope global adds to make the ranks' shapes equal
    visit: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """save: what saving held up training; write: from the beginning of a save to its COMMIT, most of it beside training."""
        self.seconds = dict.fromkeys(("data", "score", "train", "evaluate", "save", "write", "total"), 0.0) | self.seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time inside to a phase. On a GPU work is only queued, so score and train show what the host spends."""
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began


@dataclass
class Trainer:
    """The parts of a run, wired by run.build()."""

    folder: Path
    steps: int
    data: DataModule
    selector: GroupSelector
    scoring: Scoring
    engine: Engine
    record: Record
    stop: Stop
    saver: Saver
    facts: dict[str, Any]  # what a checkpoint must agree with
    watchdog: Watchdog
    teachers: Teachers
    evaluate: Callable[[int], None] | None = None
    evaluate_every: int = 0
    progress: Progress = field(default_factory=Progress)

    def fit(self) -> bool:
        """Trains to the last step, or until a signal asks to stop; a checkpoint is written either way. True when training is complete."""
        p = self.progress
        stopping = False
        alive = lambda: (p.step, self.engine.forwards, self.saver.moved)  # noqa: E731
        with self.stop, self.watchdog.over(alive), closing(self.record), self.saver:
            self.data.start()
            self.check_data()
            self.record.start(p.step, p)
            while p.step < self.steps and not stopping:
                with p.timed("total"):
                    self.train_step()
                    if self.evaluate and p.step % self.evaluate_every == 0:
                        with p.timed("evaluate"):
                            self.evaluate(p.step)
                    stopping = p.step < self.steps and self.stop.agreed(p.step)  # after the last step there is nothing to go on with
                    if stopping or p.step == self.steps or p.step % self.saver.config.every == 0:
                        with p.timed("save"):
                            self.save()
            with p.timed("total"), p.timed("save"):
                self.settle()  # nothing is left to train beside the last one
            self.record.trace.at(p.step)
        return p.step == self.steps

    def train_step(self) -> None:
        """One step from the data to the record; what comes every so many steps is fit()'s."""
        p = self.progress
        self.record.trace.at(p.step)
        with p.timed("data"):
            batch = self.data.next()
        with p.timed("score"):
            choice = self.choose(batch)
            choice = self.scoring.ahead(choice, self.data.peek(), p.step + 1)  # on a GPU beside what follows
        with p.timed("train"):
            chosen = choice.selection
            taught = self.teachers(batch.take(chosen.rows, choice.features, chosen.padding))
            trained = self.engine.step(taught, chosen, p.step)
            self.selector.selector.learn(taught, trained.per_sample)
            choice = self.scoring.learn(batch, choice, trained.cosine, p.step)
            self.scoring.watch.step(choice.cosine, batch, p.step + 1)
        self.advance(batch, choice)
        self.record.step(p, batch, choice.selection, choice.cosine, trained, self.engine.rate(p.step - 1))

    def choose(self, batch: Batch) -> Choice:
        """The scoring pass, where one is needed, and the choice."""
        if self.record.flops is None:  # once, on a real batch
            self.record.flops = cost.cost(self.scoring, batch)
            if self.engine.comm.rank == 0:
                print(cost.describe(self.scoring, self.record.flops), flush=True)
        agreement = cost.agreement(self.scoring, batch, self.progress.step)
        if agreement is not None and self.engine.comm.rank == 0:
            print(f"scoring: rank correlation with scores of whole images {agreement:.2f}; near 0 the choice is by chance", flush=True)
        return self.scoring.choose(batch, self.progress.step)

    def advance(self, batch: Batch, choice: Choice) -> None:
        """Counts one step."""
        p, size = self.progress, self.engine.comm.size
        if not self.selector.selector.in_warmup(p.step):
            self.data.note(batch, choice.selection)
        p.step += 1
        p.offered += len(batch) * size
        p.scored += choice.scored * size
        rows = len(choice.selection.rows) * size
        trained = round(rows / choice.selection.scale)
        p.trained += trained
        p.padded += rows - trained
        p.visit = self.data.visit

    def save(self) -> None:
        """Begins a checkpoint, when the one before is whole; collective. Raises CheckpointError, for the one before too.

        The selection log goes first: a checkpoint vouches for what was recorded before it.
        """
        self.check_data()
        self.record.check_finite(self.engine.weight_norm())
        self.settle()
        p, comm = self.progress, self.engine.comm
        state = {"progress": asdict(p), "data": self.data.state_dict(comm), "warmup": self.scoring.watch.state_dict()}
        state["scoring"] = {"ready": self.scoring.ready}
        self.saver.save(p.step, self.facts | state, self.files, first=lambda: self.record.flush(p.step))

    def check_data(self) -> None:
        """Raises DataError on every rank when one of them cannot go on; nothing is saved of the steps since then. Collective."""
        trouble, comm = self.data.trouble, self.engine.comm
        if comm.any(trouble is not None):
            kind = StorageError if comm.any(isinstance(trouble, StorageError)) else DataError
            raise trouble or kind(
                "another rank cannot go on with its data; its message says why. The same command goes on from the newest checkpoint"
            )

    def files(self, host: Host) -> Files:
        """What this rank saves. Collective in ZeRO 3."""
        columns = self.scoring.state_dict() | self.data.columns()
        return self.engine.files(host) | checkpoint.lanes_file(self.data.lanes, columns, host)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if one is, and counts what it took. Collective."""
        if saved := self.saver.wait():
            self.progress.seconds["write"] += saved.seconds
            self.record.also(save_bytes=saved.size, save_seconds=saved.seconds, save_stall_seconds=saved.stalled)

    def resume(self) -> int:
        """Goes to the newest checkpoint, if there is one, and gives its step. Raises CheckpointError."""
        found = checkpoint.newest(self.folder)
        if found is not None:
            folder, state = found
            self.engine.load(folder)
            columns = checkpoint.read_lanes(folder, self.data.lanes)
            self.data.load_state_dict(state["data"], columns)
            self.scoring.load_state_dict(columns)
            self.scoring.ready = state.get("scoring", {"ready": -1})["ready"]
            if "warmup" in state:
                self.scoring.watch.load_state_dict(state["warmup"], self.engine.device)
            self.progress = Progress(**state["progress"])
        self.record.resume(self.progress.step)
        return self.progress.step
