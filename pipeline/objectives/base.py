"""What an objective is: features and a batch in, this rank's part of a loss out."""

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Component
from pipeline.distributed.comm import Comm
from pipeline.types import Batch, Selection


class ObjectiveConfig(Component):
    """Settings of an objective; `weight` is its factor in the total loss."""

    weight: float = Field(1.0, ge=0)

    def reads(self) -> tuple[str, ...]:
        """The features it looks at."""
        raise TypeError(f"{type(self).__module__}.Config must define reads()")

    def trains(self) -> tuple[str, ...]:
        """Those of them that receive a gradient: all, unless a teacher is only followed."""
        return self.reads()

    def fields(self) -> tuple[str, ...]:
        """The batch fields it looks at itself (labels, "<modality>.present"); most read none."""
        return ()

    def rejected(self) -> bool:
        """Whether it wants the scoring embeddings of the candidates that were not chosen, as `batch.unselected`."""
        return False

    def per_sample(self) -> bool:
        """Whether it tells the loss of each row, as `Objective.per_sample`."""
        return False

    def build(self) -> "Objective":
        """The objective of this config."""
        raise TypeError(f"{type(self).__module__}.Config must define build()")


class Objective(nn.Module):
    """Protocol of an objective.

    Returns size x (this rank's share of the global loss), so that the mean over ranks that DDP and ZeRO take of gradients is the
    gradient of the global loss (`Comm.gather`'s backward is a sum).
    """

    def __init__(self) -> None:
        super().__init__()
        self.telemetry: dict[str, Tensor] = {}  # scalars of the last forward for the record, detached; their mean over ranks is shown
        self.per_sample: Tensor | None = None  # float32 [k], each row's loss in the last forward, not weighted, detached; NaN: it has none
        self.adversary_inputs: dict[str, Tensor] = {}  # detached rows of the last forward that adversary() trains on

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        """A scalar; `batch` holds the k selected rows, `selection` only its weights."""
        raise TypeError(f"{type(self).__name__} must define forward()")

    def adversary(self) -> nn.Module | None:
        """A small replicated module that the engine trains in a step of its own, or None: `adversary()(adversary_inputs)` is its loss."""
        return None

    def after_step(self) -> None:
        """Called once after each optimizer step: state that moves once a step (queues, banks), however often forward was called."""
