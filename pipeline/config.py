"""Strict, typed configuration: YAML in, frozen pydantic models out, and errors that name the full key path and a guess.

A component (tower, selector, objective, ...) owns its `Config`. The folder is the registry: `name: dissect` in a field declared
`component("pipeline.selection", SelectorConfig)` is `pipeline/selection/dissect.py`; a dotted name reaches a module outside the tree.
"""

import difflib
import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class ConfigError(ValueError):
    """A configuration that cannot run: says what, where, what was expected and how to mend it."""


class Strict(BaseModel):
    """Base of every config: frozen, no unknown keys, no silent conversions ("3" is not 3; 1 may stand where a float is meant)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        errors = [
            InitErrorDetails(type=PydanticCustomError("unknown_key", unknown("key", key, cls.model_fields)), loc=(key,), input=values[key])
            for key in values
            if key not in cls.model_fields
        ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return values


class Component(Strict):
    """Base of a config that is chosen by `name`; the name is the module's, so it need not be written in Python code."""

    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _own_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        module = cls.__module__
        return {"name": module.rsplit(".", 1)[-1] if module.startswith("pipeline.") else module} | values


ConfigT = TypeVar("ConfigT", bound=Strict)


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what was given, the nearest known name, and all of them."""
    names = sorted(str(name) for name in known)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return _plain(f"unknown {kind} {str(given)!r}.{guess} Known: {', '.join(names)}")


def _plain(message: str) -> str:
    """Without braces, which pydantic would read as a template's."""
    return message.replace("{", "(").replace("}", ")")


def names_in(package: str) -> list[str]:
    """The modules of a registry folder that a config may name; `base` and what starts with an underscore are no components."""
    folder = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(folder) if m.name != "base" and not m.name.startswith("_") and _is_component(m))


def _is_component(module: pkgutil.ModuleInfo) -> bool:
    """Reads the file instead of importing it: a folder is listed without the heavy imports of its members."""
    source = Path(module.module_finder.path) / f"{module.name}.py"
    return source.is_file() and re.search(r"^class Config\(", source.read_text(encoding="utf-8"), re.MULTILINE) is not None


def component(package: str, base: type[Component]) -> Any:
    """The annotation of a field that holds one component of `package`; settings of the chosen module survive a dump."""

    def resolve(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("name")
        try:
            return _config_of(name, package, base).model_validate(value)
        except _NoComponent as error:
            reason = PydanticCustomError("name", _plain(str(error)))
            raise ValidationError.from_exception_data(base.__name__, [InitErrorDetails(type=reason, loc=("name",), input=name)]) from None

    return Annotated[SerializeAsAny[base], BeforeValidator(resolve), Field(description=f"one of {package}")]


class _NoComponent(Exception):
    """A name that stands for no component."""


def _config_of(name: Any, package: str, base: type[Component]) -> type[Component]:
    """The Config that a name stands for. Raises _NoComponent where it stands for none; what goes wrong inside a module comes through."""
    if not isinstance(name, str):
        raise _NoComponent(f"needs 'name'. Known: {', '.join(names_in(package))}")
    if "." not in name and name not in names_in(package):
        raise _NoComponent(unknown(f"module in {package}:", name, names_in(package)))
    path = name if "." in name else f"{package}.{name}"
    try:
        config = getattr(importlib.import_module(path), "Config", None)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise _NoComponent(f"there is no module {error.name!r}; is the folder that holds it on PYTHONPATH?") from None
    if not isinstance(config, type) or not issubclass(config, base):
        raise _NoComponent(f"the module {path} has no class Config({base.__name__})")
    return config


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `3e-4` is a number, `off` and `10:20` are text (in YAML 1.1 False and 620), and a key written twice is
    an error instead of a silent overwrite."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012, PyYAML's own way; filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a list or a mapping cannot be a key", key_node.start_mark)
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}:{mark.line + 1}: key {key!r} is written twice; remove one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][\d_]*)|0x[\da-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\d[\d_]*\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf)|\.nan", [*"-+0123456789."]),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


def read_yaml(text: str, where: str = "<text>") -> Any:
    """Parses YAML with the safe loader; a syntax error names the place."""
    try:
        loader = _Loader(text)
        loader.name = where
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def override(values: dict, assignments: Iterable[str]) -> dict:
    """Applies `a.b=c` assignments (c is YAML) to a nested dict; list items are reached by number."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"{assignment!r}: an override is written key.path=value, for example selector.rate=0.3")
        *parents, last = path.split(".")
        place: Any = values
        for part in parents:
            place = _step_into(place, part, path)
        if isinstance(place, list):
            place[_list_index(place, last, path)] = read_yaml(text, assignment)
        elif isinstance(place, dict):
            place[last] = read_yaml(text, assignment)
        else:
            raise ConfigError(f"{path}: {'.'.join(parents)} holds a single value and has no key {last!r}")
    return values


def _step_into(place: Any, part: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_list_index(place, part, path)]
    if not isinstance(place, dict):
        raise ConfigError(f"{path}: nothing below {part!r} can be set, its parent holds a single value")
    if not isinstance(place.get(part), dict | list):
        place[part] = {}
    return place[part]


def _list_index(items: list, part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{path}: {part!r} is no item of a list of {len(items)} (items are numbered from 0)")
    return int(part)


def parse(cls: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Validates a nested dict. Raises ConfigError with one line per problem: `where: key.path: what is wrong`."""
    try:
        return cls.model_validate(values if values is not None else {})
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(str(part) for part in e['loc']) or 'the file'}: {_reason(e)}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _reason(error: Any) -> str:
    if error["type"] in ("unknown_key", "name"):
        return error["msg"]
    if error["type"] == "missing":
        return "is missing; it has no default"
    return f"{error['msg'].removeprefix('Value error, ')} (found {error['input']!r})"


def load(cls: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Reads a YAML file, applies overrides, validates. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        near = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such config file." + (f" In that folder: {', '.join(near)}" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: it is not UTF-8 ({error})") from None
    values = read_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(values).__name__}")
    return parse(cls, override(values, overrides), str(path))


def dump(config: Strict) -> dict:
    """The whole configuration as plain values; `parse(type(config), dump(config))` gives it back."""
    return config.model_dump(mode="json")


def to_yaml(config: Strict) -> str:
    """The resolved configuration as the YAML that a run folder and the golden files hold."""
    return yaml.safe_dump(dump(config), sort_keys=False, width=120)


def digest(values: Any) -> str:
    """SHA-256 over canonical JSON: equal configurations have equal digests."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
