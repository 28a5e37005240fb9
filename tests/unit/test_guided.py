"""python -m pipeline guide on digits: real uni-modal runs, the choice, the configuration that it writes."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.__main__ import main
from pipeline.config import ConfigError, load, parse
from pipeline.data.errors import DataError
from pipeline.evaluation.guided import _aligned, configs
from pipeline.run import RunConfig
from pipeline.task import check_wiring
from tools.make_shards import main as make_shards

EYE = {"name": "image", "arch": "mlp", "width": 32, "layers": 1, "embed_dim": 16, "channels": 1}
JOINT = {
    "visits": 4,
    "data": {"classes": 10, "batch": 50, "groups": 1, "lanes": 2, "workers": 0, "modalities": {"clean": {"optional": True}}},
    "towers": {
        "student": {
            "name": "fusion",
            "inputs": {"canvas": EYE | {"image_size": 12}, "tidy": EYE | {"field": "clean", "image_size": 8}},
            "hidden": 16,
            "embed_dim": 16,
            "classes": 10,
        }
    },
    "objectives": {"task": {"name": "cross_entropy", "weight": 2.0}},
    "selector": {"name": "keep_all", "rate": 1.0},
    "optimizer": {"lr": 0.01},
    "engine": {"threads": 1, "precision": "fp32"},
    "evaluation": {"workers": 0},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        assert make_shards(["digits", str(tmp_path / split), "--split", split, "--workers", "1"]) == 0
    values = JOINT | {"out": str(tmp_path / "run"), "evaluation": {"data": str(tmp_path / "test"), "workers": 0}}
    values["data"] = JOINT["data"] | {"sources": [{"url": str(tmp_path / "train")}]}
    (tmp_path / "joint.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path / "joint.yaml"


def test_the_guide_trains_chooses_and_writes_what_to_train_next(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["guide", str(config), "--rule", "both"]) == 0
    said, run = capsys.readouterr().out, tmp_path / "run"
    why = json.loads((run / "guide.json").read_text())
    assert why["rows"] == 1497 and why["modalities"] == ["canvas", "tidy"] and why["method"].upper() in said and why["reason"] in said
    assert why["unimodal"][1] > why["unimodal"][0] + 0.2 and why["umt"] is not None  # clean digits are easier; both needs a trained UMT
    stage2 = load(RunConfig, run / "stage2.yaml")
    check_wiring(stage2.towers, stage2.objectives, stage2.teachers)
    assert stage2.out == str(run / why["method"])
    before = {name: (run / name / "metrics.jsonl").read_bytes() for name in ("canvas", "tidy", "umt")}
    assert main(["guide", str(config), "--rule", "both"]) == 0  # all is there, nothing is trained again
    assert json.loads((run / "guide.json").read_text()) == why
    assert before == {name: (run / name / "metrics.jsonl").read_bytes() for name in before}
    for method in ("umt", "ume"):
        assert main(["train", str(_written(config, tmp_path, method))]) == 0


def _written(config: Path, folder: Path, method: str) -> Path:
    from pipeline.config import to_yaml

    path = folder / f"{method}.yaml"
    path.write_text(to_yaml(getattr(configs(load(RunConfig, config)), method)), encoding="utf-8")
    return path


def test_rows_are_those_that_all_models_know_with_a_label_and_a_modality() -> None:
    def rows(samples: list[int], there: list[bool]) -> dict[str, torch.Tensor]:
        sample = torch.tensor(samples)
        logits = torch.stack([sample, -sample], 1).float()
        return {"sample": sample, "label": sample % 3 - 1, "x.present": torch.tensor(there), "logits": logits, "embedding": logits}

    one, two = rows([1, 2, 3, 4, 5], [True, False, True, True, False]), rows([5, 4, 2, 1], [True, False, False, True])
    found = _aligned({"one": one, "two": two})
    assert found["sample"].tolist() == [1, 4, 5] and found["label"].tolist() == [0, 0, 1]  # 3 is broken in two, 2 has neither modality
    assert found["present"].tolist() == [[True, True, False], [True, False, True]]
    assert all(logits[:, 0].tolist() == [1, 4, 5] for logits in found["logits"])
    with pytest.raises(DataError, match="both a label and a modality"):
        _aligned({"one": rows([3, 6], [True, True])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out": "s3://bucket/run"}, "out: s3://bucket/run: .* give a local one"),
        ({"towers": {"student": EYE | {"classes": 10}}}, "expected a fusion tower"),
        ({"towers": {"student": JOINT["towers"]["student"] | {"inputs": {"canvas": EYE}}}}, "nothing to choose with one modality"),
        ({"data": JOINT["data"] | {"classes": None, "sources": [{"url": "x"}]}}, "name the classes"),
        ({"objectives": {"clip": {"name": "umt", "student": "embedding", "teacher": "canvas.embedding"}}}, "expected one cross_entropy"),
        (
            {"towers": {"student": JOINT["towers"]["student"] | {"inputs": {"umt": EYE, "tidy": EYE | {"field": "clean"}}}}},
            "rename the input",
        ),
    ],
)
def test_a_question_without_sense_is_an_error(change: dict, said: str) -> None:
    values = JOINT | {"out": "x", "data": JOINT["data"] | {"sources": [{"url": "x"}]}} | change
    with pytest.raises(ConfigError, match=said):
        configs(parse(RunConfig, values, "here"))


def test_uni_modal_runs_and_the_ensemble_start_from_nothing_and_follow_nobody() -> None:
    elsewhere = {"teachers": {"big": {"name": "live", "run": "big"}}, "init_from": {"run": "big", "towers": {"student": "student"}}}
    kd = {"kd": {"name": "logit_kd", "teacher": "big.logits"}}
    values = JOINT | {"out": "x", "data": JOINT["data"] | {"sources": [{"url": "x"}]}, "objectives": JOINT["objectives"] | kd} | elsewhere
    planned = configs(parse(RunConfig, values, "here"))
    for one in (*planned.alone.values(), planned.ume):
        assert not one.teachers and one.init_from is None
        check_wiring(one.towers, one.objectives, one.teachers)
    assert set(planned.umt.teachers) == {"big", "canvas_alone", "tidy_alone"} and planned.umt.init_from is not None
