"""Distillation of image-text affinities between two CLIP models: open_clip's DistillClipLoss, CLIP-KD's CRD, TinyCLIP's affinity mimicking.

All three hold the student's softmax over the batch's texts (and images) to the teacher's, and differ by the teacher's entropy alone,
which has no gradient: here it is taken off, so 0 is the best value.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives._rows import Used, feature, weight_of
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection


class Config(ObjectiveConfig):
    """Unit rows of any width: only products within a model are compared."""

    image: str = "image"
    text: str = "text"
    scale: str = "scale"
    teacher: str = Field("teacher", description="the tower or frozen teacher whose features of the same names are the target")
    temperature: float = Field(1.0, gt=0, description="divides both models' logits")
    present: str | None = Field(None, description="bool field of rows that the teacher has seen")

    def reads(self) -> tuple[str, ...]:
        own = (self.image, self.text, self.scale)
        return (*own, *(f"{self.teacher}.{name}" for name in own))

    def trains(self) -> tuple[str, ...]:
        return (self.image, self.text, self.scale)

    def fields(self) -> tuple[str, ...]:
        return (self.present,) if self.present else ()

    def build(self) -> "Affinity":
        return Affinity(self)


class Affinity(Objective):
    """Stores 4 b x N logits, b rows of a rank and N of all; the teacher receives no gradient."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of("affinity", batch, selection, c.present, c.teacher)
        if len(batch) * comm.size < 2:
            raise ConfigError("affinity: needs 2 rows or more, found 1; train larger batches")
        used = comm.gather(weight > 0)
        here = comm.rank * len(batch) + torch.arange(len(batch), device=weight.device)
        allowed = used[None] | (here[:, None] == torch.arange(len(used), device=weight.device)[None])
        with torch.autocast(weight.device.type, enabled=False):
            student, teacher = (self._log_softmaxes(features, batch, prefix, weight, allowed, comm) for prefix in ("", f"{c.teacher}."))
            each = sum(_kl(wanted.detach(), given, allowed) for given, wanted in zip(student, teacher)) / 2
        self.telemetry = {"agreement": Used.of(weight, comm).mean((student[0].argmax(1) == teacher[0].argmax(1)).float())}
        return (each * weight).mean()

    def _log_softmaxes(
        self, features: dict[str, Tensor], batch: Batch, prefix: str, weight: Tensor, allowed: Tensor, comm: Comm
    ) -> tuple[Tensor, Tensor]:
        """[b, N] of each local image over all texts, and of each local text over all images."""
        c = self.config
        image, text = (feature("affinity", features, batch, f"{prefix}{name}", weight) for name in (c.image, c.text))
        scale = feature("affinity", features, batch, f"{prefix}{c.scale}").flatten()[0] / c.temperature  # a frozen teacher's has rows
        lowest = torch.finfo(image.dtype).min
        products = (image @ comm.gather(text).T, text @ comm.gather(image).T)
        return tuple(F.log_softmax((scale * product).masked_fill(~allowed, lowest), 1) for product in products)


def _kl(wanted: Tensor, given: Tensor, allowed: Tensor) -> Tensor:
    """[b]: KL(wanted || given) over the columns that count."""
    return F.kl_div(given, wanted, reduction="none", log_target=True).masked_fill(~allowed, 0).sum(1)
