"""Skip before decode: a sample that was rejected again and again is neither read nor decoded for some visits of its lane.

When a lane enters a visit, each of its samples gets a bit, made of how often it was rejected in a row as that stood `lookahead` steps
before the first batch with rows of that visit. The bits stay as they are for the visit. A batch takes the next samples of every lane whose bit is
not set: it is always full, and a lane that skips much goes round faster. So steps, batch, learning rate and rows trained are those of a
run that skips nothing; what grows is the number of visits that fit into them. The order is a function of (seed, step, frozen bits), and
bits and places are saved per lane, so it does not depend on ranks, workers or resumes.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import ConfigError, Strict
from pipeline.data.lanes import Layout, RankLanes, Rows
from pipeline.distributed.comm import Comm
from pipeline.hashing import hash_ids
from pipeline.types import Batch, Selection

RING = 8  # visits whose bits are kept, in the bits of one byte a sample: a lane may be so many ahead of the batch that is trained
_DUE, _LOT = -5, -6  # keep these draws apart from those of the order


class SkipConfig(Strict):
    """Which samples are passed over, and how long at most. Rejections count after warm-up; those of a selector that draws lots say
    nothing of a sample, and info_batch's weights do not know of it."""

    share: float = Field(0.8, gt=0, lt=1, description="of a lane's samples at most this share is passed over at a visit")
    after_visits: int = Field(2, ge=1, le=255, description="a sample is passed over when it was rejected at so many of its visits in a row")
    rescore_visits: int = Field(
        8, ge=2, description="the floor: in so many visits of its lane every sample is read and scored at least once"
    )
    lookahead: int = Field(8, ge=1, description="steps from the look at the rejections to the batch; at least workers x prefetch + 1")

    def beside(self, selector: str, every: int) -> None:
        """Raises ValueError for what cannot be used with it: `selector` by its name, `every` as of scoring.every."""
        if every > 1:
            raise ValueError("scoring.every counts visits that are the same on every rank, with data.skip they are not; use one of them")
        if selector == "blend":
            raise ValueError(
                "selector.name: blend ranks by the mean score of the visits at which a pair was scored, and a pair that data.skip passes over misses "
                "late visits, at which all scores are higher: its mean falls behind, and one rejection brings on the next. Set data.skip to null, or use "
                "a selector that compares scores of one visit"
            )

    def check(self, layout: Layout) -> None:
        """Raises ConfigError where a visit may be too short for a batch, or for the steps between look and batch."""
        least = int((layout.size - (self.share * layout.size).astype(np.int64)).min())
        if least < layout.per_lane or self.lookahead * layout.per_lane > (RING - 1) * least:
            raise ConfigError(
                f"data.skip: share {self.share} leaves {least} samples of the smallest lane for a visit; a batch takes {layout.per_lane} of it, and in "
                f"lookahead {self.lookahead} steps a lane may pass {RING - 1} visits at most. Lower data.skip.share, data.skip.lookahead or data.lanes"
            )


def passed_over(config: SkipConfig, seed: int, sample: np.ndarray, rejected: np.ndarray, visit: int) -> np.ndarray:
    """bool [n]: which samples of one lane (ids int64 [n]) a visit skips, `rejected` uint8 [n] being how often in a row each was rejected.

    Where `share` forbids to skip them all, those rejected most often go first, ties by lot.
    """
    due = (hash_ids(seed, _DUE, sample) % config.rescore_visits + visit) % config.rescore_visits == 0
    skip = (rejected >= config.after_visits) & ~due
    most = int(config.share * len(sample))
    if np.count_nonzero(skip) > most:
        worst = np.lexsort((hash_ids(seed, _LOT, sample, visit), -np.where(skip, rejected, 0).astype(np.int64)))
        skip[worst[most:]] = False
    return skip


