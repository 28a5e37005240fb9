"""The symmetric InfoNCE loss of CLIP (Radford et al. 2021) over the rows of all ranks."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.distributed.comm import Comm
from pipeline.kernels import clip_loss
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection


class Config(ObjectiveConfig):
    """`impl` picks the kernel: reference, blocked, triton, or auto."""

    impl: str = "auto"
    negatives: Literal["selected", "all"] = Field(
        "selected",
        description="all: candidates that were scored but not chosen are negatives too, by their scoring embeddings, without gradient",
    )

    def reads(self) -> tuple[str, ...]:
        return ("image", "text", "scale")

    def rejected(self) -> bool:
        return self.negatives == "all"

    def per_sample(self) -> bool:
        return True

    def build(self) -> "Clip":
        return Clip(self.impl)


class Clip(Objective):
    """Each rank pairs its own rows with the columns of all; nothing of size (all rows)^2 exists on any of them.

    Rejected rows (`batch.unselected`) are further columns: negatives of every chosen row on every rank, rows of the loss nowhere.
    """

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        image, text, rest = features["image"], features["text"], batch.unselected
        weights = selection.weight("clip", batch.valid)
        if rest is None:
            found = clip_loss(image, text, features["scale"], weights=weights, comm=comm, impl=self.impl)
            self.per_sample = found.per_sample
            return found.loss

        def columns(own: Tensor, others: Tensor) -> Tensor:
            return torch.cat([comm.gather(own), comm.gather(others.to(own.dtype))])

        sides = columns(image, rest["image"]), columns(text, rest["text"])
        weights = columns(weights, rest["valid"])
        found = clip_loss(image, text, features["scale"], columns=sides, offset=comm.rank * len(image), weights=weights, impl=self.impl)
        self.per_sample = found.per_sample
        return found.loss
