"""Skip before decode: a sample that was rejected again and again is neither read nor decoded for some visits of its lane."""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Strict
from pipeline.data.lanes import RankLanes
from pipeline.data.walk import Limits, Rule
from pipeline.hashing import hash_ids
from pipeline.types import Batch, Selection

_DUE, _LOT = -5, -6  # keep these draws apart from those of the order


class SkipConfig(Strict):
    """Which samples are passed over, and how long at most. Rejections count after warm-up; those of a selector that draws lots say
    nothing of a sample."""

    share: float = Field(0.8, gt=0, lt=1, description="of a lane's samples at most this share is passed over at a visit")
    after_visits: int = Field(2, ge=1, le=255, description="a sample is passed over when it was rejected at so many of its visits in a row")
    rescore_visits: int = Field(
        8, ge=2, description="the floor: in so many visits of its lane every sample is read and scored at least once"
    )
    lookahead: int = Field(8, ge=1, description="steps from the look at the rejections to the batch; at least workers x prefetch + 1")

    @property
    def limits(self) -> Limits:
        """See Limits."""
        return Limits("data.skip", "share", self.share, self.lookahead)

    def rule(self, lanes: RankLanes, device: torch.device) -> "Rejections":
        """The rule for a rank's lanes; its counters lie on `device`."""
        return Rejections(self, lanes.layout.seed, lanes.num_samples, device)

    def beside(self, selector: str, prunes: bool) -> None:
        """Raises ValueError for a selector, by its name, that cannot be used with it; `prunes`: it passes samples over itself."""
        if prunes:
            raise ValueError(
                f"selector.name: {selector} passes samples over by a rule of its own and rejects none of those it reads. Set data.skip to null, or "
                "use a selector that rejects"
            )
        if selector == "blend":
            raise ValueError(
                "selector.name: blend ranks by the mean score of the visits at which a pair was scored, and a pair that data.skip passes over misses "
                "late visits, at which all scores are higher: its mean falls behind, and one rejection brings on the next. Set data.skip to null, or use "
                "a selector that compares scores of one visit"
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


class Rejections(Rule):
    """The rule of data.skip. `rejected` uint8 [N], on the device: at how many of its visits in a row each sample was rejected."""

    def __init__(self, config: SkipConfig, seed: int, num_samples: int, device: torch.device) -> None:
        super().__init__(config.limits)
        self.config, self.seed = config, seed
        self.rejected = torch.zeros(num_samples, dtype=torch.uint8, device=device)

    def enter(self, at: slice, sample: np.ndarray, visit: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """See Rule.enter; nothing stands for a sample that is rejected."""
        skip = passed_over(self.config, self.seed, sample, self.rejected[at].cpu().numpy(), visit)
        return skip, np.zeros_like(skip)

    def note(self, batch: Batch, selection: Selection) -> None:
        """Counts who was rejected; a row that could not be decoded is. A sample that stands there twice counts as chosen if one is."""
        chosen = torch.zeros_like(batch.valid)
        chosen[selection.rows] = True if selection.padding is None else ~selection.padding
        before = self.rejected[batch.slot]
        after = torch.where(chosen & batch.valid, 0, before + (before < 255).to(torch.uint8))
        self.rejected.scatter_reduce_(0, batch.slot, after, "amin", include_self=False)

    def columns(self) -> dict[str, Tensor]:
        """The counters."""
        return {"rejected": self.rejected}
