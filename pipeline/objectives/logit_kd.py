"""Knowledge distillation on logits (Hinton et al. 2015, arXiv 1503.02531): T^2 KL(teacher || student) of tempered softmaxes."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.distributed.comm import Comm
from pipeline.objectives._follow import FollowConfig
from pipeline.objectives._rows import Used, feature, same_shape, weight_of
from pipeline.objectives.base import Objective
from pipeline.types import Batch, Selection


class Config(FollowConfig):
    """`target: probabilities` takes what an ensemble or late fusion gives; rows need not sum to 1."""

    student: str = "logits"
    teacher: str = "teacher.logits"
    target: Literal["logits", "probabilities"] = "logits"
    temperature: float = Field(4.0, gt=0)

    def build(self) -> "LogitKd":
        return LogitKd(self)


class LogitKd(Objective):
    """No parameters; the teacher receives no gradient."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of("logit_kd", batch, selection, c.present, c.teacher)
        student, teacher = (feature("logit_kd", features, batch, name, weight) for name in (c.student, c.teacher))
        same_shape("logit_kd", student, teacher, (c.student, c.teacher), "both must score the same classes")
        teacher = teacher.detach()
        if c.target == "probabilities":
            teacher = teacher.clamp_min(1e-12).log()
        wanted, given = (F.log_softmax(value / c.temperature, 1) for value in (teacher, student))
        each = c.temperature**2 * F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
        self.telemetry = {"agreement": Used.of(weight, comm).mean((student.argmax(1) == teacher.argmax(1)).float())}
        return (each * weight).mean()
