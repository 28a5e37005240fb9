"""Any tower of another run, frozen, run on the rows that are trained."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from torch import Tensor

from pipeline.config import ConfigError, component, digest, dump
from pipeline.data.decode import Decoder
from pipeline.data.sources import Sources
from pipeline.distributed.views import View
from pipeline.teachers.base import Teacher, TeacherConfig
from pipeline.towers.base import Tower, TowerConfig
from pipeline.weights import copy_weights, digest_of, read_weights, tower_of, weights_file

_described = TypeAdapter(component("pipeline.towers", TowerConfig))


def _tower(value: Any) -> Any:
    return value if isinstance(value, str) else _described.validate_python(value)


class Config(TeacherConfig):
    """Either `run` and the name of one of its towers, or the settings of a tower and a file with its `weights` (from tools.export)."""

    run: str | None = Field(None, description="the folder of the run that trained it, or its URL")
    checkpoint: str = Field("newest", description="of that run: newest, best, or a step")
    tower: Annotated[Any, BeforeValidator(_tower)] = Field("student", description="a tower of the run by name, or the settings of one")
    weights: str | None = Field(
        None, description="safetensors with the weights of a tower that is given by its settings; tokenizers beside it"
    )
    fields: dict[str, str] = Field(
        default_factory=dict, description="its field: the batch's field, where the student calls something else by its name"
    )

    @cached_property
    def _view(self) -> View:
        """Opened once for all that is asked at a start: a URL is listed then."""
        return View(self.run)

    def described(self) -> TowerConfig:
        """The tower's settings. Raises ConfigError."""
        if isinstance(self.tower, str):
            if self.run is None or self.weights is not None:
                raise ConfigError(f"teachers: live: tower {self.tower!r} is the name of a tower of a run: give `run`, and no `weights`")
            return tower_of(self._view.folder, self.tower, "teachers: live")
        if self.weights is None or self.run is not None:
            raise ConfigError("teachers: live: a tower given by its settings needs `weights`, a safetensors file, and no `run`")
        return self.tower

    def folder(self) -> Path:
        """Where its tokenizers are."""
        return self._view.folder if self.weights is None else Path(self.weights).parent

    def gives(self) -> tuple[str, ...]:
        return self.described().gives()

    def decoders(self) -> dict[str, Decoder]:
        return {self.fields.get(name, name): decoder for name, decoder in self.described().decoders(self.folder(), train=False).items()}

    def reads(self) -> tuple[str, ...]:
        known = self.described().reads()
        if wrong := [name for name in self.fields if name not in known]:
            raise ConfigError(f"teachers: live: fields: the tower reads no {wrong[0]!r}; it reads {', '.join(known)}")
        return tuple(self.fields.get(name, name) for name in known)

    def open(self, sources: Sources) -> "Live":
        tower = self.described().build(self.folder())
        if self.weights is None:
            self._view.weights(self.checkpoint)
            file, prefix = weights_file(self._view.folder, self.checkpoint, "teachers: live: checkpoint"), f"towers.{self.tower}."
        else:
            file, prefix = Path(self.weights), ""
        weights = read_weights(file, prefix, "teachers: live")
        copy_weights(tower.state_dict(), weights, "teachers: live", str(file))
        return Live(tower, self.fields, digest([dump(self.described()), self.fields, digest_of(weights)]))


class Live(Teacher):
    """A frozen tower under its own field names."""

    def __init__(self, tower: Tower, fields: dict[str, str], digest: str) -> None:
        super().__init__()
        self.tower, self.digest = tower, digest
        self._own = {there: here for here, there in fields.items()}

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {}
        for name, value in fields.items():
            field, dot, present = name.partition(".present")
            own[f"{self._own.get(field, field)}{dot}{present}"] = value
        return self.tower(own)
