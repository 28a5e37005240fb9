"""Weights of another run: which file holds them, which tower they are of, and their way into the towers of this run (`init_from`)."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.config import ConfigError, Strict, component, parse, read_yaml, unknown
from pipeline.distributed import checkpoint
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.views import View
from pipeline.towers.base import TowerConfig

FILE = "model.safetensors"


class _Tower(Strict):
    tower: component("pipeline.towers", TowerConfig)


class InitFrom(Strict):
    """Initial weights of towers, from a checkpoint of another run. A tokenizer that they were trained with comes with them."""

    run: str = Field(description="the other run's folder, or its URL")
    checkpoint: str = Field("newest", description="newest, best, or a step")
    towers: dict[str, str] = Field(
        min_length=1, description="tower here: tower there; with a path, `image.encoder: student.model.visual`, a part goes into a part"
    )

    def prepare(self, here: Mapping[str, TowerConfig], folder: Path) -> None:
        """Copies the tokenizers of these towers over those of the run `folder`. Raises ConfigError."""
        run = View(self.run).folder
        for to, origin in self.towers.items():
            source = tower_of(run, origin.split(".")[0], f"init_from.towers.{to}")
            name, _, part = to.partition(".")
            for mine, theirs in zip(here[name].files_of(part), source.files()):
                if not (run / theirs).is_file():
                    raise ConfigError(f"init_from: {self.run}: has no {theirs}, the tokenizer of {origin}; restore it")
                shutil.copyfile(run / theirs, folder / mine)

    def load(self, towers: nn.ModuleDict) -> None:
        """Copies the weights. Raises ConfigError where the two sides differ in names or shapes, CheckpointError."""
        view = View(self.run)
        view.weights(self.checkpoint)
        file = weights_file(view.folder, self.checkpoint, "init_from.checkpoint")
        state = towers.state_dict()
        for to, origin in self.towers.items():
            where = f"init_from.towers.{to}"
            mine = {name.removeprefix(f"{to}."): value for name, value in state.items() if name.startswith(f"{to}.")}
            if not mine:
                raise ConfigError(f"{where}: this run has no such tower or part of one; its towers are {', '.join(towers)}")
            theirs = read_weights(file, f"towers.{origin}.", where)
            name, _, part = to.partition(".")
            for key in theirs.keys() & mine.keys():
                theirs[key] = towers[name].fitted(f"{part}.{key}" if part else key, theirs[key], mine[key])
            copy_weights(mine, theirs, where, f"{file} {origin}")


def begin(towers: nn.ModuleDict, init_from: InitFrom | None, configs: Mapping[str, TowerConfig], teachers: Mapping[str, Any]) -> None:
    """The weights of step 0, and whether cached teachers fit the towers that follow them. Raises ConfigError, CheckpointError."""
    if init_from:
        init_from.load(towers)
    for name, config in configs.items():
        for teacher in config.follows():
            towers[name].check_followed(teacher, teachers[teacher].writer)


def tower_of(run: Path, name: str, where: str) -> TowerConfig:
    """The configuration of a tower of another run, whatever else that run's configuration holds. Raises ConfigError."""
    path = run / "resolved.yaml"
    if not path.is_file():
        raise ConfigError(f"{where}: {run}: is no run folder, it has no resolved.yaml; give the `out` of a run that was trained")
    towers = read_yaml(path.read_text(encoding="utf-8"), str(path))["towers"]
    if name not in towers:
        raise ConfigError(f"{where}: {run}: {unknown('tower', name, towers)}")
    return parse(_Tower, {"tower": towers[name]}, str(path)).tower


def weights_file(run: Path, which: str, where: str) -> Path:
    """The whole weights of a run's Task: `which` is newest, best or a step. Raises ConfigError, CheckpointError."""
    if which == "best":
        path = run / "best" / FILE
        if not path.is_file():
            raise ConfigError(f"{path}: there is no best model; the run was not evaluated while it trained (evaluation.every)")
        return path
    if which != "newest" and not which.isdigit():
        raise ConfigError(f"{where} {which}: expected newest, best, or the number of a step")
    if which != "newest":
        found = checkpoint.folder_of(run, int(which))
        checkpoint.verify(found)
        return found / FILE
    newest = checkpoint.newest(run)
    if newest is None:
        raise CheckpointError(f"{run}: has no finished checkpoint; start the training command again")
    return newest[0] / FILE


def read_weights(path: Path, prefix: str, where: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it. Raises ConfigError where there is none or the file is no safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            found = {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: {path}: cannot be read as safetensors ({error}); nothing else is loaded") from None
    if not found:
        raise ConfigError(f"{where}: {path}: holds no {prefix.rstrip('.')!r}; its weights are {', '.join(sorted(names)[:8])} ...")
    return found


def copy_weights(mine: dict[str, Tensor], theirs: dict[str, Tensor], where: str, source: str) -> None:
    """Fills tensors of the same names and shapes. Raises ConfigError that shows both sides where they differ."""
    for name in sorted(mine.keys() ^ theirs.keys()):
        has, lacks = ("this run", source) if name in mine else (source, "this run")
        more = len(mine.keys() ^ theirs.keys()) - 1
        raise ConfigError(f"{where}: {name} is in {has} and not in {lacks}{f', and {more} more differ' if more else ''}; the models differ")
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise ConfigError(f"{where}: {name} is {list(value.shape)} in this run and {list(theirs[name].shape)} in {source}")
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(theirs[name])


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
