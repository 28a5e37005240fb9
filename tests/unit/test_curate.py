"""curate: the verdicts of a run with known scores, its files, and shards that a run can be trained on."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.config import ConfigError, load, to_yaml
from pipeline.data.cache import ShardCache
from pipeline.data.index import Index
from pipeline.data.read import Reader
from pipeline.data.sources import Sources
from pipeline.evaluation.curate import judge
from pipeline.evaluation.selection_quality import LOG_SCHEMA
from pipeline.run import RunConfig
from tests.runs import DEBUG
from tools.check_shards import main as check_shards


@pytest.fixture
def run(tmp_path: Path, icons_small: Path) -> Path:
    """A run folder whose log says: every third pair scores low, and is trained less often."""
    folder = tmp_path / "run"
    (folder / "selection").mkdir(parents=True)
    config = load(RunConfig, DEBUG, [f"out={folder}", f"data.sources=[{{url: {icons_small}}}]", "selector.warmup_visits=1"])
    (folder / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    count = Index.open(str(icons_small)).num_samples
    write_log(folder, count)
    return folder


def write_log(folder: Path, count: int, scored: bool = True) -> None:
    generator, ids = np.random.default_rng(0), np.arange(count)
    parts = []
    for visit in range(4):
        score = np.where(ids % 3 == 0, 15, 45) + 4 * generator.standard_normal(count)
        score = score.astype(np.float32) if scored else np.full(count, np.nan, np.float32)
        columns = [np.full(count, visit, np.int32), np.full(count, visit, np.int16), ids, score, score, ids % 3 > 0]
        parts.append(pa.table([pa.array(column) for column in columns], schema=LOG_SCHEMA))
    pq.write_table(pa.concat_tables(parts), folder / "selection" / "step-00000004-rank0000.parquet")


def test_the_lower_class_is_noisy_and_everything_is_written(
    run: Path, icons_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, index = tmp_path / "out", Index.open(str(icons_small))
    assert main(["curate", str(run), str(out), "--write"]) == 0
    table = pq.read_table(out / "samples.parquet")
    assert table.column_names == ["sample", "source", "shard", "key", "score", "visits", "selected", "clean", "verdict"]
    assert table["verdict"].to_pylist() == ["clean" if i % 3 else "noisy" for i in range(index.num_samples)]
    assert set(table["visits"].to_pylist()) == {4} and table["selected"].to_pylist()[:3] == [0, 3, 3]
    assert table["key"].to_pylist() == index.keys(range(index.num_samples))
    bad = -(-index.num_samples // 3)
    assert f"{bad} of {index.num_samples} pairs judged noisy" in capsys.readouterr().out
    assert len((out / "noisy.txt").read_text(encoding="utf-8").splitlines()) == bad
    page = (out / "examples.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 4 * 24 and "data:image/png" in page
    kept = Index.open(str(out / "shards"))
    kept.check_shards()
    assert kept.num_samples == index.num_samples - bad
    old, new = Reader(index, ShardCache(None)), Reader(kept, ShardCache(None))
    rows = [row for row in range(index.num_samples) if row % 3]
    for at in (0, 1, len(rows) // 2, len(rows) - 1):
        assert new.read(at) == old.read(rows[at]) and kept.keys([at]) == index.keys([rows[at]])
    assert check_shards([str(out / "shards"), "--decode"]) == 0


def test_a_share_that_is_known_decides_instead_of_the_split(run: Path, tmp_path: Path) -> None:
    assert main(["curate", str(run), str(tmp_path / "out"), "--share", "0.1"]) == 0
    verdict = pq.read_table(tmp_path / "out" / "samples.parquet")["verdict"].to_pylist()
    assert verdict.count("noisy") == round(0.1 * len(verdict)) and all(v == "clean" for v in verdict[1::3])


def test_a_run_that_stopped_before_warm_up_ended_can_be_curated(run: Path) -> None:
    config = load(RunConfig, run / "resolved.yaml", ["selector.warmup_visits=auto"])
    (run / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    found = judge(run, Sources.open(config.data))
    assert not found.selected.any() and (found.verdict == np.where(np.arange(len(found.score)) % 3, "clean", "noisy")).all()


def test_a_pair_that_was_passed_over_at_late_visits_is_not_low_for_that(run: Path) -> None:
    path = run / "selection" / "step-00000004-rank0000.parquet"
    log = pq.read_table(path)
    visit, sample, score = (log[name].to_numpy() for name in ("visit", "sample", "score"))
    log = log.set_column(3, "score", pa.array(score + 20 * visit.astype(np.float32)))  # scores rise while the model learns
    pq.write_table(log.filter(pa.array((sample % 5 > 0) | (visit < 1))), path)  # every fifth pair is skipped from visit 1 on
    found = judge(run, Sources.open(load(RunConfig, run / "resolved.yaml").data))
    assert (found.verdict == np.where(np.arange(len(found.score)) % 3, "clean", "noisy")).all() and found.visits[:2].tolist() == [1, 4]


def test_what_cannot_be_curated_is_said(run: Path, icons_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    for arguments, said in (
        ([str(tmp_path / "nowhere"), str(tmp_path / "out")], "is no run folder"),
        ([str(run), str(full)], "is not empty"),
        ([str(run), str(tmp_path / "out"), "--share", "1.5"], "between 0 and 1"),
    ):
        assert main(["curate", *arguments]) == 2
        assert said in capsys.readouterr().err
    write_log(run, Index.open(str(icons_small)).num_samples, scored=False)
    with pytest.raises(ConfigError, match="neither a selection log of all samples nor"):
        judge(run, Sources.open(load(RunConfig, run / "resolved.yaml").data))
