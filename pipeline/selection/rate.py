"""A rate that changes over a run: many candidates at first, few once the scores know enough, or the other way round."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, WrapValidator

from pipeline.config import Strict


class RateSchedule(Strict):
    """From `start` to `end` in equal steps over `visits` visits after warm-up, then `end`."""

    start: float = Field(gt=0, le=1, description="share of each selection group that is trained when warm-up is over")
    end: float = Field(gt=0, le=1, description="share that is trained from `visits` visits later on")
    visits: float = Field(gt=0, description="visits of every sample over which the rate goes from one to the other")

    def at(self, visits: float) -> float:
        """The rate that many visits after warm-up."""
        return self.start + (self.end - self.start) * min(1.0, visits / self.visits)


def _number_or_schedule(value: Any, number: Callable[[Any], float]) -> "float | RateSchedule":
    """A union of both would report what is wrong with the one that was not meant."""
    return RateSchedule.model_validate(value) if isinstance(value, dict | RateSchedule) else number(value)


Rate = Annotated[SerializeAsAny[Annotated[float, Field(gt=0, le=1)]], WrapValidator(_number_or_schedule)]
