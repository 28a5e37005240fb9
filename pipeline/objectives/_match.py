"""Features of the student against features of a teacher, element by element; what feature KD and UMT share."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives._follow import FollowConfig
from pipeline.objectives._rows import Used, check_width, feature, fresh, same_shape, unit, weight_of
from pipeline.objectives.base import Objective
from pipeline.types import Batch, Selection


class MatchConfig(FollowConfig):
    """Which features, and how the student's get to the teacher's width."""

    distance: Literal["mse", "l1"] = Field("mse", description="the mean over the columns of a row")
    normalise: bool = Field(False, description="compare unit rows (CLIP-KD's FD)")
    projector: Literal["none", "linear"] = Field("none", description="linear: a trained map from the student's to the teacher's columns")
    student_width: int | None = Field(None, ge=1, description="columns of the student's feature, for a projector")
    teacher_width: int | None = Field(None, ge=1, description="columns of the teacher's feature, for a projector")

    def build(self) -> "Match":
        if self.projector == "linear" and (self.student_width is None or self.teacher_width is None):
            raise ConfigError(f"objectives: {self.name}: projector: linear needs student_width and teacher_width, the features' columns")
        return Match(self)


class Match(Objective):
    """The mean over rows and columns; the teacher receives no gradient."""

    def __init__(self, config: MatchConfig) -> None:
        super().__init__()
        self.config = c = config
        key = f"{c.name} {c.student} {c.teacher}"
        linear = c.projector == "linear"
        self.projector = fresh(key, lambda: nn.Linear(c.student_width, c.teacher_width)) if linear else nn.Identity()

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of(c.name, batch, selection, c.present, c.teacher)
        student, teacher = (feature(c.name, features, batch, name, weight) for name in (c.student, c.teacher))
        if c.projector == "linear":
            check_width(c.name, c.student, student, "student_width", c.student_width)
            check_width(c.name, c.teacher, teacher, "teacher_width", c.teacher_width)
        student, teacher = self.projector(student).to(teacher.dtype), teacher.detach()
        same_shape(c.name, student, teacher, (c.student, c.teacher), "set projector: linear with student_width and teacher_width")
        if c.normalise:
            student, teacher = unit(student), unit(teacher)
        compare = F.mse_loss if c.distance == "mse" else F.l1_loss
        each = compare(student, teacher, reduction="none").flatten(1).mean(1)
        cosine = F.cosine_similarity(student.detach().flatten(1), teacher.flatten(1))
        self.telemetry = {"cosine": Used.of(weight, comm).mean(cosine)}
        return (each * weight).mean()
