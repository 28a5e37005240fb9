"""Lanes that pass samples over before they are read: a rule decides at visit boundaries, the order stays exact.

When a lane enters a visit, a rule says which of its samples are passed over for that visit, by what it knows `lookahead` steps before the
first batch with rows of it. The bits stay as they are for the visit. A batch takes the next samples of every lane whose bit is not set:
it is always full, and a lane that passes over much goes round faster. So steps, batch, learning rate and candidates are those of a run
that reads everything; what grows is the number of visits that fit into them. The order is a function of (seed, step, frozen bits), and
bits and places are saved per lane, so it does not depend on ranks, workers or resumes.
"""

from abc import ABC, abstractmethod
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.lanes import Layout, RankLanes, Rows
from pipeline.distributed.comm import Comm
from pipeline.types import Batch, Selection

RING = 8  # visits whose bits are kept, in the bits of one byte a sample: a lane may be so many ahead of the batch that is trained


class Limits(NamedTuple):
    """What a rule's settings say before a run: it passes over at most a `share` of a lane at a visit, and decides `lookahead` steps ahead."""

    where: str  # the part of the configuration that gives it: "data.skip", "selector"
    setting: str  # the share's name there
    share: float
    lookahead: int

    def fits(self, workers: int, prefetch: int, every: int) -> None:
        """Raises ValueError for a loader that asks for batches too early, and for scoring.every."""
        ahead = workers * prefetch + 1
        if self.lookahead < ahead:
            raise ValueError(
                f"{self.where}.lookahead: {self.lookahead}, but {workers} workers x {prefetch} batches are asked for {ahead} steps ahead; lower "
                f"data.workers or data.prefetch, or set {self.where}.lookahead to {ahead} or more (in a new run: it decides the order)"
            )
        if every > 1:
            raise ValueError(
                f"scoring.every counts visits that are the same on every rank; where {self.where} passes samples over, they are not. Set scoring.every=1"
            )

    def check(self, layout: Layout) -> None:
        """Raises ConfigError where a visit may be too short for a batch, or for the steps between look and batch."""
        least = int((layout.size - (self.share * layout.size).astype(np.int64)).min())
        if least < layout.per_lane or self.lookahead * layout.per_lane > (RING - 1) * least:
            raise ConfigError(
                f"{self.where}: {self.setting} {self.share} leaves {least} samples of the smallest lane for a visit; a batch takes {layout.per_lane} of it, and "
                f"in lookahead {self.lookahead} steps a lane may pass {RING - 1} visits at most. Lower {self.where}.{self.setting}, "
                f"{self.where}.lookahead or data.lanes"
            )


