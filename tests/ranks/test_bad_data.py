"""Bad samples and unreadable shards where several ranks read: counted together, and no rank leaves the others waiting."""

import json
import shutil
from pathlib import Path

import pytest

from tests.ranks.test_ranks import assert_same_choices
from tests.runs import Child, Launcher, arguments, free_port


def damage(shards: Path, out: Path, count: int) -> Path:
    """A copy in which so many samples of every shard, or of the first one alone, have a caption that is not what was indexed."""
    shutil.copytree(shards, out)
    for tar in sorted(out.glob("*.tar"))[: None if count > 1 else 1]:
        data, place = bytearray(tar.read_bytes()), 0
        for _ in range(count):
            place = (data.index(b".txt\0", place) // 512 + 1) * 512  # the member's data begins in the block after its header
            data[place] ^= 1
        tar.write_bytes(bytes(data))
    return out


def pair(launcher: Launcher, data: Path, out: Path, *more: str) -> list[Child]:
    return launcher.ranks(2, arguments(data, out, *more), free_port())


def bad_of(run: Path) -> tuple[dict, list[float]]:
    """The counts of result.json, and `bad_share` of every log step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result["samples"]["bad"], [line["bad_share"] for line in lines if "bad_share" in line]


def test_bad_samples_of_all_ranks_are_counted(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    data, more = damage(icons_small, tmp_path / "data", 3), ("data.max_bad_fraction=0.5", "visits=3", "checkpoint.every=5")
    launcher.run(arguments(data, tmp_path / "one", *more))
    for child in pair(launcher, data, tmp_path / "two", *more):
        child.finish()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000009")
    for child in pair(launcher, data, tmp_path / "two", *more):  # what was counted before a resume counts once
        child.finish()
    counts, shares = bad_of(tmp_path / "one")
    assert counts["checksum"] > 12 * 2 and sum(counts.values()) == pytest.approx(64 * sum(shares))
    assert bad_of(tmp_path / "two") == (counts, pytest.approx(shares))
    assert_same_choices(tmp_path / "one", tmp_path / "two")


def test_a_rank_that_must_stop_takes_the_others_with_it(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    """One bad sample, read by one rank of two, and no allowance."""
    data = damage(icons_small, tmp_path / "data", 1)
    children = pair(launcher, data, tmp_path / "run", "data.max_bad_fraction=0", "stop.every=3")
    assert [child.wait() for child in children] == [2, 2]
    said = sorted((child.output() for child in children), key=lambda text: "another rank" in text)
    assert "more than data.max_bad_fraction 0.0 allows: checksum 1" in said[0]
    assert "another rank cannot go on with its data; its message says why" in said[1]
    assert not any("Traceback" in text for text in said)


def test_a_shard_that_only_one_rank_misses_stops_all_before_the_first_step(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(icons_small, data)
    first = sorted(data.glob("*.tar"))[0]
    first.write_bytes(b"\0" * first.stat().st_size)  # of the right size: noticed when it is read
    children = pair(launcher, data, tmp_path / "run", "data.max_bad_fraction=0.1")
    assert [child.wait() for child in children] == [2, 2]
    assert sum("another rank cannot go on" in child.output() for child in children) <= 1
