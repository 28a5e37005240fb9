"""Contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699): InfoNCE between the student's rows and the teacher's."""

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives._negatives import ContrastConfig, Rows
from pipeline.objectives._rows import Used, check_width, feature, fresh, labels_of, unit, weight_of
from pipeline.objectives.base import Objective
from pipeline.types import Batch, Selection


class Config(ContrastConfig):
    """The paper's setting: negatives bank, temperature 0.07, drawn 16384, weight 0.8, next to cross-entropy and logit KD.

    Both sides have a trained head, also where the teacher is frozen; `teacher: teacher.text` beside `student: image` is CLIP-KD's
    interactive contrast.
    """

    temperature: float = Field(0.07, gt=0)
    student: str = "embedding"
    teacher: str = "teacher.embedding"
    student_width: int | None = Field(None, ge=1, description="columns of the student's feature")
    teacher_width: int | None = Field(None, ge=1, description="columns of the teacher's feature")
    present: str | None = Field(None, description="bool field of rows that the teacher has seen; the other rows train nothing here")
    teacher_gradient: bool = Field(False, description="also train the tower that gives the teacher's feature")

    def reads(self) -> tuple[str, ...]:
        return (self.student, self.teacher)

    def trains(self) -> tuple[str, ...]:
        return self.reads() if self.teacher_gradient else (self.student,)

    def fields(self) -> tuple[str, ...]:
        return (*super().fields(), *([self.present] if self.present else []))

    def build(self) -> "Crd":
        if self.student_width is None or self.teacher_width is None:
            raise ConfigError("objectives: crd needs student_width and teacher_width: the columns of the features that it reads")
        return Crd(self)


class Crd(Objective):
    """Two heads and the negatives."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        widths = {"teacher": c.teacher_width, "student": c.student_width}
        self.heads = nn.ModuleDict()
        for side, width in widths.items():
            make = (lambda width=width: nn.Linear(width, c.projection)) if c.projection else nn.Identity
            self.heads[side] = fresh(f"crd {side} {getattr(c, side)}", make)
        self.contrast = c.contrast(f"crd {c.student} {c.teacher}", c.projection or c.teacher_width)

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of("crd", batch, selection, c.present, c.teacher)
        student, teacher = (feature("crd", features, batch, name, weight) for name in (c.student, c.teacher))
        check_width("crd", c.student, student, "student_width", c.student_width)
        check_width("crd", c.teacher, teacher, "teacher_width", c.teacher_width)
        label = labels_of("crd", batch, c.label) if c.mask_same_class else None
        with torch.autocast(student.device.type, enabled=False):
            left, right = (
                unit(self.heads[side](value))
                for side, value in (("teacher", teacher if c.teacher_gradient else teacher.detach()), ("student", student))
            )
            rows = Rows(batch.sample, batch.visit, weight, Used.of(weight, comm), label)
            found = self.contrast(left, right, rows, comm)
        self.telemetry = {"information": found.bound}
        return found.loss

    def after_step(self) -> None:
        self.contrast.after_step()