class Rule(ABC):
    """Says what a lane passes over. What it knows of the samples lies with the rank that reads their lane, and is a function of that lane
    alone: then the order is the same on any number of ranks."""

    weighs = False  # whether samples that are kept stand for those passed over

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    @abstractmethod
    def enter(self, at: slice, sample: np.ndarray, visit: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(skip, stand), bool [n] each, for a lane whose samples (ids int64 [n]) are the rows `at` of this rank's tables: which of them a visit
        passes over whose first batch is that of `step`, and which of the others stand for them, in equal parts. May wait for the device."""

    def note(self, batch: Batch, selection: Selection) -> None:
        """Takes notice of a choice that the selector made after warm-up."""
        return

    def columns(self) -> dict[str, Tensor]:
        """Its own tensors [N], by name, that are saved with the walk's."""
        return {}


class Walk:
    """How far each lane of a rank has come, for the batches that are trained and for those that are already asked for.

    `bits` uint8 [N], bit v % 8 for visit v, are the state beside three numbers a lane, and where the rule weighs, as many `stands`.
    Memory is that of RankLanes, these and the rule's. To enter a visit waits for the device, once a visit and lane.
    """

    def __init__(self, lanes: RankLanes, rule: Rule, device: torch.device) -> None:
        """Raises ConfigError as Limits.check does."""
        self.lanes, self.rule, self.device = lanes, rule, device
        self.lookahead = rule.limits.lookahead
        rule.limits.check(lanes.layout)
        self.bits = np.zeros(lanes.num_samples, np.uint8)
        self.stands = np.zeros(lanes.num_samples, np.uint8) if rule.weighs else None
        self._live = np.zeros((2, lanes.num_samples), np.int64)  # the places that a visit, by its parity, reads, in their order
        self._count = np.zeros((2, len(lanes.lanes)), np.int64)
        self._weight = np.ones((2, len(lanes.lanes)), np.float32)  # of a sample that stands for others
        none = np.zeros(len(lanes.lanes), np.int64)
        self._visit, self._cursor, self._entered = none, none, none - 1
        self._planned: deque[Rows] = deque()
        self._places: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def begin(self, step: int) -> int:
        """Plans `lookahead` steps from `step`, where the lanes are; how many samples were passed by until here, read or skipped."""
        self._planned.clear()
        self._places = deque([(self._visit, self._cursor)])
        skipped = sum(self._enter(i, visit, step) for i, visit in enumerate(self._visit.tolist()))
        passed = int((self._visit * self.lanes.size + self._cursor).sum()) + skipped
        for ahead in range(self.lookahead):
            self._plan(step + ahead)
        return passed

    def next(self) -> Rows:
        """The rows of the next step to be asked for. Never more than `lookahead` steps ahead of `advance`."""
        return self._planned.popleft()

    def advance(self, step: int) -> None:
        """`step` is about to be trained, all before it are: the rule looks at what it knows now."""
        self._places.popleft()
        self._plan(step + self.lookahead)

    def _plan(self, step: int) -> None:
        """The next samples of every lane that are not skipped, those of `step`."""
        start, every = self.lanes.start[:-1, None], np.arange(len(self.lanes.lanes))
        index = self._cursor[:, None] + np.arange(self.lanes.layout.per_lane)
        live = self._count[self._visit % 2, every]
        skipped = sum(self._enter(i, int(self._visit[i]) + 1, step) for i in np.flatnonzero(index[:, -1] >= live))
        over = index >= live[:, None]
        visit = self._visit[:, None] + over
        slot = (start + self._live[visit % 2, start + index - over * live[:, None]]).ravel()
        self._visit, self._cursor = visit[:, -1], index[:, -1] + 1 - over[:, -1] * live
        weight = None
        if self.stands is not None:
            weight = np.where(self.stands[slot] >> visit.ravel() % RING & 1, self._weight[visit % 2, every[:, None]].ravel(), np.float32(1))
        self._planned.append(Rows(self.lanes.ids[slot], slot, visit.ravel(), skipped, weight))
        self._places.append((self._visit, self._cursor))

    def _enter(self, i: int, visit: int, step: int) -> int:
        """Lists what lane i reads at a visit, whose bits are made now unless they were frozen before; how many it skips."""
        at, bit = slice(self.lanes.start[i], self.lanes.start[i + 1]), np.uint8(1 << visit % RING)
        if visit > self._entered[i]:
            skip, stand = self.rule.enter(at, self.lanes.ids[at], visit, step)
            self.bits[at] = (self.bits[at] & ~bit) | skip * bit
            if self.stands is not None:
                self.stands[at] = (self.stands[at] & ~bit) | stand * bit
            self._entered[i] = visit
        order = self.lanes.visit_order(i, visit)
        live = order[self.bits[at][order] & bit == 0]
        self._live[visit % 2, at.start : at.start + len(live)] = live
        self._count[visit % 2, i] = len(live)
        if self.stands is not None:
            self._weight[visit % 2, i] = 1 + (len(order) - len(live)) / max(1, np.count_nonzero(self.stands[at] & bit))
        return len(order) - len(live)

    def columns(self) -> dict[str, Tensor]:
        """What is saved of each sample, beside its scores."""
        stands = {} if self.stands is None else {"stands": torch.from_numpy(self.stands)}
        return self.rule.columns() | {"skip": torch.from_numpy(self.bits)} | stands

    def state(self, comm: Comm) -> list[list[int]]:
        """Of every lane of all ranks: visit and place of the step to be trained next, and the last visit whose bits are frozen. Collective."""
        mine = torch.from_numpy(np.stack([*self._places[0], self._entered], 1))
        return comm.gather(mine.to(self.device)).tolist()

    def load(self, state: list[list[int]], columns: dict[str, Any]) -> None:
        """Goes on where `state` and `columns` (of this rank's lanes) were saved, by any number of ranks."""
        self._visit, self._cursor, self._entered = np.array(state, np.int64)[self.lanes.lanes].T.copy()
        for name, own in self.columns().items():
            own.copy_(columns[name])
