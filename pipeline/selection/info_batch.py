"""InfoBatch (arXiv 2303.04947): of the pairs with a loss below the mean only a random part is trained, and counts for all of them."""

import torch
from pydantic import Field

from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """The published method prunes a share of its own and trains what is left; here `rate` fixes what is left, as for every selector."""

    until: int | None = Field(None, ge=0, description="from this step on random rows of weight 1, the paper's annealing; null: to the end")

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "InfoBatch":
        """See SelectorConfig.build."""
        return InfoBatch(self, num_samples, warmup_steps, seed)


class InfoBatch(Selector):
    """With l_i the loss and H = {i: l_i >= mean l}: all of H is kept, and of the others L random ones, so many that k rows are kept.

        w_i = 1 for i in H,   w_i = |L| / (k - |H|) for the kept ones of L,

    so that the expected weighted gradient is that of the whole group. Where H alone is larger than k, k random ones of H are kept and
    nothing stands for L: there the estimate is biased. Two more deviations from the paper: the loss is of the scoring pass and not of
    the last time the pair was trained (that needs no scoring pass), and it acts in every group instead of once a visit.
    """

    def needs(self, step: int) -> frozenset[str]:
        """The loss between warm-up and annealing."""
        return frozenset() if self.in_warmup(step) or self._annealed(step) else frozenset({"loss"})

    def select(self, group: Candidates) -> Selection:
        """`keep` rows by lot, those of a high loss first. Raises ValueError when `group.loss` is None."""
        if self.in_warmup(group.step):
            return self.warmup(group)
        if self._annealed(group.step):
            return self.ranked(group, self.lot(group))
        loss = self.given(group, "loss").float()
        counted = loss == loss if group.valid is None else group.valid & (loss == loss)
        mean = torch.where(counted, loss, 0).sum() / counted.sum().clamp_min(1)
        easy = loss < mean
        chosen = self.ranked(group, self.lot(group) + ~easy)
        many, few = (counted & easy).sum(), (counted & ~easy).sum()
        weight = torch.where(easy, many / (group.keep - few).clamp_min(1), 1.0)[chosen.rows]
        chosen.weights.update(clip=weight, siglip=weight)
        return chosen

    def _annealed(self, step: int) -> bool:
        return self.config.until is not None and step >= self.config.until
