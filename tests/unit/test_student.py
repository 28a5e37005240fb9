"""What stage 2 leaves: a student that is one tower, blind to what only training had; and the same student where every extra weighs 0."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import dump, parse
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.sources import DataConfig, Sources
from pipeline.record.report import write_report
from pipeline.run import RunConfig, TrainedRun
from pipeline.towers import image
from tests.distill import AMID, CE, NOISY, THREE, config, gappy, live, train
from tests.runs import last_checkpoint, losses
from tools.export import main as export


@pytest.fixture(scope="module")
def distilled(digits: Path, colour: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a frozen teacher, an online one, an auxiliary tower, a critic, queue, bank and heads."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    train(config(digits, out, towers=THREE, objectives=AMID, teachers=live(colour)))
    return out


def test_the_exported_student_is_its_tower_alone_and_blind_to_the_rest(distilled: Path, digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    assert export([str(distilled), str(file)]) == 0
    weights, run = load_file(file), TrainedRun(distilled)
    saved = load_file(last_checkpoint(distilled) / "model.safetensors")
    assert {name.split(".")[1] for name in saved if name.startswith("towers.")} == {"student", "teacher", "auxiliary"}
    assert {name.split(".")[1] for name in saved if name.startswith("objectives.")} == {"amid", "crd", "kd"}
    tower = parse(image.Config, NOISY, "test").build(tmp_path).eval()  # from its settings and the file, without the run
    assert weights.keys() == tower.state_dict().keys()
    tower.load_state_dict(weights)
    sources = Sources.open(parse(DataConfig, {"sources": [{"url": str(digits)}], "batch": 8}, "test"))
    batch = Fetch(sources, run.decoders, seed=None)[Rows(*[torch.arange(20).numpy()] * 3)]
    alone = {"image": batch.fields["image"]}
    other = alone | {"clean": torch.randint(0, 256, batch.fields["clean"].shape, dtype=torch.uint8)}
    expected = run.task.towers["student"](batch.fields)
    for fields in (alone, batch.fields, other):
        assert all(torch.equal(value, expected[name]) for name, value in tower(fields).items())


def test_the_run_is_evaluated_where_only_the_student_s_modality_is(distilled: Path, tmp_path: Path) -> None:
    from pipeline.evaluation.student import outputs

    shards = gappy(tmp_path / "shards")
    found = outputs(TrainedRun(distilled), [str(shards)], workers=0)
    assert found["logits"].shape == (40, 10)  # also of those that lack the clean digit, and of the one where it is broken
    whole = TrainedRun(distilled)
    bare = gappy(tmp_path / "bare", auxiliary=False)
    assert outputs(whole, [str(bare)], workers=0)["logits"].shape == (40, 10)
    with pytest.raises(DataError, match="no sample has the modality 'clean'"):
        outputs(whole, [str(bare)], tower="auxiliary", workers=0)


def test_extras_of_weight_0_change_no_bit_of_the_student(digits: Path, colour: Path, tmp_path: Path) -> None:
    silent = {name: values | {"weight": 0.0} for name, values in AMID.items() if name != "ce"}
    train(config(digits, tmp_path / "plain"))
    train(config(digits, tmp_path / "silent", towers=THREE, objectives=CE | silent, teachers=live(colour)))
    one, other = (load_file(last_checkpoint(tmp_path / name) / "model.safetensors") for name in ("plain", "silent"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert losses(tmp_path / "plain") == losses(tmp_path / "silent")


def test_telemetry_against_collapse_is_recorded_and_drawn(distilled: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = {"amid.information_teacher_student", "amid.information_teacher_auxiliary", "amid.teacher_to_guess", "amid.critic_accuracy"}
    for line in (line for line in lines if "loss" in line):
        assert wanted <= line.keys()
        assert 0 <= line["amid.critic_accuracy"] <= 1 and 0 <= line["amid.teacher_to_guess"] <= 4
    page = write_report([distilled], tmp_path / "report.html").read_text(encoding="utf-8")
    titles = [
        "I(T;S), ",
        "I(T;A), ",
        "H(T|S)",
        "The critic&#39;s accuracy",
        "Agreement with",
        "Features like",
        "The online teacher&#39;s accuracy",
    ]
    assert all(f"<h3>{title}" in page for title in titles)


def test_an_auxiliary_that_some_rows_lack_trains_the_others(colour: Path, tmp_path: Path) -> None:
    shards = gappy(tmp_path / "shards")
    given = config(shards, tmp_path / "run", towers=THREE, objectives=AMID, teachers=live(colour))
    values = dump(given)
    values["data"] |= {"modalities": {"clean": {"optional": True}}, "max_bad_fraction": 0.5}
    values["objectives"]["amid"]["present"] = "clean.present"
    train(parse(RunConfig, values, "test"))
    assert all(0 < loss < 1000 for _, loss, _ in losses(tmp_path / "run"))
