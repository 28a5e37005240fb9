"""A teacher of several runs: its weights come from validation shards alone, it gives what they say, and a student learns from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import ConfigError, dump, parse
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.sources import Sources
from pipeline.evaluation.late_fusion import class_weights
from pipeline.teachers import cached, fused
from pipeline.towers import image
from tests.distill import CE, CLEAN, NOISY, config, gappy, refused, train
from tests.runs import losses
from tools.cache_teacher import main as cache_teacher
from tools.make_shards import main as make_shards

SOFT = CE | {"kd": {"name": "logit_kd", "teacher": "both.probabilities", "target": "probabilities"}}


@pytest.fixture(scope="module")
def members(digits: Path, colour: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A run that sees the clean digits, one that sees the noisy ones, and validation shards: other digits."""
    folder = tmp_path_factory.mktemp("members")
    train(config(digits, folder / "noisy", NOISY, steps=12))
    validation = folder / "validation"
    assert make_shards(["digits", str(validation), "--split", "test", "--num-train", "1700", "--workers", "1"]) == 0
    runs = {"clean": str(colour), "noisy": str(folder / "noisy")}
    return {
        "both": {"name": "fused", "members": {name: {"run": run} for name, run in runs.items()}, "validation": str(validation)}
    }, validation


def opened(given: dict, shards: Path, folder: Path) -> tuple[fused.Fused, Sources]:
    run = config(shards, folder, objectives=SOFT, teachers=given)
    sources = Sources.open(run.data)
    return run.teachers["both"].open(sources), sources


def test_the_weights_are_those_of_validation_and_an_absent_modality_is_left_out(
    members: tuple[dict, Path], digits: Path, tmp_path: Path
) -> None:
    given, validation = members
    teacher, sources = opened(given, digits, tmp_path)
    held = Sources.open(
        sources.config.model_copy(
            update={"sources": parse(type(sources.config), {"sources": [{"url": str(validation)}], "batch": 1}, "x").sources}
        )
    )
    ids = np.arange(97)
    batch = Fetch(held, config(digits, tmp_path, teachers=given).teachers["both"].decoders(), seed=None)[Rows(ids, ids, ids * 0)]
    with torch.no_grad():
        said = teacher.said(batch.fields)
        expected = class_weights(said.numpy(), batch.fields["label"].numpy(), draws=2000)
        assert np.array_equal(teacher.fitted.classes, expected.classes) and not np.allclose(expected.classes, 0.5)
        mixed = expected.fuse(said.numpy())
        found = teacher(batch.fields)["probabilities"]
        assert found.sum(1).numpy() == pytest.approx(1) and np.allclose(found, mixed / mixed.sum(1, keepdims=True), atol=1e-6)
        only = teacher(batch.fields | {"clean.present": torch.zeros(97, dtype=torch.bool)})["probabilities"]
    noisy = said[1] * teacher.weights[1]
    assert torch.allclose(only, noisy / noisy.sum(1, keepdim=True), atol=1e-6)
    assert teacher.digest == opened(given, digits, tmp_path)[0].digest
    other = {"both": given["both"] | {"hierarchical": True}}
    again = opened(other, digits, tmp_path)[0]
    assert again.digest != teacher.digest and again.fitted.score >= teacher.fitted.score


def test_a_student_learns_from_it_live_and_cached(members: tuple[dict, Path], digits: Path, tmp_path: Path) -> None:
    run = config(digits, tmp_path / "live", objectives=SOFT, teachers=members[0])
    train(run)
    (tmp_path / "live.yaml").write_text(json.dumps(dump(run)), encoding="utf-8")
    assert cache_teacher([str(tmp_path / "live.yaml"), str(tmp_path / "cache"), "--workers", "0", "--dtype", "float32"]) == 0
    assert cached.read_facts(tmp_path / "cache")["features"] == {"probabilities": [10]}
    stored = {"both": {"name": "cached", "path": str(tmp_path / "cache")}}
    train(config(digits, tmp_path / "cached", objectives=SOFT, teachers=stored))
    assert np.allclose([line[1:] for line in losses(tmp_path / "live")], [line[1:] for line in losses(tmp_path / "cached")], rtol=1e-5)


def test_what_cannot_be_fitted_is_refused(members: tuple[dict, Path], digits: Path, tmp_path: Path) -> None:
    given, _ = members

    def teachers(**changes: object) -> dict:
        return {"both": given["both"] | changes}

    def run(**changes: object):
        return config(digits, tmp_path / "run", objectives=SOFT, teachers=teachers(**changes))

    refused(run(validation=None), ConfigError, "give validation: the folder of labelled shards")
    refused(run(validation=str(digits)), ConfigError, "training reads these shards")
    mine = given["both"]["members"]
    for classes, said in (
        (None, "members.other: its tower gives no logits"),
        (7, "same classes, found logits of clean 10, noisy 10, other 7"),
    ):
        tower = CLEAN | {"classes": classes}
        save_file(parse(image.Config, tower, "test").build(tmp_path).state_dict(), tmp_path / "other.safetensors")
        other = {"tower": tower, "weights": str(tmp_path / "other.safetensors")}
        refused(run(members=mine | {"other": other}), ConfigError, said)
    bare = gappy(tmp_path / "bare", auxiliary=False)
    refused(run(validation=str(bare)), DataError, "no sample has the modality 'clean'")
    with pytest.raises(ConfigError, match="teachers.both.members: "):
        run(members={"clean": mine["clean"]})
