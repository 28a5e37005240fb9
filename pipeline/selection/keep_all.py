"""No selection: every candidate is trained at every step."""

from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """No settings of its own; `rate` is not read."""

    def rate_at(self, visits: float) -> float:
        """Every candidate is trained."""
        return 1.0

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "KeepAll":
        """See SelectorConfig.build."""
        return KeepAll(self, num_samples, warmup_steps, seed)


class KeepAll(Selector):
    """The full-data baseline."""

    def trains_all(self, step: int) -> bool:
        """At every step."""
        return True

    def select(self, group: Candidates) -> Selection:
        """All rows; `keep` is not read."""
        return self.warmup(group)
