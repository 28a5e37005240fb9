"""Config: what is wrong is said with its full path and a guess, and what was set survives a dump."""

import importlib
import math
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic.fields import FieldInfo

import pipeline.selection
from pipeline.config import ConfigError, digest, dump, load, names_in, override, parse, read_yaml, to_yaml
from pipeline.objectives.base import ObjectiveConfig
from pipeline.run import RunConfig
from pipeline.selection.base import SelectorConfig
from pipeline.task import check_wiring
from pipeline.teachers.base import TeacherConfig
from pipeline.towers.base import TowerConfig

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs" / "pretrain" / "debug.yaml"
BASES = {"towers": TowerConfig, "objectives": ObjectiveConfig, "selection": SelectorConfig, "teachers": TeacherConfig}
ONE_OF = {"towers": "towers.student", "objectives": "objectives.clip", "selection": "selector", "teachers": "teachers.lite"}
COMPONENTS = [(folder, name) for folder in ONE_OF for name in names_in(f"pipeline.{folder}")]


def error_of(*overrides: str) -> str:
    """What the debug config with these overrides is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, DEBUG, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "assignment, path, guess",
    [
        ("selector.warmup=3", "selector.warmup", "warmup_visits"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", "Known: betas"),
        ("data.sources.0.weigth=2", "data.sources.0.weigth", "weight"),
        ("towers.student.widht=2", "towers.student.widht", "width"),
        ("towers.teacher={name: open_clip, model: ViT-B-32, tokenizer: {kindd: bpe}}", "towers.teacher.tokenizer.kindd", "kind"),
        ("sead=1", "sead", "seed"),
        ("selector.{x}=1", "selector.{x}", "rate"),
    ],
)
def test_an_unknown_key_is_refused_by_full_path_with_a_guess(assignment: str, path: str, guess: str) -> None:
    said = error_of(assignment)
    assert said.startswith(f"{DEBUG}: {path}: unknown key") and guess in said


def test_all_problems_are_named_at_once() -> None:
    said = error_of("data.batch=many", "data.worker=2", "selector.rate=2", "optimizer.lr=0").splitlines()
    assert [line.split(": ")[1] for line in said] == ["data.worker", "selector.rate", "optimizer.lr"]


def test_an_unknown_component_is_refused_with_a_guess() -> None:
    said = error_of("selector.name=disect")
    assert "selector.name: unknown module in pipeline.selection: 'disect'. Did you mean 'dissect'?" in said
    for name in names_in("pipeline.selection"):
        assert name in said
    assert "base" not in said.split("Known:")[1] and "scores" not in said.split("Known:")[1]
    assert "objectives.clip.name: unknown module in pipeline.objectives: 'klip'" in error_of("objectives.clip.name=klip")
    assert "towers.student.name: needs 'name'" in error_of("towers.student.name=3")


def test_a_component_without_a_name_is_told_which_there_are() -> None:
    said = error_of("selector={rate: 0.5}")
    assert "selector.name: needs 'name'. Known: " in said and "dissect" in said
    assert "towers.student" in error_of("towers.student=linear")  # a name alone is no component


@pytest.mark.parametrize(
    "assignment, path",
    [
        ('data.batch="64"', "data.batch"),
        ("data.batch=64.5", "data.batch"),
        ("data.batch=true", "data.batch"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ('optimizer.lr="3e-4"', "optimizer.lr"),
        ("optimizer.lr=true", "optimizer.lr"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("visits=.inf", "visits"),
        ("optimizer.betas=[0.9, 0.98, 0.99]", "optimizer.betas"),
        ('optimizer.betas=["0.9", 0.98]', "optimizer.betas"),
        ("engine.deterministic=1", "engine.deterministic"),
        ("engine.precision=fp8", "engine.precision"),
        ("out=3", "out"),
        ("out=", "out"),
        ("data.sources=[]", "data.sources"),
        ("data.sources=data/icons", "data.sources"),
        ("selector.rate=0", "selector.rate"),
        ("selector.rate=1.5", "selector.rate"),
        ("selector.warmup_visits=255", "selector.warmup_visits"),
        ("record.trackers=[tensorbord]", "record.trackers"),
        ("towers=3", "towers"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_by_full_path(assignment: str, path: str) -> None:
    said = error_of(assignment)
    assert said.startswith(f"{DEBUG}: {path}") and "(found " in said


def test_yaml_numbers_are_what_they_look_like() -> None:
    values = read_yaml("[3e-4, 1E6, -2.5e+3, 1_000e3, .5, 2., 12, -3, 0x10, 1_000, true, null, ~, .inf]")
    assert values == [3e-4, 1e6, -2500.0, 1e6, 0.5, 2.0, 12, -3, 16, 1000, True, None, None, math.inf]
    assert [type(value) for value in values[:9]] == [float] * 6 + [int] * 3
    words = ["off", "no", "on", "10:20", "1e5x", "2026-11-21", "3.5.1", "1.2e", "-", "y"]
    assert read_yaml(f"[{', '.join(words)}]") == words  # YAML 1.1 makes False, True, 620 and a date of some of these
    config = load(RunConfig, DEBUG, ["optimizer.lr=3e-4", "visits=2", "engine.clip_grad_norm=1"])
    assert config.optimizer.lr == 3e-4
    assert isinstance(config.visits, float) and isinstance(config.engine.clip_grad_norm, float)  # an int where a float is meant


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: 1\nout: a\nseed: 2\n", ":3: key 'seed' is written twice"),
        ("data:\n  batch: 1\n  batch: 2\n", ":3: key 'batch' is written twice"),
        ("data: [1, 2\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("{[1, 2]: 3}\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("just text\n", "expected a mapping"),
        ("", "out: is missing; it has no default"),
        (b"out: \xff\xfe\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_says_why_and_where(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"icon.yaml: no such config file. In that folder: .*icons.yaml"):
        load(RunConfig, DEBUG.with_name("icon.yaml"))
    with pytest.raises(ConfigError, match="no such config file"):
        load(RunConfig, tmp_path)


def test_overrides_reach_dicts_and_list_items() -> None:
    changes = ["selector.rate=0.25", "data.sources.0.url=s3://bucket/a=b", "data.cache=off", "record.trackers=[tensorboard]"]
    config = load(RunConfig, DEBUG, changes)
    assert config.selector.rate == 0.25 and config.data.sources[0].url == "s3://bucket/a=b"
    assert config.data.cache == "off" and config.record.trackers == ["tensorboard"]
    assert override({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("data.sources.1.url=x", "'1' is no item of a list of 1"),
        ("data.sources.first.url=x", "'first' is no item"),
        ("data.sources.3=x", "'3' is no item"),
        ("selector.rate", "is written key.path=value"),
        ("=3", "is written key.path=value"),
        ("selector.rate=[1", "not valid YAML"),
        ("seed.x.y=1", "seed"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(assignment: str, said: str) -> None:
    assert said in error_of(assignment)


def test_a_run_has_one_length() -> None:
    assert "give either steps or visits" in error_of("steps=10")
    assert "give either steps or visits" in error_of("visits=null")
    config = load(RunConfig, DEBUG, ["visits=null", "steps=10"])
    assert config.num_steps(1000) == 10 and load(RunConfig, DEBUG, ["visits=6"]).num_steps(200) == math.floor(6 * 200 / 64)


@pytest.mark.parametrize(
    "assignments, said",
    [
        (["towers.student=null", "towers={pupil: {name: linear}}"], "needs one named 'student'"),
        (["objectives={}"], "needs at least one"),
    ],
)
def test_the_wiring_is_checked_before_anything_is_built(assignments: list[str], said: str) -> None:
    config = load(RunConfig, DEBUG, assignments)
    with pytest.raises(ConfigError, match=said):
        check_wiring(config.towers, config.objectives)


OUTSIDE = """
    from pipeline.{package}.base import {base}

    class Config({base}):
        sharpness: float = 1.0

        def reads(self):
            return ("image", "video")
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes modules into a package `lab` that is importable and no part of this project."""
    (tmp_path / "lab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name, text: (tmp_path / "lab" / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] == "lab"]:
        del sys.modules[name]


def test_a_component_outside_the_tree_is_reached_by_its_dotted_name(lab) -> None:
    lab("sharp", OUTSIDE.format(package="selection", base="SelectorConfig"))
    config = load(RunConfig, DEBUG, ["selector={name: lab.sharp, sharpness: 2, rate: 0.25}"])
    assert (config.selector.sharpness, config.selector.rate, config.selector.name) == (2.0, 0.25, "lab.sharp")
    assert dump(config)["selector"]["sharpness"] == 2.0 and parse(RunConfig, dump(config), "again") == config
    assert "selector.sharpnes: unknown key" in error_of("selector={name: lab.sharp, sharpnes: 2}")


def test_an_objective_that_reads_what_no_tower_gives_is_refused(lab) -> None:
    lab("far", OUTSIDE.format(package="objectives", base="ObjectiveConfig"))
    config = load(RunConfig, DEBUG, ["objectives={far: {name: lab.far}}"])
    with pytest.raises(ConfigError, match=r"objectives.far reads \['video'\], but the towers give \['image', 'scale', 'text'\]"):
        check_wiring(config.towers, config.objectives)


def test_a_broken_import_inside_a_component_is_not_called_unknown(lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab("broken", "import a_library_that_is_not_there\n\nclass Config(object):\n    pass\n")
    monkeypatch.setattr(pipeline.selection, "__path__", [*pipeline.selection.__path__, str(tmp_path / "lab")])
    for name in ("broken", "lab.broken"):  # a file in the folder, and one outside of it
        with pytest.raises(ModuleNotFoundError) as caught:
            load(RunConfig, DEBUG, [f"selector.name={name}"])
        assert caught.value.name == "a_library_that_is_not_there"
    lab("failing", "class Config(object):\n    pass\n\n{}['key of its own']\n")
    for name in ("failing", "lab.failing"):
        with pytest.raises(KeyError, match="key of its own"):
            load(RunConfig, DEBUG, [f"selector.name={name}"])


def test_a_dotted_name_that_is_no_component_is_refused(lab) -> None:
    lab("empty", "x = 1\n")
    lab("other", OUTSIDE.format(package="objectives", base="ObjectiveConfig"))
    for name in ("lab.missing", "laboratory.dissect", "lab.empty", "lab.other"):
        said = error_of(f"selector={{name: {name}}}")
        assert "selector" in said and name.split(".")[0] in said


INPUTS = {"image": {"name": "image"}}
MEMBERS = {"a": {"name": "live"}, "b": {"name": "live", "run": "runs/b"}}


def variants(field: FieldInfo) -> list[Any]:
    """Values that a field may take; those that do not fit are refused by its Config."""
    parts = [field.annotation, *typing.get_args(field.annotation)]
    literals = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    parts_of = [{"mean": [0.1] * 3}, {"kind": "bpe"}, {"scale": [0.5, 1.0]}, {"num_mels": 40}, {"frames": 16}, INPUTS, {"text": "caption"}]
    models = [{"layers": 3}, {"vocab_size": 400}, {"model": "ViT-B-32"}, {"model_type": "gpt2"}]
    nested = [*parts_of, MEMBERS, *models, {"start": 1.0, "end": 0.25, "visits": 4.0}]
    return [*literals, True, False, 4, 2, 8, 7, 301, 304, 0.25, "text", "vit", "ViT-B-32", *nested]


@pytest.mark.parametrize(("folder", "name"), COMPONENTS)
def test_every_setting_of_every_component_survives_load_dump_load(folder: str, name: str) -> None:
    place, *rest = ONE_OF[folder].split(".")
    module = importlib.import_module(f"pipeline.{folder}.{name}")
    assert issubclass(module.Config, BASES[folder])
    required = [key for key, field in module.Config.model_fields.items() if field.is_required()]
    needed = {key: {"inputs": INPUTS, "members": MEMBERS}.get(key, "ViT-B-32") for key in required} | ({"model": "minilm"} if name == "pretrained" else {})
    for key, field in module.Config.model_fields.items():
        if key == "name" or typing.get_args(field.annotation) == (field.get_default(),):  # one value alone is no setting
            continue
        changed = []
        for value in variants(field):
            values = yaml.safe_load(DEBUG.read_text(encoding="utf-8"))
            settings = needed | {"name": name, key: value}
            values[place] = settings if not rest else {rest[0]: settings}
            try:
                config = parse(RunConfig, values, "here")
            except ConfigError:
                continue
            found = getattr(config, place) if not rest else getattr(config, place)[rest[0]]
            assert type(found) is module.Config
            if field.is_required() or getattr(found, key) != field.get_default():
                again = parse(RunConfig, read_yaml(to_yaml(config)), "again")
                assert again == config and digest(dump(again)) == digest(dump(config))
                after = getattr(again, place) if not rest else getattr(again, place)[rest[0]]
                assert type(after) is module.Config and getattr(after, key) == getattr(found, key)
                changed.append(value)
        assert changed, f"no value of variants() is a setting of {folder}.{name}.{key} other than its default; add one"


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    config = load(RunConfig, DEBUG)
    with pytest.raises(ValueError, match="frozen"):
        config.selector.rate = 0.9
