"""Frozen teachers: their outputs ride on the batch whoever gives them, they never change, and a wrong one is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ConfigError, parse
from pipeline.data.sources import Sources
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.store import Store
from pipeline.run import RunConfig
from pipeline.task import check_wiring
from tests.distill import CLEAN, FOLLOW, NOISY, config, live, refused, train
from tests.runs import last_checkpoint, losses


def test_a_live_teacher_gives_what_its_run_would_and_stays_as_it_is(digits: Path, colour: Path, tmp_path: Path) -> None:
    def look(trainer) -> tuple:
        batch = trainer.teachers(trainer.data.next())
        trainer.data.load_state_dict({"step": 0, "offered": 0, "bad": {}})
        return batch, trainer.teachers.all["colour"]

    batch, teacher = train(config(digits, tmp_path / "run", objectives=FOLLOW, teachers=live(colour)), look)
    assert set(batch.teacher) == {"colour.embedding", "colour.logits", "colour.present"} and batch.teacher["colour.present"].all()
    before = load_file(last_checkpoint(colour) / "model.safetensors")
    after = {f"towers.student.{name}": value for name, value in teacher.tower.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    own = {"clean": batch.fields["clean"]}
    assert torch.equal(batch.teacher["colour.logits"], teacher.tower(own)["logits"])
    saved = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert saved and all(name.startswith("towers.student.") for name in saved)
    terms = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"ce", "kd", "logits", "kd.cosine", "logits.agreement"} <= line.keys() for line in terms if "loss" in line)
    assert terms[-1]["kd"] < terms[0]["kd"]


def test_a_run_in_a_store_is_listed_once_for_its_settings(digits: Path, colour: Path, tmp_path: Path, monkeypatch) -> None:
    url, asked, listing = f"memory://{tmp_path}/colour", [], Store.listing
    for path in (path for path in colour.rglob("*") if path.is_file()):
        Store(url).put(path.relative_to(colour).as_posix(), path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Store, "listing", lambda store, under="": asked.append(under) or listing(store, under))
    given = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=live(url))
    check_wiring(given.towers, given.objectives, given.teachers, given.data)
    first = len(asked)
    check_wiring(given.towers, given.objectives, given.teachers, given.data)
    teacher = given.teachers["colour"].open(Sources.open(given.data))
    assert first and len(teacher.digest) == 64 and "" not in asked[first:]  # only which checkpoints there are


def test_pieces_of_a_batch_have_the_same_teacher(digits: Path, colour: Path, tmp_path: Path) -> None:
    """Gradient accumulation: the teacher, too, sees a few rows at once."""
    found = []
    for rows in (None, 5):
        engine = {"precision": "fp32", "threads": 1, "micro_batch": rows}
        given = config(digits, tmp_path / f"run{rows}", objectives=FOLLOW, teachers=live(colour), engine=engine)
        train(given)
        found.append(torch.tensor([[loss, norm] for _, loss, norm in losses(tmp_path / f"run{rows}")]))
    assert torch.allclose(*found, rtol=1e-4)


def test_a_field_of_the_teacher_may_go_by_another_name(digits: Path, colour: Path, tmp_path: Path) -> None:
    data = {"modalities": {"view": {"members": ["clean.png"], "optional": True}}}
    given = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=live(colour, fields={"clean": "view"}))
    renamed = parse(RunConfig, given.model_dump(mode="json") | {"data": given.model_dump(mode="json")["data"] | data}, "test")
    train(renamed)
    train(config(digits, tmp_path / "plain", objectives=FOLLOW, teachers=live(colour)))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_run_does_not_go_on_with_another_teacher(digits: Path, colour: Path, tmp_path: Path) -> None:
    data = config(digits, tmp_path).data.model_dump(mode="json")
    for out, seed in (("a", 0), ("b", 5)):
        train(config(digits, tmp_path / out, CLEAN, seed=seed, steps=2))
    train(config(digits, tmp_path / "run", steps=4, objectives=FOLLOW, teachers=live(tmp_path / "a"), data=data))
    again = config(digits, tmp_path / "run", steps=4, objectives=FOLLOW, teachers=live(tmp_path / "b"), data=data)
    refused(again, CheckpointError, "another teacher: teachers.colour was .*, now .*")
    (tmp_path / "a").rename(tmp_path / "moved")  # the same weights elsewhere are the same teacher
    train(config(digits, tmp_path / "run", steps=4, objectives=FOLLOW, teachers=live(tmp_path / "moved"), data=data))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objectives": {"kd": {"name": "feature_kd", "teacher": "colour.embeding"}}},
            r"reads \['colour.embeding'\].*teachers \['colour.emb",
        ),
        (
            {"objectives": {"crd": {"name": "crd", "teacher": "colour.embedding", "teacher_gradient": True}}},
            "would train 'colour.embedding'",
        ),
        ({"objectives": {"ce": {"name": "cross_entropy", "feature": "colour.logits"}}}, "would train 'colour.logits'"),
        ({"towers": {"student": NOISY, "colour": CLEAN}}, "teachers.colour: is a tower's name as well"),
        (
            {"objectives": {"kd": {"name": "feature_kd", "teacher": "colour.embedding", "present": "clean.present"}}},
            "field 'clean.present'",
        ),
        ({"data": {"sources": [{"url": "none"}], "batch": 32}}, "objectives.ce reads the field 'label'.*data.classes"),
        ({"teachers": {"colour": {"name": "live", "run": "none"}}}, "none: is no run folder"),
        ({"teachers": {"colour": {"name": "live"}}}, "give `run`"),
        ({"teachers": {"colour": {"name": "live", "tower": CLEAN}}}, "needs `weights`"),
        ({"teachers": {"colour": {"name": "cached", "path": "none"}}}, "none: holds no rows of a teacher.*tools.cache_teacher"),
    ],
)
def test_wiring_that_cannot_be_is_refused_before_anything_is_built(changes: dict, said: str, colour: Path, tmp_path: Path) -> None:
    given = config(tmp_path, tmp_path / "run", **{"objectives": FOLLOW, "teachers": live(colour)} | changes)
    with pytest.raises(ConfigError, match=said):
        check_wiring(given.towers, given.objectives, given.teachers, given.data)


def test_a_teacher_that_fits_no_run_is_named(digits: Path, colour: Path, tmp_path: Path) -> None:
    make = lambda **given: config(digits, tmp_path / "run", objectives=FOLLOW, teachers={"colour": live(colour)["colour"] | given})  # noqa: E731
    refused(make(tower="pupil"), ConfigError, "unknown tower 'pupil'.*Known: student")
    refused(make(checkpoint="17"), CheckpointError, "step-00000017.*never finished")
    refused(make(checkpoint="last"), ConfigError, "expected newest, best, or the number of a step")
    refused(make(fields={"image": "clean"}), ConfigError, "the tower reads no 'image'; it reads clean")
    refused(make(run=str(tmp_path / "nothing")), ConfigError, "is no run folder")


def test_two_readers_of_one_field_must_want_the_same(digits: Path, colour: Path, tmp_path: Path) -> None:
    larger = config(digits, tmp_path / "a", CLEAN | {"image_size": 9}, objectives=FOLLOW, teachers=live(colour))
    refused(larger, ConfigError, r"towers.student and teachers.colour both read the field 'clean'.*size 9.*size 8")
    two = config(digits, tmp_path / "b", towers={"student": NOISY, "other": NOISY | {"image_size": 14}})
    refused(two, ConfigError, "towers.student and towers.other both read the field 'image'.*size 12.*size 14")


def test_initial_weights_come_from_another_run(digits: Path, colour: Path, tmp_path: Path) -> None:
    def look(trainer) -> dict:
        return {name: value.clone() for name, value in trainer.engine.raw.state_dict().items()}

    def begun(out: str, towers: dict, **given: object) -> dict:
        init = {"run": str(colour), "towers": towers} | given
        return train(config(digits, tmp_path / out, CLEAN, towers={"student": NOISY, "clean": CLEAN}, init_from=init), look)

    source = load_file(last_checkpoint(colour) / "model.safetensors")
    whole = begun("whole", {"clean": "student"})
    assert all(torch.equal(whole[name.replace("student", "clean", 1)], value) for name, value in source.items())
    part = begun("part", {"clean.encoder": "student.encoder"})
    assert torch.equal(part["towers.clean.encoder.1.weight"], source["towers.student.encoder.1.weight"])
    assert not torch.equal(part["towers.clean.head.weight"], source["towers.student.head.weight"])
    assert all(torch.equal(part[name], whole[name]) for name in whole if name.startswith("towers.student."))
    train(
        config(
            digits,
            tmp_path / "part",
            steps=6,
            towers={"student": NOISY, "clean": CLEAN},
            init_from={"run": str(colour), "towers": {"clean.encoder": "student.encoder"}},
        )
    )

    def cannot(towers: dict, said: str, **given: object) -> None:
        init = {"run": str(colour), "towers": towers} | given
        refused(config(digits, tmp_path / "bad", towers={"student": NOISY, "clean": CLEAN}, init_from=init), ConfigError, said)

    cannot({"student": "student"}, r"encoder.1.weight is \[32, 144\] in this run and \[32, 64\] in .*model.safetensors student")
    cannot({"clean.encoder": "student"}, "1.bias is in this run and not in")
    cannot({"clean": "student.decoder"}, "holds no 'towers.student.decoder'")
    cannot({"clean": "pupil"}, "unknown tower 'pupil'")
    cannot({"clean.trunk": "student"}, "this run has no such tower or part of one")
    cannot({"clean": "student"}, "is no run folder", run=str(tmp_path))
    with pytest.raises(ConfigError, match="init_from.towers: unknown tower 'clear'. Did you mean 'clean'"):
        config(digits, tmp_path / "bad", towers={"student": NOISY, "clean": CLEAN}, init_from={"run": "a", "towers": {"clear": "student"}})


def test_a_text_tower_brings_its_tokenizer_along(icons_small: Path, trained: Path, tmp_path: Path) -> None:
    data = {"sources": [{"url": str(icons_small)}], "batch": 64, "lanes": 4, "groups": 2, "workers": 0}
    changes = {"objectives": {"clip": {"name": "clip"}}, "data": data, "steps": 1}
    train(
        config(
            icons_small,
            tmp_path / "run",
            {"name": "linear", "vocab_size": 400},
            init_from={"run": str(trained), "towers": {"student": "student"}},
            **changes,
        )
    )
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    alone = {"name": "linear", "vocab_size": 400}
    follow = {"kd": {"name": "affinity", "teacher": "old"}}
    teachers = {"old": {"name": "live", "run": str(trained)}}
    refused(
        config(icons_small, tmp_path / "b", alone, teachers=teachers, **changes | {"objectives": follow}),
        ConfigError,
        "field 'text', made diff.*bpe",
    )
    fields = {"text": "old_text", "image": "image"}
    data = data | {"modalities": {"old_text": {"members": ["txt"]}}}
    teachers = {"old": teachers["old"] | {"fields": fields}}
    train(config(icons_small, tmp_path / "b", alone, teachers=teachers, **changes | {"objectives": follow, "data": data}))
    assert all(loss > 0 for _, loss, _ in losses(tmp_path / "b"))
