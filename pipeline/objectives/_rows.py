"""What the objectives share: features by name, the rows that count, unit rows, and initial weights that depend on nothing else."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.hashing import hash_ids
from pipeline.types import Batch, Selection

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def weight_of(objective: str, batch: Batch, selection: Selection, present: str | None = None, *followed: str) -> Tensor:
    """[b] >= 0, float32: the selection's weight of each row; 0 where the row is not valid, or its modality absent.

    `present` names a bool field [b] of the batch, by convention "<modality>.present". `followed`: features; of those that a frozen
    teacher gives, only the rows that it has seen count. Raises ConfigError where the batch has no field `present`.
    """
    used = batch.valid
    for teacher in {name.split(".")[0] for name in followed}:
        used = used & batch.teacher.get(f"{teacher}.present", used)
    if present is not None:
        found = batch.fields.get(present, batch.teacher.get(present))
        if found is None:
            known = sorted([*batch.fields, *batch.teacher])
            raise ConfigError(f"{objective}: the batch has no field {present!r} of rows; it has {known}. Leave `present` out")
        used = used & found.bool()
    return selection.weight(objective, used)


def feature(objective: str, features: dict[str, Tensor], batch: Batch, name: str, weight: Tensor | None = None) -> Tensor:
    """A tower's feature, or what a frozen teacher put on the batch, with half precision widened to float32.

    Rows of weight 0 become zeros: they may hold anything, NaN too, and 0 times NaN is NaN. Raises ConfigError where nothing has that name.
    """
    found = features.get(name, batch.teacher.get(name))
    if found is None:
        raise ConfigError(f"{objective} reads {name!r}, found {sorted([*features, *batch.teacher])}")
    found = found if found.dtype == torch.float64 else found.float()
    return found if weight is None else found.masked_fill((weight == 0).view(-1, *[1] * (found.ndim - 1)), 0)


def check_width(objective: str, name: str, value: Tensor, setting: str, columns: int) -> None:
    """Raises ConfigError where a feature [b, d] has not the columns that a map of the objective was made for."""
    if value.shape[-1] != columns:
        raise ConfigError(
            f"objectives: {objective}: {setting} is {columns}, but {name} has {value.shape[-1]} columns; set {setting}={value.shape[-1]}"
        )


def labels_of(objective: str, batch: Batch, name: str) -> Tensor:
    """int64 [b]; below 0 means that the row has none. Raises ConfigError where the batch has no such field."""
    if name not in batch.fields:
        raise ConfigError(f"{objective} needs labels in the field {name!r}; the batch has {sorted(batch.fields)}")
    return batch.fields[name].long()


def same_shape(objective: str, student: Tensor, teacher: Tensor, names: tuple[str, str], remedy: str) -> None:
    """Raises ConfigError where two features cannot be compared element by element."""
    if student.shape != teacher.shape:
        found = f"{names[0]} is {list(student.shape)} and {names[1]} {list(teacher.shape)}"
        raise ConfigError(f"{objective}: expected features of one shape, but {found}; {remedy}")


def unit(x: Tensor) -> Tensor:
    """Rows of length 1. A row of zeros stays one, without gradient: it has no direction, and 1 / its length would be the gradient's size."""
    square = x.square().sum(-1, keepdim=True)
    floor = 1e-24
    return x * square.clamp_min(floor).rsqrt() * (square > floor)


class Used(NamedTuple):
    """The rows of weight > 0 over all ranks, for what is recorded."""

    count: Tensor  # [], at least 1
    share: Tensor  # [b]: size / count for a row that is used, else 0

    @classmethod
    def of(cls, weight: Tensor, comm: Comm) -> "Used":
        """Collective."""
        used = weight > 0
        count = comm.sum(used.sum()).clamp_min(1)
        return cls(count, used * (comm.size / count))

    def mean(self, values: Tensor) -> Tensor:
        """This rank's part of the mean of `values` [b] over all used rows, detached; the mean over ranks of the parts is that mean."""
        return (values.detach() * self.share).sum()


def fresh(key: str, make: Callable[[], ModuleT]) -> ModuleT:
    """A module whose initial weights are a function of the run's seed and of `key` alone.

    Nothing is drawn from torch's generator, so an objective that is switched off or added leaves all other initial weights as they are.
    """
    seed = hash_ids(torch.initial_seed(), *key.encode())
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        return make()
    finally:
        torch.set_rng_state(before)
