"""Cached teachers: the same numbers as the live one, rows of samples it has seen nothing of masked, and no mixing up of caches."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import ConfigError, dump, parse
from pipeline.data.errors import DataError
from pipeline.data.sources import DataConfig, Sources
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.run import RunConfig
from pipeline.teachers import cached
from pipeline.towers import image
from tests.distill import CLEAN, FOLLOW, config, gappy, live, refused, train
from tests.runs import ROOT, losses
from tools.cache_teacher import main as cache_teacher

OPTIONAL = {"clean": {"optional": True}}


def write(config: RunConfig, out: Path, *options: str) -> Path:
    """The cache of the teacher `colour` of a configuration."""
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dump(config)), encoding="utf-8")
    assert cache_teacher([str(path), str(out), "--workers", "0", "--batch", "20", "--rows", "60", *options]) == 0
    return out


def stored(path: Path) -> dict:
    return {"colour": {"name": "cached", "path": str(path)}}


def with_data(config: RunConfig, **given: object) -> RunConfig:
    values = dump(config)
    return parse(RunConfig, values | {"data": values["data"] | given}, "test")


def rows_of(path: Path, shards: Path) -> cached.CachedRows:
    sources = Sources.open(parse(DataConfig, {"sources": [{"url": str(shards)}], "batch": 8}, "test"))
    return cached.Config(path=str(path)).open(sources).rows


@pytest.mark.parametrize("workers", [0, 1])
def test_live_and_cached_teachers_are_interchangeable(digits: Path, colour: Path, tmp_path: Path, workers: int) -> None:
    given = config(digits, tmp_path / "live", objectives=FOLLOW, teachers=live(colour))
    train(given)
    for dtype in ("float32", "float16")[: 2 - workers]:
        write(given, tmp_path / dtype, "--dtype", dtype)
        again = config(digits, tmp_path / f"run{dtype}", objectives=FOLLOW, teachers=stored(tmp_path / dtype))
        train(with_data(again, workers=workers))
    assert losses(tmp_path / "runfloat32") == losses(tmp_path / "live")  # bit for bit
    if not workers:
        close = [torch.tensor(losses(tmp_path / name)) for name in ("runfloat16", "live")]
        assert torch.allclose(*close, rtol=2e-3) and not torch.equal(*close)


def test_what_the_teacher_has_not_seen_is_masked_live_and_cached(colour: Path, tmp_path: Path) -> None:
    shards = gappy(tmp_path / "shards")
    data = {"modalities": OPTIONAL, "max_bad_fraction": 0.5}
    given = with_data(config(shards, tmp_path / "live", objectives=FOLLOW, teachers=live(colour)), **data)
    path = write(given, tmp_path / "cache", "--dtype", "float32")
    rows = rows_of(path, shards)(np.array([0, 1, 7, 39, 25, 2]))
    assert rows["present"].tolist() == [False, True, False, True, False, True]
    assert not rows["logits"][~rows["present"]].any() and rows["logits"][rows["present"]].any(1).all()
    train(given)
    # the broken clean picture makes its sample invalid for the run that decodes it, and for the other it is only unseen: leave it out
    seen = {}
    for name, teachers in (("live", given.teachers), ("cached", stored(path))):
        values = dump(given) | {"out": str(tmp_path / f"{name}2"), "teachers": dump(given)["teachers"] if name == "live" else teachers}
        values["data"] = values["data"] | ({} if name == "live" else {"modalities": {}})

        def look(trainer) -> dict:
            batch = trainer.teachers(trainer.data.next())
            trainer.data.load_state_dict({"step": 0, "offered": 0, "bad": {}})
            return {
                s: (p, row)
                for s, p, row in zip(batch.sample.tolist(), batch.teacher["colour.present"].tolist(), batch.teacher["colour.logits"])
            }

        seen[name] = train(parse(RunConfig, values, "test"), look)
    assert seen["live"].keys() == seen["cached"].keys()
    for sample, (present, row) in seen["live"].items():
        assert present == seen["cached"][sample][0] == (sample % 5 != 0 and sample != 7)
        assert not present or torch.allclose(row, seen["cached"][sample][1], rtol=1e-5, atol=1e-6)
    assert all(0 < loss < 100 for _, loss, _ in losses(tmp_path / "cached2"))


def test_it_goes_on_where_it_was_stopped(digits: Path, colour: Path, tmp_path: Path) -> None:
    given = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=live(colour))
    path = write(given, tmp_path / "cache")
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    assert len(files) == 3
    gone, *kept = sorted(path.iterdir())
    times = {file: file.stat().st_mtime_ns for file in kept}
    gone.rename(gone.with_suffix(".part"))  # as if it had been stopped there
    short = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=stored(path))
    refused(short, DataError, "holds 90 of 150 rows; start tools.cache_teacher again")
    write(given, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files
    assert times == {file: file.stat().st_mtime_ns for file in kept}


def test_another_teacher_other_samples_and_other_files_are_told_apart(digits: Path, colour: Path, tmp_path: Path, capsys) -> None:
    given = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=live(colour), steps=4)
    path = write(given, tmp_path / "cache")
    train(with_data(config(digits, tmp_path / "run", objectives=FOLLOW, teachers=stored(path), steps=4)))
    train(config(digits, tmp_path / "other", CLEAN, seed=3, steps=2))
    other = write(
        given.model_copy(update={"teachers": config(digits, tmp_path, teachers=live(tmp_path / "other")).teachers}), tmp_path / "second"
    )
    again = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=stored(other), steps=4)
    refused(again, CheckpointError, "another teacher: teachers.colour was .*, now")
    assert cache_teacher([str(tmp_path / "other"), str(path)]) == 2
    assert "holds rows of another teacher" in capsys.readouterr().err
    shards = gappy(tmp_path / "shards")
    refused(
        config(shards, tmp_path / "b", objectives=FOLLOW, teachers=stored(path)),
        DataError,
        "made for other samples: 150 of index .* hold 40",
    )
    (path / "rows-000000000000-000000000060.arrow").write_bytes((other / "rows-000000000000-000000000060.arrow").read_bytes())
    refused(
        config(digits, tmp_path / "b", objectives=FOLLOW, teachers=stored(path)), ConfigError, "is of another teacher.*its teacher differs"
    )
    (path / "rows-000000000000-000000000060.arrow").write_bytes(b"ARROW1")
    refused(config(digits, tmp_path / "b", objectives=FOLLOW, teachers=stored(path)), ConfigError, "is no file of tools.cache_teacher")


def test_the_files_are_arrow_in_the_order_of_the_ids(digits: Path, colour: Path, tmp_path: Path) -> None:
    path = write(config(digits, tmp_path / "run", objectives=FOLLOW, teachers=live(colour)), tmp_path / "cache")
    tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for _, _, file in cached.parts(path)]
    assert [len(table) for table in tables] == [60, 60, 30]
    assert tables[0].schema.field("embedding").type == pa.list_(pa.float16(), 16)
    facts = json.loads(tables[0].schema.metadata[b"teacher"])
    assert facts["features"] == {"embedding": [16], "logits": [10]} and facts["samples"] == 150 and len(facts["teacher"]) == 64
    whole = np.concatenate([np.stack(table["embedding"].to_numpy(zero_copy_only=False)) for table in tables])
    asked = np.array([149, 0, 61, 60, 59, 0])
    assert np.array_equal(rows_of(path, digits)(asked)["embedding"].numpy(), whole[asked])


def test_values_that_do_not_fit_are_refused_and_float32_holds_them(digits: Path, tmp_path: Path, capsys) -> None:
    model = parse(image.Config, CLEAN, "test").build(tmp_path)
    with torch.no_grad():
        model.head.weight.mul_(1e7)
    save_file(model.state_dict(), tmp_path / "loud.safetensors")
    loud = {"colour": {"name": "live", "tower": CLEAN, "weights": str(tmp_path / "loud.safetensors")}}
    given = config(digits, tmp_path / "run", objectives=FOLLOW, teachers=loud)
    (tmp_path / "loud.yaml").write_text(json.dumps(dump(given)), encoding="utf-8")
    assert cache_teacher([str(tmp_path / "loud.yaml"), str(tmp_path / "cache"), "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "logits: values of up to" in said and "do not fit float16" in said and "--dtype float32" in said
    assert not list((tmp_path / "cache").glob("*.arrow"))
    rows = rows_of(write(given, tmp_path / "wide", "--dtype", "float32"), digits)(np.array([0, 149]))
    assert rows["logits"].abs().max() > 65504 and rows["logits"].isfinite().all()


def test_features_of_all_rows_have_a_row_each(icons_small: Path, trained: Path, tmp_path: Path) -> None:
    assert cache_teacher([str(trained), str(tmp_path / "cache"), "--workers", "0", f"data.sources=[{{url: {icons_small}}}]"]) == 0
    rows = rows_of(tmp_path / "cache", icons_small)(np.array([3, 5]))
    assert rows["scale"].shape == (2, 1) and rows["image"].shape == rows["text"].shape and rows["image"].dtype == torch.float16
    assert rows["image"].float().norm(dim=1).allclose(torch.ones(2), atol=1e-2)


def test_the_command_says_what_is_wrong(digits: Path, colour: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(json.dumps(dump(config(digits, tmp_path / "run"))), encoding="utf-8")
    for arguments, said in (
        ([str(path), "out"], "has 0 teachers"),
        ([str(path), "out", "--tower", "student"], "is of a run"),
        ([str(path), "out", "--teacher", "color"], "unknown teacher 'color'"),
        ([str(colour), "out", "--tower", "pupil"], "unknown tower 'pupil'"),
    ):
        assert cache_teacher(arguments) == 2
        assert said in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "tools.cache_teacher", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--teacher" in done.stdout
