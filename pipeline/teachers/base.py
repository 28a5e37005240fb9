"""What a frozen teacher is, and all of a run's together: their outputs ride on the batch, named `<teacher>.<feature>`.

A live teacher looks at the selected rows on the device; a cached one's rows come with the samples from the loader's workers. Objectives
cannot tell them apart. A teacher that learns is a tower.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Component
from pipeline.data.decode import Decoder
from pipeline.data.sources import Sources
from pipeline.types import Batch

Rows = Callable[[np.ndarray], dict[str, Tensor]]  # int64 [b] sample ids -> feature -> [b, ...], with the bool feature "present"


class TeacherConfig(Component):
    """Settings of a teacher. Everything here may read files; what is wrong with them is a ConfigError before training."""

    def gives(self) -> tuple[str, ...]:
        """Its features, without the teacher's name."""
        raise TypeError(f"{type(self).__module__}.Config must define gives()")

    def decoders(self) -> dict[str, Decoder]:
        """How the batch fields that its forward looks at are made from bytes; none where its outputs come with the samples."""
        return {}

    def reads(self) -> tuple[str, ...]:
        """The batch fields that its forward looks at."""
        return tuple(self.decoders())

    def is_cached(self) -> bool:
        """Whether its outputs come with the samples, before any are chosen."""
        return False

    def open(self, sources: Sources) -> "Teacher":
        """The teacher, for these samples. Raises ConfigError, CheckpointError, DataError."""
        raise TypeError(f"{type(self).__module__}.Config must define open()")


class Teacher(nn.Module):
    """Protocol of a frozen teacher; in eval mode for good, never in the Task, so not in a checkpoint and not seen by ZeRO."""

    digest: str  # of everything its outputs depend on besides the samples; a run goes on with no other
    rows: Rows | None = None  # what the loader's workers fetch with the samples

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features [b, ...] of the fields that it reads; one dimension says: the same for all rows. Empty where `rows` gives them."""
        return {}


class Teachers:
    """All frozen teachers of a run."""

    def __init__(self, teachers: Mapping[str, Teacher], reads: Mapping[str, tuple[str, ...]]) -> None:
        self.all, self.reads = dict(teachers), reads
        self._forward: Callable[[], AbstractContextManager] = torch.no_grad
        self._piece: int | None = None

    @classmethod
    def open(cls, configs: Mapping[str, TeacherConfig], sources: Sources) -> "Teachers":
        """Raises ConfigError, CheckpointError, DataError."""
        opened = {name: config.open(sources) for name, config in configs.items()}
        return cls(opened, {name: config.reads() for name, config in configs.items()})

    @property
    def digests(self) -> dict[str, str]:
        return {name: teacher.digest for name, teacher in self.all.items()}

    @property
    def rows(self) -> dict[str, Rows]:
        """What the loader's workers fetch, by teacher."""
        return {name: teacher.rows for name, teacher in self.all.items() if teacher.rows is not None}

    def to(self, device: torch.device, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager], piece: int | None) -> "Teachers":
        """One whole copy on this rank's device, with matrices in the precision that autocast would round them to; `piece` rows at once."""
        self._forward, self._piece = autocast, piece
        for teacher in self.all.values():
            teacher.requires_grad_(False).eval().to(device)
            round_matrices(teacher, dtype)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch with every teacher's features of its rows [b, ...], and which rows it has seen, bool [b], as `<teacher>.present`."""
        if not self.all:
            return batch
        found = dict(batch.teacher)
        for name, teacher in self.all.items():
            if teacher.rows is None:
                found |= {f"{name}.{feature}": value for feature, value in self._features(name, teacher, batch).items()}
        return replace(batch, teacher=found)

    def _features(self, name: str, teacher: Teacher, batch: Batch) -> dict[str, Tensor]:
        fields = {key: value for key, value in batch.fields.items() if key.removesuffix(".present") in self.reads[name]}
        parts = []
        for at in _pieces(len(batch), self._piece):
            with self._forward():
                out = teacher({key: value[at] for key, value in fields.items()})
            parts.append(per_row(out, len(batch.sample[at])))
        features = {feature: torch.cat([part[feature] for part in parts]) for feature in parts[0]}
        return features | {"present": batch.valid & seen(fields, self.reads[name], batch.valid)}


def _pieces(rows: int, piece: int | None) -> Iterator[slice]:
    step = piece or max(1, rows)
    return (slice(first, first + step) for first in range(0, max(1, rows), step))


def per_row(features: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Features that are the same for all rows (the logit scale) with a row for each: [n] -> [rows, n], as everything on a batch has."""
    return {name: value if value.ndim > 1 else value.expand(rows, -1) for name, value in features.items()}


def seen(fields: Mapping[str, Tensor], reads: tuple[str, ...], like: Tensor) -> Tensor:
    """bool [b]: the rows that have at least one of the fields."""
    there = [fields[f"{field}.present"].bool() if f"{field}.present" in fields else torch.ones_like(like) for field in reads]
    return torch.stack(there).any(0)


def round_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Matrices that autocast rounds to `dtype` at every use are kept so: the same numbers from half the memory. Norms stay float32."""
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.to(dtype)
