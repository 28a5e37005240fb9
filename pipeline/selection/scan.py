"""A SCAN-like rule: neither the pairs that match best nor those that match worst (after arXiv 2411.09126; the simplified baseline of
arXiv 2507.12998, which drops both ends of the present scores and draws from the rest)."""

import torch
from pydantic import Field

from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """Both shares are of a selection group."""

    drop_lowest: float = Field(0.15, ge=0, lt=1, description="share with the lowest cosine: taken for mismatched")
    drop_highest: float = Field(0.15, ge=0, lt=1, description="share with the highest cosine: taken for learned")

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Scan":
        """See SelectorConfig.build."""
        return Scan(self, num_samples, warmup_steps, seed)


class Scan(Selector):
    """Random rows among those with q_low <= cos_i <= q_high, the group's quantiles. Where more are kept than lie between, the dropped ones
    fill up by lot. No state; the published method also alternates phases of pruning and restoring, which this one leaves out."""

    def needs(self, step: int) -> frozenset[str]:
        """The cosine once warm-up is over."""
        return frozenset() if self.in_warmup(step) else frozenset({"cosine"})

    def select(self, group: Candidates) -> Selection:
        """`keep` rows. Raises ValueError when `group.cosine` is None."""
        if self.in_warmup(group.step):
            return self.warmup(group)
        cosine = self.given(group, "cosine").float()
        counted = cosine if group.valid is None else cosine.masked_fill(~group.valid, torch.nan)
        ends = torch.tensor([self.config.drop_lowest, 1 - self.config.drop_highest], device=cosine.device)
        low, high = counted.nanquantile(ends)
        return self.ranked(group, self.lot(group) + ((cosine >= low) & (cosine <= high)))
