"""selector.scope global: the rows of all ranks compete, and the choice is that of one process with one group."""

import json
from pathlib import Path

import pytest

from pipeline.config import names_in
from tests.ranks.test_ranks import assert_same_choices
from tests.runs import Launcher, arguments, columns, free_port, losses, selection_log


@pytest.fixture(scope="module")
def choices(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """By number of ranks: what every selector chose."""
    folder, found = tmp_path_factory.mktemp("choices"), {}
    for size in (1, 2, 4):
        for child in launcher.ranks(size, ["tests.ranks.choices", str(icons_small), str(folder / f"{size}.json")], free_port()):
            child.finish()
        found[size] = json.loads((folder / f"{size}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", names_in("pipeline.selection"))
def test_one_two_and_four_ranks_choose_the_same_samples(choices: dict[int, dict], name: str) -> None:
    one, two, four = (choices[size][name] for size in (1, 2, 4))
    assert one["kept"] == two["kept"] == four["kept"]
    assert one["table"] == two["table"] == four["table"]
    if name not in ("keep_all", "info_batch"):
        assert {len(kept) for kept in one["kept"]} == {64, 16}
        assert one["padded"] == 0 < two["padded"] < four["padded"]


def test_two_ranks_train_like_one_process_with_one_group(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    launcher.run(arguments(icons_small, tmp_path / "group", "data.groups=1"))
    launcher.run(arguments(icons_small, tmp_path / "one", "selector.scope=global"))
    for child in launcher.ranks(2, arguments(icons_small, tmp_path / "two", "selector.scope=global"), free_port()):
        child.finish()
    assert losses(tmp_path / "one") == losses(tmp_path / "group")
    for run in ("one", "two"):
        assert_same_choices(tmp_path / "group", tmp_path / run)
    here, there = (losses(tmp_path / run) for run in ("one", "two"))
    assert max(abs(a[1] - b[1]) for a, b in zip(here, there)) < 1e-5
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert {line["kept_share"] for line in lines[:4] if "loss" in line} == {1.0} and lines[-1]["kept_share"] == 0.5
    assert max(line["padded_share"] for line in lines if "loss" in line) > 0
    kept = columns(selection_log(tmp_path / "two"))["kept"]
    assert kept[-64:].sum() == 32
