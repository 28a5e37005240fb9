"""evaluation.every of a student that classifies: its accuracy on the way, and a probe of the teacher that sees the auxiliary modality alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError, dump, parse
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.sources import DataConfig, Sources
from pipeline.evaluation.recognition import linear_probe
from pipeline.evaluation.student import measure_student
from pipeline.record.report import write_report
from pipeline.run import RunConfig, TrainedRun
from tests.distill import AMID, NOISY, THREE, WIDTHS, config, gappy, refused, train
from tools.make_shards import main as make_shards

ONLINE = {name: AMID[name] for name in ("ce", "teacher_ce", "auxiliary_ce")} | {"amid": {"name": "amid", "auxiliary_width": 16} | WIDTHS}


def watched(shards: Path, held: Path, out: Path) -> RunConfig:
    """A run with AMID's online teacher, evaluated every third of its 6 steps."""
    return config(shards, out, towers=THREE, objectives=ONLINE, evaluation={"data": str(held), "every": 3, "workers": 0})


def evaluations(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "eval" in line]


def test_accuracy_and_the_teachers_auxiliary_probe_are_recorded_and_drawn(digits: Path, tmp_path: Path) -> None:
    held, out = tmp_path / "held", tmp_path / "run"
    assert make_shards(["digits", str(held), "--split", "test", "--num-train", "1700", "--workers", "1"]) == 0
    train(watched(digits, held, out))
    lines = evaluations(out)
    assert [line["step"] for line in lines] == [3, 6]
    last, run = lines[-1]["eval"], TrainedRun(out)
    assert last["accuracy"] == pytest.approx(measure_student(run, str(held), workers=0)["recognition"]["accuracy"])
    data = parse(DataConfig, {"sources": [{"url": str(held)}], "batch": 1, "classes": 10}, "test")
    ids = np.arange(97)
    batch = Fetch(Sources.open(data), run.decoders, seed=None)[Rows(ids, ids, ids * 0)]
    alone = run.task.towers["teacher"]({"clean": batch.fields["clean"]})["embedding"]
    together = run.task.towers["teacher"](batch.fields)["embedding"]
    assert last["teacher_auxiliary_probe"] == pytest.approx(linear_probe(alone, batch.fields["label"])["top1"])
    assert last["teacher_auxiliary_probe"] > 0.4 and not np.allclose(alone.detach(), together.detach(), atol=1e-2)
    assert json.loads((out / "best" / "best.json").read_text())["accuracy"] == max(line["eval"]["accuracy"] for line in lines)
    page = write_report([out], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h3>What the teacher keeps of the auxiliary modalities" in page and "<h3>The student&#39;s accuracy on the way" in page


def test_without_the_auxiliary_modality_there_is_no_probe_and_without_classes_an_error(tmp_path: Path, digits: Path) -> None:
    bare = gappy(tmp_path / "bare", auxiliary=False)
    train(watched(digits, bare, tmp_path / "run"))
    assert [set(line["eval"]) for line in evaluations(tmp_path / "run")] == [{"accuracy", "macro_f1"}] * 2
    values = dump(config(digits, tmp_path / "blind", NOISY))
    values["data"]["classes"], values["evaluation"] = None, {"data": str(bare), "every": 3}
    values["objectives"] = {"kd": {"name": "feature_kd", "teacher": "logits", "projector": "none"}}
    refused(parse(RunConfig, values, "test"), ConfigError, "name data.classes")
