"""InfoBatch (arXiv 2303.04947): of the samples with a loss below the mean a random share is passed over at a visit, the others stand for them."""

from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from pipeline.data.walk import Limits, Rule
from pipeline.hashing import hash_ids
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig
from pipeline.types import EVERY, Batch

_LOT = -7  # keeps this draw apart from those of the order and of data.skip


class Config(SelectorConfig):
    """Prunes before decode; every candidate of a batch is trained, so `rate` is not read. After warm-up nothing has to be scored."""

    prune: float = Field(0.5, gt=0, lt=1, description="share of a lane's samples with a loss below its mean that a visit passes over")
    until: float = Field(
        0.875, gt=0, le=1, description="share of the run's steps after which a visit passes over nothing, the paper's annealing"
    )
    lookahead: int = Field(8, ge=1, description="steps from the look at the losses to the batch; at least workers x prefetch + 1")
    learns: ClassVar[bool] = True

    def passes_over(self) -> Limits:
        """See SelectorConfig.passes_over."""
        return Limits("selector", "prune", self.prune, self.lookahead)

    def rate_at(self, visits: float) -> float:
        """Every candidate is trained."""
        return 1.0

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "InfoBatch":
        """See SelectorConfig.build."""
        return InfoBatch(self, num_samples, warmup_steps, seed)


class InfoBatch(Selector):
    """A sample's score is its loss when it was last trained, so there is no scoring pass. When a lane enters a visit, of its n samples
    with a loss below the lane's mean floor(prune n) are passed over by lot, neither read nor decoded, and each of the m that are left
    has weight n / m; a sample at or above the mean, or never trained yet, has weight 1. So the weights of a visit sum to the lane's
    size, and over the lots the expected weighted sum of gradients is that of all its samples, each with the negatives it meets.

    An objective divides by the rows of a batch and not by their weights: a batch of weights above 1 is a larger step, which is the paper's
    rescaling. It keeps the expected update of a visit, of plain SGD: Adam and engine.clip_grad_norm take most of that scale out again.

    Deviations from the paper: the mean is the lane's own and not of all samples, which would take a collective and tie lanes to each other;
    exactly a share is passed over and not each sample by a coin of its own, so weighted counts are exact and nothing else is lost; the
    look is `lookahead` steps old; and the batch is filled up, so a visit is shorter and the same number of steps holds more visits (give
    fewer `visits` for the paper's saving). A contrastive loss has the batch for negatives, and its easy half is thinned out there too.

    Nothing is passed over at a visit that is entered in warm-up or after `until`; one entered before `until` ends as it began. A lane
    whose visits do not end with a batch enters its next one in warm-up's last step, so that one is whole too; with no warm-up the second
    visit is the first that is not, as in the paper.
    """

    def trains_all(self, step: int) -> bool:
        """At every step: what is left out was not read."""
        return True

    def select(self, group: Candidates) -> Selection:
        """All rows, each with the weight of the samples it stands for; `keep` is not read."""
        chosen = self.warmup(group)
        if group.weight is not None:
            chosen.weights[EVERY] = group.weight
        return chosen

    def learn(self, batch: Batch, loss: Tensor | None) -> None:
        """Notes the losses, in warm-up too. A row that is not valid keeps its old one. Raises ValueError when there are none."""
        if loss is None:
            raise ValueError(f"{self.config.name}: learn() needs the loss of each row, found None")
        self.scores.update(batch.slot, loss.float(), valid=batch.valid & loss.isfinite())

    def rule(self, steps: int) -> Rule:
        """See Selector.rule."""
        return _Easy(self, steps)


class _Easy(Rule):
    """Passes over some of the samples that the selector's table says are easy."""

    weighs = True

    def __init__(self, selector: InfoBatch, steps: int) -> None:
        super().__init__(selector.config.passes_over())
        self.selector, self.last = selector, selector.config.until * steps

    def enter(self, at: slice, sample: np.ndarray, visit: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """See Rule.enter."""
        if self.selector.in_warmup(step) or step >= self.last:
            return np.zeros(len(sample), bool), np.zeros(len(sample), bool)
        table, lot = self.selector.scores, hash_ids(self.selector.seed, _LOT, sample, visit)
        return pruned(table.score[at].cpu().numpy(), table.visits[at].cpu().numpy() > 0, lot, self.limits.share)


def pruned(loss: np.ndarray, known: np.ndarray, lot: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(skip, stand), bool [n] each: of the samples that are `known` (bool [n]) and have a `loss` (float32 [n]) below the known ones' mean,
    the floor(share count) with the smallest `lot` (int64 [n]), and the others."""
    skip = np.zeros(len(loss), bool)
    if not known.any():
        return skip, skip.copy()
    easy = np.flatnonzero(known & (loss < loss[known].mean(dtype=np.float64)))
    order = easy[np.argsort(lot[easy], kind="stable")]
    few = int(share * len(easy))
    skip[order[:few]] = True
    stand = np.zeros_like(skip)
    stand[order[few:]] = True
    return skip, stand
