"""Differential-informed sample selection (DISSect, arXiv 2507.12998): train the pairs that the model is forgetting."""

from typing import Any, Literal

from pydantic import Field

from pipeline import kernels
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """`warmup`: the history is the score at a sample's last warm-up visit, then frozen. `momentum`: a moving average over all visits."""

    variant: Literal["warmup", "momentum"] = Field("warmup", description="what the current score is compared with")
    momentum: float = Field(0.9, ge=0, lt=1, description="weight of the old history; variant momentum, and history ema")
    history: Literal["last", "mean", "ema"] = Field(
        "last", description="last warm-up visit; the mean over them, or a moving average (both deviate from the paper)"
    )

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Dissect":
        """See SelectorConfig.build."""
        return Dissect(self, num_samples, warmup_steps, seed)


class Dissect(Selector):
    """Ranks by d = h - s, history minus current score s = max(100 cos, 0): a clean pair is learned first and sinks, a noisy one rises.

    Every valid row of a group updates the table, chosen or not, after the choice. Variant `warmup` writes until the sample's own
    `warmup_visits` are over; a sample first seen after warm-up (or with `warmup_steps` 0) gets its history then, once. A sample
    without history is neutral: it takes the median differential of its group, so a first epoch is a random choice by lot and never
    the lowest similarities, as it would be with a history of 0.
    """

    def needs(self, step: int) -> frozenset[str]:
        """The cosine, in warm-up too: the history is made of it."""
        return frozenset({"cosine"})

    def select(self, group: Candidates) -> Selection:
        """Scores the group and chooses `keep` rows by differential. Raises ValueError when `group.cosine` is None."""
        warmup = self.in_warmup(group.step)
        scored = kernels.score(
            self.given(group, "cosine"),
            slot=group.slot,
            history=self.scores.score,
            visits=self.scores.visits,
            keep=None if warmup else group.keep,
            sample=group.sample,
            valid=group.valid,
            seed=self.seed,
            **self._rule(warmup),
        )
        return self.warmup(group) if warmup else Selection(scored.rows, ranked_by=scored.differential)

    def _rule(self, warmup: bool) -> dict[str, Any]:
        if self.config.variant == "momentum":
            return {"momentum": self.config.momentum}
        average = {"mean": {"mean": True}, "ema": {"momentum": self.config.momentum}}.get(self.config.history, {})
        visits = self.config.warmup_visits
        writing = None if visits == "auto" else max(visits, 1)  # auto: as long as warm-up lasts
        return {"freeze": writing if warmup else 1} | average
