"""The symmetric InfoNCE loss of CLIP (Radford et al. 2021) over the rows of all ranks."""

from torch import Tensor

from pipeline.distributed.comm import Comm
from pipeline.kernels import clip_loss
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection


class Config(ObjectiveConfig):
    """`impl` picks the kernel: reference, blocked, triton, or auto."""

    impl: str = "auto"

    def reads(self) -> tuple[str, ...]:
        return ("image", "text", "scale")

    def build(self) -> "Clip":
        return Clip(self.impl)


class Clip(Objective):
    """Each rank pairs its own rows with the columns of all; nothing of size (all rows)^2 exists on any of them."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        image, text = features["image"], features["text"]
        weights = selection.weights.get("clip", batch.valid.to(image.dtype))
        return clip_loss(image, text, features["scale"], weights=weights, comm=comm, impl=self.impl).loss
