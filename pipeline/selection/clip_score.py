"""The pairs that the present model finds most similar (online CLIPScore; baseline of arXiv 2507.12998, Table 1)."""

from pipeline import kernels
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """No settings of its own."""

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "ClipScore":
        """See SelectorConfig.build."""
        return ClipScore(self, num_samples, warmup_steps, seed)


class ClipScore(Selector):
    """Ranks by the current cosine. The score table holds each sample's latest score, for the record; the choice does not read it."""

    def needs(self, step: int) -> frozenset[str]:
        """The cosine once warm-up is over."""
        return frozenset() if self.in_warmup(step) else frozenset({"cosine"})

    def select(self, group: Candidates) -> Selection:
        """`keep` rows by `group.cosine`, float [g]. Raises ValueError when it is None."""
        if self.in_warmup(group.step):
            return self.warmup(group)
        cosine = self.given(group, "cosine")
        kernels.score(cosine, slot=group.slot, history=self.scores.score, visits=self.scores.visits, valid=group.valid)
        return self.ranked(group, cosine)
