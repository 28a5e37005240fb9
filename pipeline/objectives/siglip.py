"""SigLIP's pairwise sigmoid loss (Zhai et al. 2023) over the rows of all ranks, with a bias of its own."""

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.distributed.comm import Comm
from pipeline.kernels import siglip_loss
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection


class Config(ObjectiveConfig):
    """`impl` picks the kernel: reference, blocked, triton, or auto. The paper starts with a bias of -10 and a logit scale of 10."""

    impl: str = "auto"
    bias: float = Field(-10.0, description="where the learned bias starts; most pairs are negative, so it begins far below 0")

    def reads(self) -> tuple[str, ...]:
        return ("image", "text", "scale")

    def per_sample(self) -> bool:
        return True

    def build(self) -> "Siglip":
        return Siglip(self.impl, self.bias)


class Siglip(Objective):
    """Each rank pairs its own images with the texts of all."""

    def __init__(self, impl: str, bias: float) -> None:
        super().__init__()
        self.impl = impl
        self.bias = nn.Parameter(torch.full((1,), bias))

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        image, text = features["image"], features["text"]
        weights = selection.weight("siglip", batch.valid)
        found = siglip_loss(image, text, features["scale"], self.bias, weights=weights, comm=comm, impl=self.impl)
        self.per_sample = found.per_sample
        return found.loss
