"""A run whose shards live in an object store: whole shards through the node's cache, or ranged reads without one."""

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tools.make_shards import main as make_shards


@pytest.fixture
def stored(moto_s3: str) -> str:
    """200 icons written to and indexed in a bucket."""
    options = ["--limit", "200", "--size", "32", "--shard-size", "50", "--workers", "1"]
    assert make_shards(["icons", f"{moto_s3}/icons", *options]) == 0
    return f"{moto_s3}/icons"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(url: str, out: Path, *more: str) -> list[float]:
    assert main(["train", "configs/pretrain/debug.yaml", f"out={out}", f"data.sources.0.url={url}", "steps=8", "visits=", *more]) == 0
    return losses(out)


def test_workers_fetch_whole_shards_once_and_ranged_reads_give_the_same_run(stored: str, tmp_path: Path) -> None:
    cached = train(stored, tmp_path / "cached", f"data.cache={tmp_path / 'cache'}", "data.workers=2")
    assert len(cached) == 8
    fetched = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size > 50_000]
    assert len(fetched) == 4
    assert train(stored, tmp_path / "ranged", "data.cache=off", "data.workers=0") == cached


def test_a_cache_too_small_for_the_windows_is_refused_with_the_numbers(stored: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = f"out={tmp_path / 'run'}"
    assert (
        main(
            ["train", "configs/pretrain/debug.yaml", out, f"data.sources.0.url={stored}", f"data.cache={tmp_path}", "data.cache_gb=0.0003"]
        )
        == 2
    )
    assert "data.cache_gb 0.0003" in capfd.readouterr().err
