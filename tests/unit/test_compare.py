"""tools.compare on digits: paired seeds of ordinary runs, one the other's teacher; and the figures of students that classify."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config import ConfigError
from pipeline.evaluation.recognition import recognition
from pipeline.evaluation.retrieval import class_retrieval
from pipeline.record.compared import paired, read, table
from pipeline.record.report import write_report
from pipeline.task import check_wiring
from tools.compare import configs, main, read_plan
from tools.make_shards import main as make_shards

ROOT = Path(__file__).parents[2]
EYE = {"name": "image", "arch": "mlp", "width": 32, "layers": 1, "embed_dim": 16, "channels": 1, "image_size": 8, "classes": 10}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    data = {"sources": [{"url": str(tmp_path / "train")}], "classes": 10, "batch": 40, "groups": 1, "lanes": 2, "workers": 0}
    task = {"task": {"name": "cross_entropy"}}
    clean = EYE | {"field": "clean"}
    values = {
        "about": "A digit somewhere, with a teacher that sees it clean.",
        "base": {
            "visits": 2,
            "data": data,
            "selector": {"name": "keep_all", "rate": 1.0},
            "optimizer": {"lr": 0.01},
            "engine": {"threads": 1, "precision": "fp32"},
            "evaluation": {"data": str(tmp_path / "test")},
        },
        "methods": {
            "no teacher": {"towers": {"student": EYE}, "objectives": task},
            "the teacher": {"towers": {"student": clean}, "objectives": task},
            "logit KD": {
                "towers": {"student": EYE},
                "objectives": task | {"kd": {"name": "logit_kd", "teacher": "clean.logits"}},
                "teachers": {"clean": {"name": "live", "run": "{the teacher}"}},
            },
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return tmp_path / "plan.yaml"


def test_every_method_is_a_run_for_each_seed_and_what_is_there_stays(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "test"):
        assert make_shards(["digits", str(tmp_path / split), "--split", split, "--workers", "1"]) == 0
    out = tmp_path / "runs"
    command = [str(plan), "--out", str(out), "--seeds", "2", "--first", "3"]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "compare.json").read_text())
    assert found["seeds"] == [3, 4] and list(found["methods"]) == ["no teacher", "the teacher", "logit KD"]
    assert all(len(values) == 2 for told in found["methods"].values() for values in told.values())
    logs = {path: path.read_bytes() for path in out.glob("*/metrics.jsonl")}
    assert len(logs) == 6 and "kd.agreement" in (out / "logit_kd-3" / "metrics.jsonl").read_text()
    result = json.loads((out / "the_teacher-4" / "result.json").read_text())
    assert result["recognition"]["rows"] == 1497 and result["recognition"]["accuracy"] == found["methods"]["the teacher"]["accuracy"][1]
    assert main(command) == 0 and {path: path.read_bytes() for path in logs} == logs
    assert "no teacher" in said and read(out).rows[2][1][0].wins in ("0/2", "1/2", "2/2")


def test_a_plan_that_cannot_run_is_one_message(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = yaml.safe_load(plan.read_text())
    base, methods = values["base"], values["methods"]
    blind = {"towers": {"student": EYE | {"classes": None}}, "objectives": {"u": {"name": "umt", "student": "embedding", "teacher": "x.y"}}}
    for change, said in (
        ({"methods": []}, "expected about"),
        ({"base": base | {"vists": 2}}, "Did you mean 'visits'"),
        ({"base": base | {"evaluation": {}}}, ": evaluation.data: methods are compared on held-out shards"),
        ({"base": base | {"data": base["data"] | {"classes": None}}}, "name data.classes"),
        ({"methods": methods | {"blind": blind}}, "methods.blind: methods are compared by accuracy"),
    ):
        plan.write_text(yaml.safe_dump(values | change), encoding="utf-8")
        assert main([str(plan), "--out", str(tmp_path / "runs")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_runs_in_an_object_store_are_refused_before_anything_starts(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(plan), "--out", "s3://bucket/runs"]) == 2
    assert "--out s3://bucket/runs: " in capsys.readouterr().err and not (tmp_path / "s3:").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_configs_are_wired(path: Path, tmp_path: Path) -> None:
    for config in configs(read_plan(path), tmp_path, 0).values():
        towers = {name: one for name, one in config.objectives.items() if all(not f.startswith(("ume.",)) for f in one.reads())}
        check_wiring(config.towers, towers, {})


def test_the_report_shows_a_comparison_beside_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text("{}", encoding="utf-8")
    found = {"about": "Line art <alone>.", "seeds": [0, 1], "methods": {"none": {"mAP": [0.5, 0.6]}, "amid": {"mAP": [0.7, 0.55]}}}
    (tmp_path / "compare.json").write_text(json.dumps(found), encoding="utf-8")
    page = write_report([run], tmp_path / "page.html", [tmp_path]).read_text(encoding="utf-8")
    assert "methods over 2 seeds" in page and "Line art &lt;alone&gt;." in page
    assert '<td class="best">62.5 ± 10.6<br><span class="chance">1/2</span></td>' in page
    with pytest.raises(ConfigError, match="tools.compare writes it"):
        write_report([run], tmp_path / "page.html", [run])


def test_the_table_tells_mean_spread_and_wins_against_the_first() -> None:
    found = {"seeds": [0, 1], "methods": {"none": {"accuracy": [0.5, 0.6]}, "amid": {"accuracy": [0.7, 0.55]}}}
    (_, (first,)), (name, (second,)) = table(found).rows
    assert (first.text, first.wins, first.best) == ("55.0 ± 7.1", "", False)
    assert (name, second.text, second.wins, second.best) == ("amid", "62.5 ± 10.6", "1/2", True)


def test_a_difference_over_seeds_is_judged_by_student_s_t() -> None:
    found = paired([1.0, -0.5, -0.1], margin=0.9)
    assert found.mean == pytest.approx(0.4 / 3) and found.error == pytest.approx(0.7767 / 3**0.5, abs=1e-4)
    assert (found.wins, found.verdict) == (1, "ties") and paired([1.0, -0.5, -0.1], margin=1.0).wins == 0
    close = [0.5, 0.1, 0.5]  # 0.37 ± 0.13: more than two standard errors, and not the 4.3 of three seeds; of nine the 2.3
    assert [paired(each).verdict for each in (close, close * 3, [-d for d in close * 3])] == ["ties", "wins", "loses"]
    alone, none = paired([1.0]), paired([])
    assert (alone.mean, alone.verdict, none.verdict) == (1.0, "", "") and math.isnan(alone.error) and math.isnan(none.mean)


def test_recognition_counts_labelled_rows_only() -> None:
    logits = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2]])
    found = recognition(logits, torch.tensor([0, 1, 1, 1, -1]))
    assert found["accuracy"] == 0.75 and found["majority"] == 0.75 and found["rows"] == 4
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    for wrong, said in ((torch.full((5, 3), float("nan")), "not finite"), (logits, "no row has a label")):
        with pytest.raises(ValueError, match=said):
            recognition(wrong, torch.full((5,), -1 if wrong is logits else 0))


def test_retrieval_by_class_reads_ties_against_the_model() -> None:
    gallery, labels = torch.eye(4), torch.tensor([0, 1, 1, -1])
    found = class_retrieval(torch.tensor([[1.0, 0, 0, 0.9], [1, 1, 0, 0]]), gallery, torch.tensor([0, 1]), labels, ks=(1, 2))
    assert (
        found["r1"] == 0.5 and found["r2"] == 1.0 and found["gallery"] == 3
    )  # the second query's first two are equal: the wrong one counts first
    assert found["map"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    with pytest.raises(ValueError, match="no labelled query"):
        class_retrieval(gallery, gallery, torch.full((4,), -1), labels)
