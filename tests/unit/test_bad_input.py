"""Bad input of a second stage, at the command line: one message and exit code 2, or masked rows, as the specification says."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.__main__ import main
from tests.distill import AMID, CE, CLEAN, FUSED, NOISY, THREE, WIDTHS, config, gappy, train
from tests.distill import command as command_of
from tests.runs import losses, put_back
from tests.shards import by_hand

ONE_ROW = {"data": {"batch": 8, "lanes": 4, "groups": 1, "workers": 0, "classes": 10}, "selector": {"name": "random", "rate": 0.125}}
ONLINE = {"towers": THREE, "objectives": CE | {"amid": {"name": "amid", "auxiliary_width": 16} | WIDTHS}}
KD = {"name": "feature_kd", "teacher": "teacher.embedding"}
OTHER = {"towers": {"student": NOISY, "teacher": CLEAN | {"embed_dim": 24}}}


def said_of(run, capsys: pytest.CaptureFixture) -> str:
    """What `train` says of a configuration that it refuses."""
    with put_back():
        assert main(command_of(run)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (ONE_ROW | ONLINE, "amid: negatives: batch needs 2 rows or more, found 1; train larger batches, or take `queue` or `bank`"),
        (
            ONE_ROW | OTHER | {"objectives": CE | {"crd": {"name": "crd", "student_width": 16, "teacher_width": 24, "negatives": "batch"}}},
            "crd: negatives: batch needs 2 rows or more, found 1",
        ),
        (OTHER | {"objectives": CE | {"kd": KD | {"projector": "none"}}}, "[32, 16] and teacher.embedding [32, 24]; set projector: linear"),
        (
            OTHER | {"objectives": CE | {"kd": KD | {"projector": "linear", "student_width": 12, "teacher_width": 24}}},
            "feature_kd: student_width is 12, but embedding has 16 columns; set student_width=16",
        ),
        (
            {"towers": THREE, "objectives": CE | {"amid": ONLINE["objectives"]["amid"] | {"teacher_width": 99}}},
            "amid: teacher_width is 99, but teacher.embedding has 16 columns",
        ),
        (
            OTHER | {"objectives": CE | {"crd": {"name": "crd", "student_width": 16, "teacher_width": 7, "negatives": "batch"}}},
            "crd: teacher_width is 7, but teacher.embedding has 24 columns",
        ),
        (
            {"objectives": CE | {"kd": {"name": "logit_kd", "teacher": "teacher.logits"}}}
            | {"towers": {"student": NOISY, "teacher": CLEAN | {"classes": 7}}},
            "both must score the same classes",
        ),
    ],
)
def test_a_row_alone_and_widths_that_differ(changes: dict, said: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = dict(changes)
    if "data" in given:
        given["data"] = given["data"] | {"sources": [{"url": str(digits)}]}
    assert said in said_of(config(digits, tmp_path / "run", **given), capsys)


def test_an_auxiliary_modality_that_is_nowhere_and_labels_of_another_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bare, full = gappy(tmp_path / "bare", auxiliary=False), gappy(tmp_path / "full")
    online = {name: values for name, values in AMID.items() if "colour" not in json.dumps(values)}
    for modalities in ({}, {"clean": {"optional": True}}):
        data = {"sources": [{"url": str(bare)}], "batch": 32, "groups": 2, "workers": 0, "classes": 10, "modalities": modalities}
        said = said_of(config(bare, tmp_path / "run", towers=THREE, objectives=online, data=data), capsys)
        assert "no sample has the modality 'clean': it is read from clean.jpg" in said and "data.modalities.clean.members" in said
    several = {"sources": [{"url": str(bare)}, {"url": str(full)}], "batch": 32, "groups": 2, "workers": 0, "classes": 5}
    said = said_of(config(bare, tmp_path / "labels", data=several), capsys)
    assert re.search(r"data.classes: a sample is of class [5-9], there are 5", said)


def test_a_student_that_asks_for_the_auxiliary_modality_at_test_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    full, bare = gappy(tmp_path / "full"), gappy(tmp_path / "bare", auxiliary=False)
    data = {"sources": [{"url": str(full)}], "batch": 32, "groups": 2, "workers": 0, "classes": 10, "max_bad_fraction": 0.5}
    masked = data | {"modalities": {"clean": {"optional": True}}}
    for name, given in (("needs", data), ("masks", masked)):
        run = config(full, tmp_path / name, FUSED, data=given, steps=1, evaluation={"data": str(bare), "workers": 0})
        train(run)
        code = main(["evaluate", run.out, "--quiet"])
        said = capsys.readouterr().err
        assert code == (2 if name == "needs" else 0)
        assert ("no sample has the modality 'clean'" in said) == (name == "needs")


def test_sound_of_no_length_of_many_channels_and_slow_is_masked_or_heard(tmp_path: Path) -> None:
    def wav(seconds: float, rate: int, channels: int) -> bytes:
        out = io.BytesIO()
        soundfile.write(out, np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels)), rate, format="WAV")
        return out.getvalue()

    kinds = [wav(0, 8000, 1), wav(0.4, 8000, 1), wav(0.3, 16000, 7), wav(20, 8000, 1)]
    rows = [{"speech.wav": kinds[row % 4], "json": json.dumps({"label": row % 4}).encode()} for row in range(32)]
    folder = by_hand(tmp_path / "shards", rows)
    sound = {"seconds": 0.5, "num_mels": 20}
    tower = {"name": "audio", "field": "speech", "width": 8, "layers": 2, "embed_dim": 12, "audio": sound, "classes": 4}
    data = {"sources": [{"url": str(folder)}], "batch": 16, "groups": 1, "workers": 0, "classes": 4, "max_bad_fraction": 0.5}
    seen = train(config(folder, tmp_path / "run", tower, data=data, steps=4), lambda trainer: trainer.data)
    assert dict(seen.counted) == {"audio_empty": 16}  # a quarter of 4 batches of 16
    assert all(0 < loss < 10 for _, loss, _ in losses(tmp_path / "run"))
