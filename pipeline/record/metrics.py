"""What a run leaves behind while it trains: metrics.jsonl, the trackers, the progress line, the selection log, the stop on NaN.

Everything a step gives stays on the device until a log step, where it is fetched at once: nothing else waits for the device.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, field_validator
from torch import Tensor
from tqdm import tqdm

from pipeline.config import Strict
from pipeline.distributed.comm import Comm
from pipeline.distributed.engine import Trained
from pipeline.hashing import hash_ids
from pipeline.record.profile import Trace
from pipeline.types import Batch, Selection

TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")


class RecordConfig(Strict):
    """What is recorded, and how often."""

    log_every: int = Field(20, ge=1)
    trackers: list[str] = Field(default_factory=list, description="accelerate's trackers, beside metrics.jsonl: tensorboard, wandb, ...")
    selection_samples: int = Field(100_000, ge=0, description="how many samples' choices are logged (drawn by hash); 0 logs none")
    profile: str | None = Field(None, pattern=r"^\d+:\d+$", description="steps 'first:last' of which a trace is written")

    @field_validator("trackers")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if wrong := [name for name in names if name not in TRACKERS]:
            raise ValueError(f"unknown tracker {wrong[0]!r}. Known: {', '.join(TRACKERS)}")
        return names


class NotFinite(RuntimeError):
    """Loss or gradient became NaN or infinite: names the step, the samples and the checkpoint to go back to."""


class Record:
    """One rank's record; rank 0 writes metrics, every rank writes its part of the selection log."""

    def __init__(self, config: RecordConfig, folder: Path, comm: Comm, accelerator: Any, num_samples: int, steps: int, seed: int) -> None:
        self.config, self.folder, self.comm, self.accelerator, self.steps = config, folder, comm, accelerator, steps
        self.trace = Trace(config.profile, folder)
        self.flops: tuple[float, float, float] | None = None  # of selection.cost; set by the trainer's first step
        self._log = _SelectionLog(folder / "selection", comm.rank, config.selection_samples / num_samples, seed)
        self._bad = self._skipped = 0  # samples of this rank that could not be decoded, or were passed over, since the last log step
        self._pending: list[tuple[int, Tensor, Trained]] = []
        self._also: dict[str, float] = {}
        self._since: tuple[float, ...] = ()
        self._bar: tqdm | None = None

    def resume(self, step: int) -> None:
        """Drops what was written after the checkpoint of `step`: the steps are about to be run again."""
        if self.comm.rank == 0:
            self._log.drop_after(step)
        path = self.folder / "metrics.jsonl"
        if self.comm.rank == 0 and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            partial = path.with_suffix(".part")
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            partial.replace(path)

    def start(self, step: int, progress: Any) -> None:
        """Opens the progress line; rates are counted from here."""
        self._since = _now(progress)
        if self.comm.rank == 0:
            every = 0.5 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=self.steps, initial=step, desc=self.folder.name, unit="step", mininterval=every, dynamic_ncols=True, file=sys.stderr
            )

    def step(self, progress: Any, batch: Batch, chosen: Selection, cosine: Tensor | None, trained: Trained, lr: float) -> None:
        """Notes one step (progress.step counts it already); on a log step fetches and writes. Raises NotFinite on every rank at once."""
        self._log.note(progress.step - 1, batch, chosen, cosine)
        self._pending.append((progress.step - 1, batch.sample[chosen.rows], trained))
        self._bad += len(batch.bad)
        self._skipped += batch.skipped
        if self._bar is not None:
            self._bar.update(1)
        if progress.step % self.config.log_every == 0 or progress.step == self.steps:
            self._write(progress, lr)

    def _write(self, progress: Any, lr: float) -> None:
        self.check_finite()
        last = self._pending[-1][2]
        names = ["loss", *last.terms]
        mine = [last.loss, *(last.terms[name] for name in names[1:]), last.loss.new_tensor(self._bad), last.loss.new_tensor(self._skipped)]
        *shares, bad, skipped = (self.comm.sum(torch.stack(mine).float()) / self.comm.size).tolist()
        values = dict(zip(names, shares)) | {"grad_norm": last.grad_norm.item(), "lr": lr}
        del self._pending[:-1]  # the last one stays: what it did to the weights is looked at when they are saved
        now = _now(progress)
        seconds, waited, offered, trained, padded, scored, steps = (after - before for after, before in zip(now, self._since))
        skipped *= self.comm.size
        self._since, self._bad, self._skipped, rate = now, 0, 0, (offered + skipped) / seconds
        values |= {
            "candidates_per_second": rate,
            "trained_per_second": trained / seconds,
            "kept_share": trained / offered,
            "skipped_share": skipped / (offered + skipped),
            "padded_share": padded / (trained + padded),
            "bad_share": bad * self.comm.size / offered,  # of all ranks
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": _peak_memory(self.accelerator.device),
            "eta_seconds": (self.steps - progress.step) * seconds / steps,
            "wall_seconds": progress.seconds["total"],
        }
        if self.flops:
            forward, scoring, peak = self.flops
            values["flop_utilisation"] = (scoring * scored + 3 * forward * trained) / seconds / (peak * self.comm.size)
        self.event({"step": progress.step, "visit": progress.visit} | values | self._also)
        self._also.clear()
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} candidates/s, kept {values['kept_share']:.0%}", refresh=False)

    def check_finite(self, weights: Tensor | None = None) -> None:
        """Raises NotFinite when a step since the last log was not finite, or `weights`, the norm of the weights that it left.

        Called with it before every save, so no checkpoint holds NaN.
        """
        if not self._pending:
            return
        fine = torch.stack([trained.loss.isfinite() & trained.grad_norm.isfinite() for _, _, trained in self._pending])
        if weights is not None:
            fine[-1] &= weights.isfinite()
        first_bad = int((~fine).int().argmax()) if not fine.all() else len(self._pending)
        if not self.comm.any(first_bad < len(self._pending)):
            return
        first_bad = min(first_bad, len(self._pending) - 1)
        step, samples, trained = self._pending[first_bad]
        path = self.folder / f"not-finite-rank{self.comm.rank:04d}.json"
        values = {"loss": trained.loss.item(), "grad_norm": trained.grad_norm.item()} | (
            {} if weights is None else {"weights": weights.item()}
        )
        path.write_text(json.dumps({"step": step} | values | {"samples": samples.tolist()}), encoding="utf-8")
        raise NotFinite(
            f"step {step}: {', '.join(f'{name} {value}' for name, value in values.items())}: not all finite on some rank. The sample ids of the "
            f"step are in {path}. No checkpoint was written since; lower optimizer.lr or set engine.clip_grad_norm, then start again"
        )

    def event(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and of every tracker; rank 0 only."""
        if self.comm.rank == 0:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=values["step"])

    def also(self, **values: float) -> None:
        """Goes into the next line about training: this rank's figures of something that is over."""
        self._also |= values

    def flush(self, step: int) -> None:
        """Writes the selection log so far; part of a checkpoint at `step`."""
        self._log.flush(step)

    def close(self) -> None:
        """Ends the progress line and the trackers."""
        if self._bar is not None:
            self._bar.close()
        self.accelerator.end_training()


def _now(progress: Any) -> tuple[float, ...]:
    return (
        time.perf_counter(),
        progress.seconds["data"],
        progress.offered,
        progress.trained,
        progress.padded,
        progress.scored,
        progress.step,
    )


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return sys.maxsize  # the last line of a killed run may be cut off


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _SelectionLog:
    """Which of the watched samples were kept, at which score: what precision, drift and the contact sheets are made from."""

    schema = pa.schema(
        [
            ("step", pa.int32()),
            ("visit", pa.int16()),
            ("sample", pa.int64()),
            ("score", pa.float32()),
            ("ranked_by", pa.float32()),
            ("kept", pa.bool_()),
        ]
    )

    def __init__(self, folder: Path, rank: int, share: float, seed: int) -> None:
        self.folder, self.rank, self.seed = folder, rank, seed
        self.below = int(min(1.0, share) * 2**63)
        self.steps: list[tuple[int, Batch, Selection, Tensor | None]] = []

    def note(self, step: int, batch: Batch, chosen: Selection, cosine: Tensor | None) -> None:
        if self.below:
            light = Batch(batch.sample, batch.slot, batch.visit, batch.valid, {})
            self.steps.append((step, light, chosen, cosine))

    def flush(self, step: int) -> None:
        if not self.steps:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step:08d}-rank{self.rank:04d}.parquet"
        partial = path.with_suffix(".part")
        pq.write_table(pa.concat_tables([self._rows(*entry) for entry in self.steps]), partial, compression="zstd")
        partial.replace(path)
        self.steps.clear()

    def _rows(self, step: int, batch: Batch, chosen: Selection, cosine: Tensor | None) -> pa.Table:
        sample, rows = batch.sample.cpu().numpy(), len(batch)
        kept = np.zeros(rows, bool)
        kept[chosen.rows.cpu().numpy()] = True if chosen.padding is None else ~chosen.padding.cpu().numpy()
        score = (100 * cosine).clamp_min(0).cpu().numpy() if cosine is not None else np.full(rows, np.nan, np.float32)
        ranked = chosen.ranked_by.cpu().numpy() if chosen.ranked_by is not None else np.full(rows, np.nan, np.float32)
        watched = batch.valid.cpu().numpy() & (hash_ids(self.seed, -3, sample) < self.below)
        columns = [
            np.full(rows, step, np.int32),
            batch.visit.cpu().numpy().astype(np.int16),
            sample,
            score.astype(np.float32),
            ranked.astype(np.float32),
            kept,
        ]
        return pa.table([pa.array(column[watched]) for column in columns], schema=self.schema)

    def drop_after(self, step: int) -> None:
        """Of all ranks: there may have been more of them when it was written."""
        for path in self.folder.glob("step-*-rank*.p*"):
            if int(path.name.split("-")[1]) > step or path.suffix == ".part":
                path.unlink()
