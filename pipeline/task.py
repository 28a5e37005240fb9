"""Towers and objectives in one module: the engine wraps it, and its forward is the only way to the weights."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import kernels
from pipeline.config import ConfigError
from pipeline.data.sources import DataConfig
from pipeline.distributed.comm import Comm
from pipeline.objectives.base import ObjectiveConfig
from pipeline.teachers.base import TeacherConfig
from pipeline.towers.base import TowerConfig
from pipeline.types import Batch, Cached, Selection, StepOutput

MAIN = "student"  # its features go by their own names, those of another tower by tower.name


def feature_names(towers: Mapping[str, TowerConfig]) -> list[str]:
    """Every feature that these towers give."""
    return [f if name == MAIN else f"{name}.{f}" for name, tower in towers.items() for f in tower.gives()]


def check_wiring(
    towers: Mapping[str, TowerConfig],
    objectives: Mapping[str, ObjectiveConfig],
    teachers: Mapping[str, TeacherConfig] | None = None,
    data: DataConfig | None = None,
) -> None:
    """Raises ConfigError when an objective reads a feature that no tower or teacher gives, or would train a frozen one, or reads a field
    that no batch of `data` has (None: not looked at); when a name means two things; when there is nothing to train."""
    if MAIN not in towers:
        raise ConfigError(f"towers: needs one named {MAIN!r}, it is the one that is exported; found {', '.join(towers) or 'none'}")
    if not objectives:
        raise ConfigError("objectives: needs at least one")
    for kind, names in (("towers", towers), ("objectives", objectives)):
        if taken := [name for name in names if "." in name or not name or hasattr(nn.ModuleDict, name)]:
            raise ConfigError(f"{kind}.{taken[0]}: cannot be a name here: it has a dot, or means something in torch; choose another")
    _check_followed(towers, teachers or {})
    given = feature_names(towers)
    frozen = _frozen_names(towers, given, teachers or {})
    fields = _field_names(towers, teachers or {}, data) if data else None
    for name, objective in objectives.items():
        if missing := [f for f in objective.reads() if f not in given and f not in frozen]:
            teach = f", the teachers {sorted(frozen)}" if frozen else ""
            raise ConfigError(f"objectives.{name} reads {missing}, but the towers give {sorted(given)}{teach}")
        if trained := [f for f in objective.trains() if f in frozen]:
            raise ConfigError(
                f"objectives.{name} would train {trained[0]!r}, but teachers.{trained[0].split('.')[0]} is frozen; a teacher that learns is a tower"
            )
        if fields is not None and (unknown := [f for f in objective.fields() if f not in fields]):
            raise ConfigError(
                f"objectives.{name} reads the field {unknown[0]!r}, but the batch has {', '.join(fields)}. A label comes with data.classes, "
                f"<modality>.present with data.modalities.<modality>.optional"
            )


def _check_followed(towers: Mapping[str, TowerConfig], teachers: Mapping[str, TeacherConfig]) -> None:
    """Raises ConfigError for a tower whose input is a teacher that is not there, or looks only at rows that are chosen already."""
    for name, tower in towers.items():
        for teacher in tower.follows():
            if teacher not in teachers or not teachers[teacher].is_cached():
                found = f"teachers.{teacher} is {teachers[teacher].name}" if teacher in teachers else f"there is no teachers.{teacher}"
                raise ConfigError(
                    f"towers.{name}: takes the features of the cached teacher {teacher!r} as its input, and {found}; write them with "
                    f"tools.cache_teacher and give teachers.{teacher}: {{name: cached, path: ...}}"
                )


def _frozen_names(towers: Mapping[str, TowerConfig], given: list[str], teachers: Mapping[str, TeacherConfig]) -> list[str]:
    """Every feature that these teachers give. Raises ConfigError for a name that is taken."""
    frozen: list[str] = []
    for name, teacher in teachers.items():
        if "." in name or name in towers:
            why = "is a tower's name as well" if name in towers else "has a dot, which parts it from its features"
            raise ConfigError(f"teachers.{name}: {why}; give it another name")
        mine = [f"{name}.{feature}" for feature in teacher.gives()]
        if taken := [feature for feature in mine if feature in given]:
            raise ConfigError(f"teachers.{name}: {taken[0]!r} is a feature of the towers as well; give the teacher another name")
        frozen += mine
    return frozen


def _field_names(towers: Mapping[str, TowerConfig], teachers: Mapping[str, TeacherConfig], data: DataConfig) -> list[str]:
    """What a batch of these readers holds besides ids."""
    read = [field for reader in (*towers.values(), *teachers.values()) for field in reader.reads()]
    for name, teacher in teachers.items():
        if name in read and teacher.reads() not in ((), (name,)):
            raise ConfigError(
                f"teachers.{name}: is a field's name as well, and it reads others too: {name}.present would mean two things; rename it"
            )
    found = dict.fromkeys([*read, *(["label"] if data.classes is not None else [])])
    return [
        *found,
        *(f"{f}.present" for f in found if f in data.modalities and data.modalities[f].optional),
        *(f"{t}.present" for t in teachers),
    ]


class Task(nn.Module):
    """Runs every tower every step and adds up the weighted objectives.

    `untrained`: features that no objective sends a gradient to (a head beside the one that is read). They join the loss times zero: DDP
    waits for a gradient of every parameter, and on any number of ranks, in any ZeRO stage, the optimizer then does the same to all.
    `follows`: by tower, the cached teachers whose features it sees among its fields.
    """

    def __init__(
        self,
        towers: dict[str, nn.Module],
        objectives: dict[str, tuple[float, nn.Module]],
        comm: Comm,
        untrained: Collection[str] = (),
        follows: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        super().__init__()
        self.follows = follows or {}
        self.untrained = frozenset(untrained)
        self.towers = nn.ModuleDict(towers)
        self.objectives = nn.ModuleDict({name: objective for name, (_, objective) in objectives.items()})
        self.weights = {name: weight for name, (weight, _) in objectives.items()}
        self.comm = comm

    def forward(
        self,
        batch: Batch,
        mode: Literal["features", "train"] = "train",
        selection: Selection | None = None,
        cached: Cached | None = None,
    ) -> Any:
        """`features`: dict of feature tensors [b, ...]. `train`: StepOutput with this rank's part of the loss.

        With `cached` only its rows are embedded; see pipeline/distributed/replay.py.
        """
        features = self._embed(batch if cached is None else batch.map(lambda value: value[cached.rows]))
        if mode == "features":
            return features
        if cached is not None and cached.gradients is not None:
            given = cached.gradients
            # times zero and not left out: ZeRO adds gradients up rightly only for parameters that get one in every piece
            pulls = [(value * given[name][cached.rows]).sum() if name in given else 0 * value.sum() for name, value in features.items()]
            return StepOutput(sum(pulls), {}, {})
        if cached is not None:
            rows, whole = cached.rows, cached.features
            features = {
                name: torch.cat([whole[name][: rows.start], value, whole[name][rows.stop :]]) if value.ndim >= 2 else value
                for name, value in features.items()
            }
            cached.before_loss()
        loss, seen = self.loss(features, batch, selection)
        loss = loss + sum(0 * value.sum() for name, value in features.items() if name in self.untrained)
        if "scale" in features:
            seen["logit_scale"] = features["scale"].detach().squeeze()
        against = {f"{name}/{key}": rows for name, objective in self.objectives.items() for key, rows in objective.adversary_inputs.items()}
        image, text = (features[name].detach() if name in features else None for name in ("image", "text"))
        alike = image is not None and text is not None and image.ndim == 2 and image.shape == text.shape
        told = [objective.per_sample for objective in self.objectives.values() if objective.per_sample is not None]
        return StepOutput(loss, seen, against, kernels.cosine(image, text) if alike else None, told[0] if len(told) == 1 else None)

    def _embed(self, batch: Batch) -> dict[str, Tensor]:
        out = {}
        for name, tower in self.towers.items():
            given = {key: value for key, value in batch.teacher.items() if key.split(".")[0] in self.follows.get(name, ())}
            out |= {key if name == MAIN else f"{name}.{key}": value for key, value in tower(batch.fields | given).items()}
        return out

    def loss(self, features: dict[str, Tensor], batch: Batch, selection: Selection) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the objectives over given features; the objectives' values and telemetry, detached."""
        terms = {name: objective(features, batch, selection, self.comm) for name, objective in self.objectives.items()}
        seen = {name: term.detach() for name, term in terms.items()}
        for name, objective in self.objectives.items():
            seen |= {f"{name}.{key}": value for key, value in objective.telemetry.items()}
        return sum(self.weights[name] * term for name, term in terms.items()), seen

    def after_step(self) -> None:
        """Once after each optimizer step: what of the objectives moves once a step, queues and banks."""
        for objective in self.objectives.values():
            objective.after_step()

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """(parameter, lowest, highest) that the engine holds it to after each optimizer step."""
        return [bound for tower in self.towers.values() for bound in tower.bounds()]
