"""Random rows at the same rate: what every other selector is measured against."""

from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """No settings of its own."""

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Random":
        """See SelectorConfig.build."""
        return Random(self, num_samples, warmup_steps, seed)


class Random(Selector):
    """Reads no scores and keeps no generator state: its rows are a hash of (seed, sample, step)."""

    def select(self, group: Candidates) -> Selection:
        """`keep` random rows, in warm-up as `warmup_data` says."""
        return self.warmup(group) if self.in_warmup(group.step) else self.ranked(group, self.lot(group))
