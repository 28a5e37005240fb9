"""`evaluate` end to end: the run's own held-out data, other shards with labels and several captions, and evaluation while training."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import webdataset as wds

from pipeline.__main__ import main
from pipeline.data.sources import DataConfig, Sources
from tools.make_shards import main as make_shards


@pytest.fixture(scope="module")
def trained(icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated every 6 of its 18 steps."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    where = [
        f"out={out}",
        f"data.sources.0.url={icons_small}",
        f"evaluation.data={icons_small}",
        "evaluation.every=6",
        "evaluation.workers=0",
    ]
    assert main(["train", "configs/pretrain/debug.yaml", *where, "data.workers=0"]) == 0
    return out


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of three colours with a class number, two captions each, and one image that is none."""
    folder = tmp_path_factory.mktemp("labelled")
    with wds.TarWriter(str(folder / "000.tar")) as writer:
        for i in range(24):
            buffer = io.BytesIO()
            PIL.Image.fromarray(np.full((8, 8, 3), 80 * (i % 3), np.uint8)).save(buffer, "PNG")
            image = buffer.getvalue() if i != 5 else b"no image"
            writer.write({"__key__": f"{i:03d}", "png": image, "txt": f"shade {i % 3}\nthe {i % 3} tone", "cls": str(i % 3)})
    (folder / "names.txt").write_text("black\ngrey\nwhite\n")
    (folder / "prompts.txt").write_text("a {} square\n{}\n")
    assert make_shards(["tars", str(folder / "index"), "--shards", str(folder / "000.tar")]) == 0
    return folder


def test_evaluation_while_training_keeps_the_best_weights(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line["eval"]["zero_shot_top1"] for line in lines if "eval" in line}
    assert sorted(figures) == [6, 12, 18]
    best = json.loads((trained / "best" / "best.json").read_text())
    assert best["zero_shot_top1"] == max(figures.values())
    assert figures[best["step"]] == best["zero_shot_top1"]


def test_a_run_is_judged_on_its_held_out_data_and_its_choices(trained: Path) -> None:
    assert main(["evaluate", str(trained), "--quiet"]) == 0
    result = json.loads((trained / "result.json").read_text())
    assert {"zero_shot", "retrieval", "linear_probe", "selection", "samples", "seconds"} <= set(result)
    assert result["zero_shot"]["images"] <= 200
    assert 0 < result["selection"]["precision"] <= 1
    assert result["selection"]["chance"] == pytest.approx(0.6, abs=0.02)  # 40 % of the captions were swapped
    assert result["samples"]["offered"] == 18 * 64
    assert main(["evaluate", str(trained), "--quiet", "--checkpoint", "best"]) == 0


def test_other_shards_with_labels_templates_and_several_captions(trained: Path, labelled: Path, capsys: pytest.CaptureFixture) -> None:
    more = ["--classes", str(labelled / "names.txt"), "--templates", str(labelled / "prompts.txt")]
    before = (trained / "evaluation" / "examples.json").read_text()
    assert main(["evaluate", str(trained), "--data", str(labelled / "index"), *more]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["unusable"]) == (23, 1)
    assert result["zero_shot"]["classes"] == 3
    assert result["retrieval"]["texts"] == 6
    assert result["retrieval"]["text_to_image"]["queries"] == 6
    assert (trained / "evaluation" / "examples.json").read_text() == before  # the report shows the run's own held-out data


def test_classes_that_do_not_fit_the_shards_are_an_error(
    trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "two.txt").write_text("black\ngrey\n")
    assert main(["evaluate", str(trained), "--data", str(labelled / "index"), "--classes", str(tmp_path / "two.txt")]) == 2
    assert "holds class 2" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_shard_that_shrinks_while_it_is_read_is_not_taken_for_bad_samples(
    trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "000.tar"
    shutil.copy(labelled / "000.tar", shard)
    assert make_shards(["tars", str(tmp_path / "index"), "--shards", str(shard)]) == 0
    opened = Sources.open

    def open_then_cut(config: DataConfig) -> Sources:
        sources = opened(config)
        if config.sources[0].url == str(tmp_path / "index"):
            os.truncate(shard, 4096)
        return sources

    monkeypatch.setattr(Sources, "open", open_then_cut)
    assert main(["evaluate", str(trained), "--data", str(tmp_path / "index")]) == 2
    assert "does not match its shard" in capsys.readouterr().err
