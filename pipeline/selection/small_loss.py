"""The pairs with the smallest loss (noise-robust selection; baseline of arXiv 2507.12998, Table 1)."""

from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """No settings of its own."""

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "SmallLoss":
        """See SelectorConfig.build."""
        return SmallLoss(self, num_samples, warmup_steps, seed)


class SmallLoss(Selector):
    """Ranks by minus the per-sample loss, its negatives taken from the group."""

    def needs(self, step: int) -> frozenset[str]:
        """The loss once warm-up is over."""
        return frozenset() if self.in_warmup(step) else frozenset({"loss"})

    def select(self, group: Candidates) -> Selection:
        """`keep` rows by `group.loss`, float [g]. Raises ValueError when it is None."""
        return self.warmup(group) if self.in_warmup(group.step) else self.ranked(group, -self.given(group, "loss"))
