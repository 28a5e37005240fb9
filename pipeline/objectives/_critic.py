"""The adversarial bound on H(T|S): a generator that guesses the teacher's row from the student's, and a critic of the guesses."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.objectives._rows import unit

Mode = Literal["paired", "cond", "marginal"]


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width_out))


class Critic(nn.Module):
    """Tells the teacher's rows from guesses. The engine holds it outside of the Task, replicated, and trains it after the model's step:

        loss = critic(output.adversary of this objective);  its gradients are averaged over ranks;  AdamW(critic.adamw)

    paired: D[t, t] against D[t, G(s)] (the conditional entropy's bound of ALICE, Li et al. 2017); cond: D[s, t] against D[s, G(s)];
    marginal: D[t] against D[G(s)], which ignores who belongs to whom and bounds no conditional entropy.
    """

    def __init__(self, mode: Mode, teacher: int, student: int, hidden: int, adamw: dict[str, Any]) -> None:
        super().__init__()
        self.mode, self.adamw = mode, adamw
        width = {"paired": 2 * teacher, "cond": student + teacher, "marginal": teacher}[mode]
        self.net = mlp(width, hidden, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The critic's own loss [] on detached rows: softplus(-D(real)) + softplus(D(fake)); the mean over ranks is the whole batch's.

        `inputs`: unit rows teacher, guess [b, d_t] and student [b, d_s], weight [b].
        """
        weight = inputs["weight"]
        real, fake = (self.net(pair)[:, 0] for pair in self.pairs(inputs))
        return ((F.softplus(-real) + F.softplus(fake)) * weight).mean()

    def pairs(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the critic looks at, [b, width] each: real and guessed."""
        teacher, guess = inputs["teacher"], inputs["guess"]
        if self.mode == "marginal":
            return teacher, guess
        given = teacher if self.mode == "paired" else inputs["student"]
        return torch.cat([given, teacher], 1), torch.cat([given, guess], 1)

    def judge(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [b] of real (without gradient) and of guessed rows for the model's step: no gradient ever reaches the critic."""
        real, fake = self.pairs(inputs)
        with torch.autocast(fake.device.type, enabled=False):
            frozen = {name: p.detach().to(fake.device, fake.dtype) for name, p in self.net.named_parameters()}
            with torch.no_grad():
                seen = functional_call(self.net, frozen, (real,))[:, 0]
            return seen, functional_call(self.net, frozen, (fake,))[:, 0]


def squared_error(teacher: Tensor, guess: Tensor) -> Tensor:
    """[b]: -log q(t|s) of an isotropic Gaussian up to constants; of unit rows the same as a von Mises-Fisher's, 2 - 2 cos."""
    return (teacher - guess).square().sum(-1)


def guesser(kind: Literal["mlp", "identity"], student: int, teacher: int, hidden: int) -> nn.Module:
    """G of the specification: from the student's rows to the teacher's. Raises ConfigError where identity does not fit."""
    if kind == "identity":
        if student != teacher:
            raise ConfigError(f"amid: generator: identity needs features of one width, found {student} and {teacher}; take mlp")
        return nn.Identity()
    return mlp(student, hidden, teacher)


def unit_guess(generator: nn.Module, student: Tensor) -> Tensor:
    """Unit rows [b, d_t], in the student's precision: autocast does not reach inside."""
    with torch.autocast(student.device.type, enabled=False):
        return unit(generator(student))
