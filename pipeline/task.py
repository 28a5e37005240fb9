"""Towers and objectives in one module: the engine wraps it, and its forward is the only way to the weights."""

from typing import Any, Literal

from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives.base import ObjectiveConfig
from pipeline.towers.base import TowerConfig
from pipeline.types import Batch, Selection, StepOutput

MAIN = "student"  # its features go by their own names, those of another tower by tower.name


def feature_names(towers: dict[str, TowerConfig]) -> list[str]:
    """Every feature that these towers give."""
    return [f if name == MAIN else f"{name}.{f}" for name, tower in towers.items() for f in tower.gives()]


def check_wiring(towers: dict[str, TowerConfig], objectives: dict[str, ObjectiveConfig]) -> None:
    """Raises ConfigError when an objective reads a feature that no tower gives, or when there is nothing to train."""
    if MAIN not in towers:
        raise ConfigError(f"towers: needs one named {MAIN!r}, it is the one that is exported; found {', '.join(towers) or 'none'}")
    if not objectives:
        raise ConfigError("objectives: needs at least one")
    given = feature_names(towers)
    for name, objective in objectives.items():
        missing = [f for f in objective.reads() if f not in given]
        if missing:
            raise ConfigError(f"objectives.{name} reads {missing}, but the towers give {sorted(given)}")


class Task(nn.Module):
    """Runs every tower every step and adds up the weighted objectives."""

    def __init__(self, towers: dict[str, nn.Module], objectives: dict[str, tuple[float, nn.Module]], comm: Comm) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        self.objectives = nn.ModuleDict({name: objective for name, (_, objective) in objectives.items()})
        self.weights = {name: weight for name, (weight, _) in objectives.items()}
        self.comm = comm

    def forward(self, batch: Batch, mode: Literal["features", "train"] = "train", selection: Selection | None = None) -> Any:
        """`features`: dict of feature tensors [b, ...]. `train`: StepOutput with this rank's part of the loss."""
        features: dict[str, Tensor] = {}
        for name, tower in self.towers.items():
            for key, value in tower(batch.fields).items():
                features[key if name == MAIN else f"{name}.{key}"] = value
        if mode == "features":
            return features
        terms = {name: objective(features, batch, selection, self.comm) for name, objective in self.objectives.items()}
        loss = sum(self.weights[name] * term for name, term in terms.items())
        seen = {name: term.detach() for name, term in terms.items()}
        return StepOutput(loss, seen | {"logit_scale": features["scale"].detach().squeeze()} if "scale" in features else seen, {})

    def after_step(self) -> None:
        """Bounds on parameters, after each optimizer step."""
        for tower in self.towers.values():
            tower.after_step()
