"""AMID (Chen et al., CVPR 2023, arXiv 2306.07646): max I(T;S) + I(T;A) - H(T|S), with a teacher that is trained along.

Its losses are derived from the objective that the abstract states in words; no equation of the paper is public in code. I(T;S) alone is
best served by a teacher as weak as the student; I(T;A) keeps it strong; minimising H(T|S) pulls the student after it.
Task losses are separate entries (cross_entropy on the student's, the teacher's and the auxiliary tower's features).
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives._critic import Critic, guesser, squared_error, unit_guess
from pipeline.objectives._negatives import ContrastConfig, Contrasted, Rows
from pipeline.objectives._rows import Used, check_width, feature, fresh, labels_of, unit, weight_of
from pipeline.objectives.base import Objective
from pipeline.types import Batch, Selection


class Config(ContrastConfig):
    """Loss: student_weight L_NCE(T,S) + auxiliary_weight L_NCE(T,A) + explicit_weight L_H + adversarial_weight L_adv."""

    student: str = "embedding"
    teacher: str = "teacher.embedding"
    auxiliary: str = "auxiliary.embedding"
    present: str | None = Field(None, description="bool field of rows that have the auxiliary modality; the other rows train nothing here")
    student_width: int | None = Field(None, ge=1, description="columns of the student's feature")
    teacher_width: int | None = Field(None, ge=1, description="columns of the teacher's feature")
    auxiliary_width: int | None = Field(None, ge=1, description="columns of the auxiliary tower's feature")
    student_weight: float = Field(0.2, ge=0, description="of I(T;S)")
    auxiliary_weight: float = Field(0.2, ge=0, description="of I(T;A)")
    explicit_weight: float = Field(0.0, ge=0, description="of H(T|S) as a squared distance to the guess, a Gaussian on the sphere")
    adversarial_weight: float = Field(1.0, ge=0, description="of H(T|S) by the critic")
    adv_mode: Literal["paired", "cond", "marginal"] = Field("paired", description="marginal ignores pairing and bounds no H(T|S)")
    h_grad_to_teacher: bool = Field(False, description="H(T|S) also pulls the teacher towards what the student can guess")
    generator: Literal["mlp", "identity"] = "mlp"
    hidden: int = Field(64, ge=1, description="width of the generator's and the critic's hidden layer")
    critic_lr: float = Field(1e-3, gt=0, description="of the critic's AdamW, constant; its betas are 0.5 and 0.9, without decay")

    @model_validator(mode="after")
    def _something_to_do(self) -> "Config":
        if not (self.student_weight or self.auxiliary_weight or self.guesses()):
            raise ValueError("every weight of amid is 0; leave the objective out")
        return self

    def guesses(self) -> bool:
        """Whether H(T|S) is part of it."""
        return bool(self.explicit_weight or self.adversarial_weight)

    def sides(self) -> tuple[str, ...]:
        """The towers that it looks at: student, teacher, auxiliary."""
        needs = {"student": bool(self.student_weight or self.guesses()), "teacher": True, "auxiliary": bool(self.auxiliary_weight)}
        return tuple(side for side, needed in needs.items() if needed)

    def reads(self) -> tuple[str, ...]:
        return tuple(getattr(self, side) for side in self.sides())

    def trains(self) -> tuple[str, ...]:
        to_teacher = self.student_weight or self.auxiliary_weight or self.h_grad_to_teacher
        return tuple(getattr(self, side) for side in self.sides() if side != "teacher" or to_teacher)

    def fields(self) -> tuple[str, ...]:
        return (*super().fields(), *([self.present] if self.present else []))

    def build(self) -> "Amid":
        missing = [f"{side}_width" for side in self.sides() if getattr(self, f"{side}_width") is None]
        if missing:
            raise ConfigError(f"objectives: amid needs {', '.join(missing)}: the columns of the features that it reads")
        return Amid(self)


class Amid(Objective):
    """Holds heads, generator and negatives; the critic is beside it (`adversary`). Everything but the student goes when it is exported."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.heads, self.contrasts = nn.ModuleDict(), nn.ModuleDict()
        if c.student_weight:
            self._add("student", c.student_width)
        if c.auxiliary_weight:
            self._add("auxiliary", c.auxiliary_width)
        self._critic: tuple[Critic, ...] = ()  # a tuple hides it from nn.Module: it is no part of the Task
        if c.guesses():
            self.generator = fresh("amid generator", lambda: guesser(c.generator, c.student_width, c.teacher_width, c.hidden))
        if c.adversarial_weight:
            adamw = {"lr": c.critic_lr, "betas": (0.5, 0.9), "weight_decay": 0.0}
            made = fresh("amid critic", lambda: Critic(c.adv_mode, c.teacher_width, c.student_width, c.hidden, adamw))
            self._critic = (made,)

    def _add(self, other: str, width: int) -> None:
        """The contrast of the teacher with one other tower, each with a head of its own."""
        c = self.config
        for name, columns in ((f"teacher_{other}", c.teacher_width), (other, width)):
            self.heads[name] = _head(f"amid {name}", columns, c.projection)
        self.contrasts[other] = c.contrast(f"amid {other}", c.projection or c.teacher_width)

    def adversary(self) -> Critic | None:
        return self._critic[0] if self._critic else None

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of("amid", batch, selection, c.present, *c.reads())
        label = labels_of("amid", batch, c.label) if c.mask_same_class else None
        rows = Rows(batch.sample, batch.visit, weight, Used.of(weight, comm), label)
        given = {side: feature("amid", features, batch, getattr(c, side), weight) for side in c.sides()}
        for side, value in given.items():
            check_width("amid", getattr(c, side), value, f"{side}_width", getattr(c, f"{side}_width"))
        self.telemetry = {}
        with torch.autocast(batch.sample.device.type, enabled=False):
            terms = [self._mutual(other, given, rows, comm) for other in self.contrasts]
            if c.guesses():
                terms.append(self._conditional(given["student"], given["teacher"], rows))
        return sum(terms)

    def _mutual(self, other: str, given: dict[str, Tensor], rows: Rows, comm: Comm) -> Tensor:
        """The weighted InfoNCE loss of the teacher with one tower."""
        left, right = (unit(self.heads[name](given[which])) for name, which in ((f"teacher_{other}", "teacher"), (other, other)))
        found: Contrasted = self.contrasts[other](left, right, rows, comm)
        self.telemetry[f"information_teacher_{other}"] = found.bound
        return getattr(self.config, f"{other}_weight") * found.loss

    def _conditional(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """The weighted H(T|S): L_H and L_adv, on unit rows of the teacher (a differential entropy would fall with their length)."""
        c, weight = self.config, rows.weight
        target = unit(teacher if c.h_grad_to_teacher else teacher.detach())
        guess = unit_guess(self.generator, student)
        distance = squared_error(target, guess)
        self.telemetry["teacher_to_guess"] = rows.used.mean(distance)
        loss = c.explicit_weight * (distance * weight).mean()
        if not self._critic:
            return loss
        inputs = {"teacher": target, "guess": guess, "student": unit(student)}
        real, fake = self._critic[0].judge(inputs)
        self.telemetry["critic_accuracy"] = rows.used.mean(((real > 0).float() + (fake < 0).float()) / 2)
        self.adversary_inputs = {name: value.detach() for name, value in inputs.items()} | {"weight": weight}
        return loss + c.adversarial_weight * (F.softplus(-fake) * weight).mean()

    def after_step(self) -> None:
        for contrast in self.contrasts.values():
            contrast.after_step()


def _head(key: str, width: int, projection: int) -> nn.Module:
    """Linear and without bias: the length of a row changes nothing."""
    return fresh(key, lambda: nn.Linear(width, projection, bias=False)) if projection else nn.Identity()
