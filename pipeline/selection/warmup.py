"""When to start selecting: `selector.warmup_visits: auto` watches the spread of the scores and ends warm-up when it has peaked. And
whether there is anything to select by, for a selector that judges so."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.comm import Comm
from pipeline.selection.base import Selector
from pipeline.types import Batch

FILE = "warmup.json"


class Watch:
    """Ends the warm-up of `selector` after the visit at which the standard deviation of the scores is past its peak.

    With a share p of noisy pairs, a gap D between the mean scores of clean and noisy ones and a variance v inside each kind, all scores
    together have the variance v + p (1 - p) D^2. Who is noisy is not known, but this number is; while clean pairs are learned first D
    and v grow, and when the noisy ones are memorised as well both shrink, all scores nearing the same high value. So the spread peaks where
    the gap does, and neither p nor D has to be estimated. (Where nothing is noisy it peaks too: then it says when easy and hard pairs
    were furthest apart.) A history frozen there knows most; one frozen too early even prefers noise (arXiv 2507.12998 leaves W to the user).

    The spread counts as past its peak when it is below the largest one by more than its standard error, max / sqrt(2 n), or below it twice
    in a row: one or two visits after the peak. At the latest warm-up ends with half of the run. Sums of counts, scores and powers of
    all ranks decide, once a visit: one collective of eight numbers, one wait for the device. Only those and the decisions are saved.

    A selector that `judges` is watched in any warm-up: at its end it is told the skewness and kurtosis of the histories of the last visit.
    """

    def __init__(self, selector: Selector, comm: Comm, visit_ends: Callable[[int], int], folder: Path) -> None:
        """`visit_ends`: visits -> the step at which all lanes have finished them. Where warm-up is a number of visits there is nothing to do."""
        self.selector, self.comm, self.visit_ends, self.folder = selector, comm, visit_ends, folder
        self.auto = selector.config.warmup_visits == "auto"
        self.active = (self.auto or selector.judges) and selector.warmup_steps > 0
        self.latest = selector.warmup_steps  # of auto: half of the run
        self.spread: list[float] = []
        self.shape: tuple[float, float] | None = None  # skewness and kurtosis, once they are known
        self._sums: Tensor | None = None

    def needs(self, step: int) -> frozenset[str]:
        """The cosine as long as nothing is decided, also for a selector that does not read it in warm-up."""
        return frozenset({"cosine"}) if self.active else frozenset()

    def step(self, cosine: Tensor | None, batch: Batch, done: int) -> None:
        """Notes the scores of one step, float32 [b], and the table's rows; `done` steps are finished with it. Collective at the end of a visit."""
        if not self.active or cosine is None:
            return
        counted = batch.valid & (cosine == cosine)
        score = torch.where(counted, 100 * cosine.clamp_min(0), 0).double()
        history = torch.where(counted, self.selector.scores.score[batch.slot], 0).double()
        powers = [counted.double(), score, score.square(), *(history**power for power in range(1, 5))]
        sums = torch.stack([power.sum() for power in powers])
        self._sums = sums if self._sums is None else self._sums + sums
        if done < self.visit_ends(len(self.spread) + 1) and done < self.latest:
            return
        count, total, squares, *powers = self.comm.sum(self._sums).tolist()
        self._sums = None
        self.spread.append(math.sqrt(max(squares / max(count, 1) - (total / max(count, 1)) ** 2, 0.0)))
        if (self.auto and past_peak(self.spread, count)) or done >= self.latest:
            self.active, self.selector.warmup_steps = False, done
            self.shape = shape(count, powers)
            self._tell(self.selector.judge(*self.shape) if self.selector.judges else "")

    def _tell(self, judged: str) -> None:
        if self.comm.rank == 0:
            told = {"visits": len(self.spread), "steps": self.selector.warmup_steps, "spread": self.spread}
            told |= {"skewness": self.shape[0], "kurtosis": self.shape[1], "judged": judged}
            (self.folder / FILE).write_text(json.dumps(told), encoding="utf-8")
            print(
                f"{self.folder}: warm-up ends after {told['visits']} visits, at step {told['steps']}; spread of the scores by visit: "
                + ", ".join(f"{value:.1f}" for value in self.spread)
                + (f"; {judged}" if judged else ""),
                flush=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """For run.json: numbers only, equal on every rank. The sums of a visit that is not over are summed first. Collective while active."""
        sums = self.comm.sum(self._sums).tolist() if self.active and self._sums is not None else None
        return {"active": self.active, "spread": self.spread, "steps": self.selector.warmup_steps, "sums": sums, "shape": self.shape}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on where `state_dict` was made, on any number of ranks."""
        self.active, self.spread, self.selector.warmup_steps = state["active"], list(state["spread"]), state["steps"]
        if (known := state.get("shape")) is not None:
            self.shape = tuple(known)
            if self.selector.judges:
                self.selector.judge(*known)
        sums = state["sums"]
        self._sums = torch.tensor(sums, dtype=torch.float64, device=device) if sums and self.comm.rank == 0 else None
        if self.active and self.comm.rank == 0:
            (self.folder / FILE).unlink(missing_ok=True)  # of steps that are about to be run again


def shape(count: float, sums: list[float]) -> tuple[float, float]:
    """Skewness and kurtosis (3 for a Gaussian) of `count` values from the sums of their first four powers; those of a Gaussian where
    all values are the same."""
    m1, m2, m3, m4 = (value / max(count, 1) for value in sums)
    variance = m2 - m1**2
    if variance <= 1e-9 * m1**2:
        return 0.0, 3.0
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return third / variance**1.5, fourth / variance**2


def past_peak(spread: list[float], count: float) -> bool:
    """Whether the last of the spreads lies after their maximum, judged by the standard error of a deviation of `count` scores."""
    if len(spread) < 2:
        return False
    best = max(spread[:-1])
    clearly = spread[-1] < best * (1 - 1 / math.sqrt(2 * max(count, 1)))
    twice = len(spread) > 2 and max(spread[-2:]) < max(spread[:-2])
    return clearly or twice


def visits_of(folder: Path, configured: int | str | None) -> int | None:
    """Visits of warm-up of a run: as configured, or as its Watch decided; None where it has not decided yet, so that all was warm-up."""
    if configured != "auto":
        return configured or 0
    path = folder / FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["visits"]) if path.is_file() else None
