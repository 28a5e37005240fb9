"""Relational KD (Park et al., CVPR 2019, arXiv 1904.05068): distances between rows and angles of three rows, as the teacher has them."""

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives._follow import FollowConfig
from pipeline.objectives._rows import feature, unit, weight_of
from pipeline.objectives.base import Objective
from pipeline.types import Batch, Selection


class Config(FollowConfig):
    """The widths of student and teacher may differ."""

    distance_weight: float = Field(1.0, ge=0)
    angle_weight: float = Field(2.0, ge=0, description="angles store 8 b N^2 bytes, b rows of a rank and N of all; 0 for large batches")
    normalise: bool = Field(False, description="relate unit rows")

    @model_validator(mode="after")
    def _something_to_do(self) -> "Config":
        if not (self.distance_weight or self.angle_weight):
            raise ValueError("both weights of relational_kd are 0; leave the objective out")
        return self

    def build(self) -> "RelationalKd":
        return RelationalKd(self)


class RelationalKd(Objective):
    """Relates the rows of all ranks; the teacher receives no gradient. A relation weighs as much as the product of its rows."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of("relational_kd", batch, selection, c.present, c.teacher)
        mine = [feature("relational_kd", features, batch, name, weight).flatten(1) for name in (c.student, c.teacher)]
        if len(batch) * comm.size < 2:
            raise ConfigError("relational_kd: needs 2 rows or more to relate, found 1; train larger batches")
        with torch.autocast(weight.device.type, enabled=False):
            mine = [unit(value) if c.normalise else value for value in mine]
            student, teacher = comm.gather(mine[0]), comm.gather(mine[1].detach())
            every = comm.gather(weight).to(student.dtype)
            loss, self.telemetry = torch.zeros((), dtype=student.dtype, device=student.device), {}
            if c.distance_weight:
                # every rank has the whole of it: the mean over ranks is the same again, and N^2 numbers are few
                term = _distances(student, teacher, every)
                self.telemetry["distance"], loss = term.detach(), loss + c.distance_weight * term
            if c.angle_weight:
                here = slice(comm.rank * len(batch), (comm.rank + 1) * len(batch))
                term = comm.size * _angles(student, teacher, every, here)
                self.telemetry["angle"], loss = term.detach(), loss + c.angle_weight * term
        return loss


def pair_weights(weight: Tensor) -> Tensor:
    """[N, N]: w_i w_j, 0 on the diagonal."""
    return (weight[:, None] * weight[None]).fill_diagonal_(0)


def _distances(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Huber distance of all rows' distances, each side in units of its mean."""
    pairs = pair_weights(weight)
    total = pairs.sum().clamp_min(torch.finfo(pairs.dtype).tiny)
    scaled = []
    for rows in (student, teacher):
        square = rows.square().sum(1)
        # two equal rows have no direction to move apart: below the floor the root has no gradient, and not an infinite one
        distance = (square[:, None] + square[None] - 2 * rows @ rows.T).clamp_min(1e-12).sqrt()
        scaled.append(distance * total / (distance * pairs).sum().clamp_min(1e-12))
    return (F.smooth_l1_loss(*scaled, reduction="none") * pairs).sum() / total


def _angles(student: Tensor, teacher: Tensor, weight: Tensor, here: slice) -> Tensor:
    """This rank's share: Huber distance of cos(i j k), j of the rows `here`, i and k of all the others."""
    cosines = []
    for rows in (student, teacher):
        arms = unit(rows[None] - rows[here, None])  # [b, N, D], from j to every other row
        cosines.append(arms @ arms.transpose(1, 2))
    place = torch.arange(len(weight), device=weight.device)
    apart = (place[None] != place[here, None]).to(weight.dtype)  # [b, N]
    triples = weight[here, None, None] * apart[:, :, None] * apart[:, None, :] * pair_weights(weight)[None]
    # the sum of w_i w_j w_k over all triples of different rows
    total = weight.sum() ** 3 - 3 * weight.sum() * weight.square().sum() + 2 * (weight**3).sum()
    return (F.smooth_l1_loss(*cosines, reduction="none") * triples).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
