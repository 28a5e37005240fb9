"""What a selector is: it sees one selection group at a time and says which rows are trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Component
from pipeline.data.sources import Sources
from pipeline.data.walk import Limits, Rule
from pipeline.hashing import hash_ids
from pipeline.kernels.score import top_k
from pipeline.objectives.base import ObjectiveConfig
from pipeline.selection.rate import Rate, RateSchedule
from pipeline.selection.scores import ScoreTable
from pipeline.types import Batch, Candidates, Selection

__all__ = ["Candidates", "Selection", "Selector", "SelectorConfig"]


class SelectorConfig(Component):
    """Settings that every selector shares, so that methods can be compared after the same warm-up."""

    rate: Rate = Field(
        0.5, description="share of each selection group that is trained; {start, end, visits}: changing over as many visits after warm-up"
    )
    scope: Literal["group", "global"] = Field(
        "group",
        description="whose rows compete: those of a selection group (no collective), or of all ranks; data.groups then only limits world sizes",
    )
    warmup_visits: Annotated[int, Field(ge=0, le=254)] | Literal["auto"] = Field(
        0,
        description="visits of every sample before selection starts; auto: until the spread of the scores has peaked, at most half of the run",
    )
    warmup_data: Literal["all", "subset"] = Field("all", description="train on all rows in warm-up, or on a random subset at the same rate")

    learns: ClassVar[bool] = False  # whether its table holds losses of training, which Selector.learn is told, and no scores

    def passes_over(self) -> Limits | None:
        """What the lanes pass over before it is read, by the rule of its selector; None: nothing."""
        return None

    def fits(self, objectives: Mapping[str, ObjectiveConfig]) -> None:
        """Raises ValueError where it learns from the loss of each row, and not exactly one objective tells it."""
        told = [name for name, objective in objectives.items() if objective.per_sample()]
        if self.learns and len(told) != 1:
            raise ValueError(
                f"selector.name: {self.name} judges a sample by its loss in training, and {'none' if not told else 'more than one'} of the objectives tells "
                f"the loss of each row ({', '.join(told or objectives)}); clip, siglip and cross_entropy do. Use exactly one of these, or another selector"
            )

    def rate_at(self, visits: float) -> float:
        """The rate that many visits after warm-up; math.inf: the last one."""
        return self.rate.at(visits) if isinstance(self.rate, RateSchedule) else self.rate

    def last_warmup_step(self, visit_ends: Callable[[int], int], steps: int) -> int:
        """The step at which warm-up is over, for auto at the latest; `visit_ends`: visits -> step, of a run of `steps`."""
        return steps // 2 if self.warmup_visits == "auto" else visit_ends(self.warmup_visits)

    def check(self, sources: Sources) -> str | None:
        """A digest of what it reads of these samples from other files, and a run goes on with no other; None: it reads nothing.

        Raises ConfigError where those files are of other samples.
        """
        return None

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Selector":
        """The selector of this config. `num_samples` rows of score table; warm-up ends before step `warmup_steps` (0: it is over)."""
        raise TypeError(f"{type(self).__module__}.Config must define build()")


class Selector(ABC):
    """Protocol of a selector; its only state is the score table, so that rows of other ranks can compete with this one's (scope: global).

    A selector that `judges` is told once, at the end of warm-up and again after a resume, what all ranks' histories look like together.
    """

    judges = False

    def __init__(self, config: SelectorConfig, num_samples: int, warmup_steps: int, seed: int) -> None:
        self.config = config
        self.warmup_steps = warmup_steps
        self.seed = seed
        self.scores = ScoreTable(num_samples)

    def needs(self, step: int) -> frozenset[str]:
        """What `select` reads at this step beside ids: a subset of {"cosine", "loss", "image", "text"}; empty saves the scoring pass."""
        return frozenset()

    def trains_all(self, step: int) -> bool:
        """Whether this step trains every candidate (warm-up on all data); decided by the step alone, so equal on every rank."""
        return self.in_warmup(step) and self.config.warmup_data == "all"

    def in_warmup(self, step: int) -> bool:
        """Whether selection has not started yet."""
        return step < self.warmup_steps

    def rule(self, steps: int) -> Rule | None:
        """What the lanes of its samples pass over in a run of `steps`, where `config.passes_over()` says that they do."""
        return None

    def learn(self, batch: Batch, loss: Tensor | None) -> None:
        """After each training step: the rows that were trained, and the loss float32 [k] of each in it, where one objective tells it."""
        return

    def judge(self, skewness: float, kurtosis: float) -> str:
        """Decides by the shape of the distribution of all histories: standardised third and fourth moment, 3 for a Gaussian; equal on
        every rank. The decision in words."""
        raise TypeError(f"{self.config.name}: judges is True, and there is no judge()")

    @abstractmethod
    def select(self, group: Candidates) -> Selection:
        """Chooses rows of one group: all of them while `trains_all(group.step)`, else exactly `group.keep`.

        Invalid rows are chosen only when there are fewer valid ones than that, and for the sake of equal shapes: whoever trains
        multiplies the weights by `valid`, a selector does not.
        """

    def warmup(self, group: Candidates) -> Selection:
        """The choice before selection starts: all rows, or `keep` random ones, as the config says."""
        if self.trains_all(group.step):
            return Selection(torch.arange(group.slot.shape[0], device=group.slot.device))
        return self.ranked(group, self.lot(group))

    def ranked(self, group: Candidates, value: Tensor) -> Selection:
        """The `keep` rows with the largest `value` (float [g]), ties by lot."""
        return Selection(top_k(value, group.keep, self._hash(group), group.valid), ranked_by=value)

    def lot(self, group: Candidates) -> Tensor:
        """Random float32 [g] in [0, 1) by a hash of (seed, sample, step): no generator state, the same on every device and rank."""
        return (self._hash(group) >> 39).float() * 2.0**-24

    def given(self, group: Candidates, name: str) -> Tensor:
        """The group's `cosine` or `loss`. Raises ValueError when the caller left out what `needs` asked for."""
        value = getattr(group, name)
        if value is None:
            raise ValueError(f"{self.config.name}: select() at step {group.step} needs Candidates.{name}, found None")
        return value

    def _hash(self, group: Candidates) -> Tensor:
        return hash_ids(self.seed, group.slot if group.sample is None else group.sample, group.step)

    def state_dict(self) -> dict[str, Any]:
        """The score table's tensors; the rest of a selector is its config."""
        return self.scores.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes tensors as `state_dict` gave them. Raises ValueError when their length is another table's."""
        self.scores.load_state_dict(state)