class Walk:
    """How far each lane of a rank has come, for the batches that are trained and for those that are already asked for.

    `rejected` uint8 [N] (on the device) and `bits` uint8 [N], bit v % 8 for visit v, are the state beside three numbers a lane. Memory is
    that of RankLanes and these two bytes a sample. To enter a visit waits for the device, once a visit and lane.
    """

    def __init__(self, lanes: RankLanes, config: SkipConfig, device: torch.device) -> None:
        """Raises ConfigError as SkipConfig.check does."""
        self.lanes, self.config = lanes, config
        config.check(lanes.layout)
        self.rejected = torch.zeros(lanes.num_samples, dtype=torch.uint8, device=device)
        self.bits = np.zeros(lanes.num_samples, np.uint8)
        self._live = np.zeros((2, lanes.num_samples), np.int64)  # the places that a visit, by its parity, reads, in their order
        self._count = np.zeros((2, len(lanes.lanes)), np.int64)
        none = np.zeros(len(lanes.lanes), np.int64)
        self._visit, self._cursor, self._entered = none, none, none - 1
        self._planned: deque[Rows] = deque()
        self._places: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def begin(self) -> int:
        """Plans `lookahead` steps from where the lanes are; how many samples were passed by until here, read or skipped."""
        self._planned.clear()
        self._places = deque([(self._visit, self._cursor)])
        skipped = sum(self._enter(i, visit) for i, visit in enumerate(self._visit.tolist()))
        passed = int((self._visit * self.lanes.size + self._cursor).sum()) + skipped
        for _ in range(self.config.lookahead):
            self._plan()
        return passed

    def next(self) -> Rows:
        """The rows of the next step to be asked for. Never more than `lookahead` steps ahead of `advance`."""
        return self._planned.popleft()

    def advance(self) -> None:
        """One more step is about to be trained, all before it are: looks at the rejections as they are now."""
        self._places.popleft()
        self._plan()

    def note(self, batch: Batch, selection: Selection) -> None:
        """Counts who was rejected; a row that could not be decoded is. A sample that stands there twice counts as chosen if one is."""
        chosen = torch.zeros_like(batch.valid)
        chosen[selection.rows] = True if selection.padding is None else ~selection.padding
        before = self.rejected[batch.slot]
        after = torch.where(chosen & batch.valid, 0, before + (before < 255).to(torch.uint8))
        self.rejected.scatter_reduce_(0, batch.slot, after, "amin", include_self=False)

    def _plan(self) -> None:
        """The next samples of every lane that are not skipped, one step's."""
        start, every = self.lanes.start[:-1, None], np.arange(len(self.lanes.lanes))
        index = self._cursor[:, None] + np.arange(self.lanes.layout.per_lane)
        live = self._count[self._visit % 2, every]
        skipped = sum(self._enter(i, int(self._visit[i]) + 1) for i in np.flatnonzero(index[:, -1] >= live))
        over = index >= live[:, None]
        visit = self._visit[:, None] + over
        slot = (start + self._live[visit % 2, start + index - over * live[:, None]]).ravel()
        self._visit, self._cursor = visit[:, -1], index[:, -1] + 1 - over[:, -1] * live
        self._planned.append(Rows(self.lanes.ids[slot], slot, visit.ravel(), skipped))
        self._places.append((self._visit, self._cursor))

    def _enter(self, i: int, visit: int) -> int:
        """Lists what lane i reads at a visit, whose bits are made now unless they were frozen before; how many it skips."""
        at, bit = slice(self.lanes.start[i], self.lanes.start[i + 1]), np.uint8(1 << visit % RING)
        if visit > self._entered[i]:
            skip = passed_over(self.config, self.lanes.layout.seed, self.lanes.ids[at], self.rejected[at].cpu().numpy(), visit)
            self.bits[at] = (self.bits[at] & ~bit) | skip * bit
            self._entered[i] = visit
        order = self.lanes.visit_order(i, visit)
        live = order[self.bits[at][order] & bit == 0]
        self._live[visit % 2, at.start : at.start + len(live)] = live
        self._count[visit % 2, i] = len(live)
        return len(order) - len(live)

    def columns(self) -> dict[str, Tensor]:
        """What is saved of each sample, beside its scores."""
        return {"rejected": self.rejected, "skip": torch.from_numpy(self.bits)}

    def state(self, comm: Comm) -> list[list[int]]:
        """Of every lane of all ranks: visit and place of the step to be trained next, and the last visit whose bits are frozen. Collective."""
        mine = torch.from_numpy(np.stack([*self._places[0], self._entered], 1))
        return comm.gather(mine.to(self.rejected.device)).tolist()

    def load(self, state: list[list[int]], columns: dict[str, Any]) -> None:
        """Goes on where `state` and `columns` (of this rank's lanes) were saved, by any number of ranks."""
        self._visit, self._cursor, self._entered = np.array(state, np.int64)[self.lanes.lanes].T.copy()
        self.rejected.copy_(columns["rejected"])
        self.bits[:] = columns["skip"].numpy()
