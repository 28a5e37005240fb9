"""The grid benchmark's own arithmetic: which cells there are, which are finished, and what is told first."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from benchmarks.selection import Cell, Grid, cells, finished, in_processes, matched
from benchmarks.selection_memory import run
from benchmarks.selection_tables import overview, plots, text, verdicts
from pipeline.config import ConfigError, dump, load, parse
from pipeline.run import RunConfig, build
from tests.runs import DEBUG, arguments, selection_log
from tools.make_shards import main as make_shards

ROOT = Path(__file__).parents[2]
GRID = {
    "config": "c.yaml",
    "out": "out",
    "sets": {"a": [], "b": []},
    "selectors": {"full": ["selector.name=keep_all"], "random": ["selector.name=random"], "blend": ["selector.name=blend"]},
    "ours": ["blend"],
    "whole": ["full"],
    "rates": [0.2, 0.5],
    "seeds": [0, 1],
    "matched": {"random": "blend"},
    "metric": "top1",
}


def done(cell: Cell, top1: float, seconds: float = 10.0) -> dict[str, Any]:
    """What a cell leaves."""
    numbers = dict.fromkeys(("t2i_r1", "t2i_r10", "precision", "never_clean", "cost"), 50.0)
    return cell._asdict() | {"top1": top1, "auc": None, "trained": 1000, "cpu_seconds": seconds, "digest": cell.digest} | numbers


def test_a_grid_has_every_cell_once_and_whole_rows_at_one_rate() -> None:
    grid = parse(Grid, GRID, "here")
    found = cells(grid)
    assert len(found) == len({cell.folder for cell in found}) == 2 * 2 * (1 + 2 + 2)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)  # whole seeds first
    assert "selector.rate=0.2" in found[1].overrides and found[1].overrides[-1] == "seed=0"


def test_a_finished_cell_is_kept_and_one_with_other_settings_is_not(tmp_path: Path) -> None:
    cell = cells(parse(Grid, GRID | {"out": str(tmp_path)}, "here"))[0]
    assert finished(cell) is None
    Path(cell.folder).mkdir(parents=True)
    (Path(cell.folder) / "cell.json").write_text(json.dumps(done(cell, 5.0)), encoding="utf-8")
    assert finished(cell)["top1"] == 5.0
    assert finished(cell._replace(overrides=[*cell.overrides, "visits=3"])) is None


def test_a_configuration_that_says_something_else_is_another_setting(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 0\n", encoding="utf-8")
    cell = cells(parse(Grid, GRID | {"config": str(tmp_path / "c.yaml")}, "here"))[0]
    before = cell.digest
    (tmp_path / "c.yaml").write_text("# which one does not matter\nseed:   0\n", encoding="utf-8")
    assert cell.digest == before
    (tmp_path / "c.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert cell.digest != before


def test_a_matched_cell_keeps_its_first_visits_and_no_other_settings(tmp_path: Path) -> None:
    values = GRID | {"out": str(tmp_path), "seeds": [0], "overrides": ["visits=16"]}

    def stretched(seconds: float, **change: Any) -> Cell:
        grid = parse(Grid, values | change, "here")
        return matched(grid, [done(c, 1.0, seconds if c.selector == "blend" else 10.0) for c in cells(grid)], 16)[0]

    cell = stretched(20.0)
    Path(cell.folder).mkdir(parents=True)
    (Path(cell.folder) / "cell.json").write_text(json.dumps(done(cell, 5.0)), encoding="utf-8")
    assert "visits=32.0" in cell.overrides and "visits=33.6" in stretched(21.0).overrides
    assert finished(cell)["top1"] == finished(stretched(21.0))["top1"] == 5.0
    assert finished(stretched(20.0, overrides=["visits=12"])) is None
    assert finished(stretched(20.0, overrides=["visits=16", "optimizer.lr=0.1"])) is None


@pytest.mark.parametrize(
    "override",
    [
        "scoring.precision=fp16",
        "init_from={run: elsewhere, towers: {student: student}}",
    ],
)
def test_what_the_grid_in_memory_does_not_have_is_refused(override: str, tmp_path: Path) -> None:
    config = load(RunConfig, DEBUG, ["engine.precision=fp32", f"out={tmp_path / 'run'}", override])
    with pytest.raises(ConfigError, match="memory: true"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_what_changes_from_visit_to_visit_is_not_decoded_once(icons_small: Path, tmp_path: Path) -> None:
    base = load(RunConfig, ROOT / "configs" / "pretrain" / "icons.yaml", [f"out={tmp_path}", f"data.sources=[{{url: {icons_small}}}]"])
    values = dump(base) | {"engine": {"precision": "fp32"}, "evaluation": {}}
    augmented = values | {"towers": {"student": values["towers"]["student"] | {"augmentation": {"scale": [0.8, 1.0]}}}}
    with pytest.raises(ConfigError, match="memory: true: decodes once, but image is augmented"):
        run(parse(RunConfig, augmented, "here"))
    with wds.TarWriter(str(tmp_path / "000.tar")) as writer:
        for i in range(32):
            writer.write({"__key__": f"{i:03d}", "png": b"none is read", "txt": "a star\nthe star"})
    assert make_shards(["tars", str(tmp_path / "index"), "--shards", str(tmp_path / "000.tar")]) == 0
    data = [f"data.sources=[{{url: {tmp_path}/index}}]", "data.batch=8", "data.groups=1", "data.lanes=1"]
    with pytest.raises(ConfigError, match="the 32 samples have 64 captions"):
        run(load(RunConfig, DEBUG, ["engine.precision=fp32", f"out={tmp_path / 'run'}", *data]))


SKIPPED = "data.skip={share: 0.5, after_visits: 1, lookahead: 5}"


@pytest.mark.parametrize(
    "options",
    [
        ["scoring.every=2", "scoring.precision=bf16"],
        ["objectives.clip.negatives=all", "selector.warmup_visits=1", SKIPPED],
        ["selector={name: info_batch, lookahead: 5}", "visits=5"],
        ["scoring.ahead=true", SKIPPED],
    ],
)
def test_the_grid_in_memory_gives_what_a_run_gives(options: list[str], icons_small: Path, tmp_path: Path) -> None:
    _, path, *given = arguments(icons_small, tmp_path / "run", "visits=3", *options)
    trainer, home = build(load(RunConfig, path, given))
    try:
        assert trainer.fit()
    finally:
        home.close(well=True)
    held = [f"out={tmp_path / 'cell'}", f"evaluation.data={icons_small}"]
    found, _ = run(load(RunConfig, path, [*given, *held]))
    told = trainer.progress
    assert found["loading_seconds"] > 0
    assert found["samples"] == {"scored": told.scored, "trained": told.trained} and told.scored < told.offered * 2
    logs = [selection_log(tmp_path / name).sort_by([("step", "ascending"), ("sample", "ascending")]) for name in ("run", "cell")]
    for column in ("step", "sample", "kept"):
        assert logs[0][column].equals(logs[1][column]), column
    assert np.allclose(*(log["score"].to_numpy() for log in logs), atol=1e-3, equal_nan=True)


def test_a_matched_row_gets_the_visits_that_the_median_ratio_buys() -> None:
    grid = parse(Grid, GRID, "here")
    seconds = {"blend": (15.0, 30.0), "random": (10.0, 10.0), "full": (20.0, 20.0)}
    ran = [done(cell, 1.0, seconds[cell.selector][cell.seed]) for cell in cells(grid)]
    more = matched(grid, ran, visits=16)
    assert {cell.selector for cell in more} == {"random+time"} and len(more) == 2 * 2 * 2
    assert all("visits=36.0" in cell.overrides for cell in more)  # the median of 1.5 and 3


def test_a_cell_in_memory_is_matched_with_the_loading_that_it_leaves_out() -> None:
    grid = parse(Grid, GRID | {"seeds": [0]}, "here")
    seconds = {"blend": 15.0, "random": 10.0, "full": 20.0}
    loading = {
        "blend": 4.0,
        "random": 25.0,
        "full": 10.0,
    }  # the same work, measured once in each run: the median of 4, 4, 10, 25, 25 stands for all
    ran = [done(cell, 1.0, seconds[cell.selector]) | {"loading_seconds": loading[cell.selector]} for cell in cells(grid)]
    assert all("visits=20.0" in cell.overrides for cell in matched(grid, ran, visits=16))
    del ran[0]["loading_seconds"]  # of a cell that ran before it was measured: then of none
    assert all("visits=24.0" in cell.overrides for cell in matched(grid, ran, visits=16))
    assert "| 10 |" in text({"grid": dump(grid), "cells": ran})


def test_losses_come_first_then_ties_and_everything_is_paired_by_seed(tmp_path: Path) -> None:
    grid = GRID | {"seeds": [0, 1, 2], "rates": [0.5], "sets": {"a": []}, "matched": {}}
    grid["selectors"] = GRID["selectors"] | {"close": ["selector.name=scan"]}
    tops = {"full": (9.0, 9.1, 8.9), "random": (5.0, 7.0, 6.1), "blend": (6.0, 6.5, 6.0)}
    tops |= {"close": (6.5, 6.6, 6.5)}  # 0.37 ± 0.13 above blend: more than two standard errors, and not Student's 4.3 of three seeds
    result = {"grid": grid, "cells": [done(cell, tops[cell.selector][cell.seed]) for cell in cells(parse(Grid, grid, "here"))]}
    told = verdicts(result)
    assert [(row["other"], row["verdict"]) for row in told] == [("full", "loses"), ("close", "ties"), ("random", "ties")]
    assert told[2]["difference"] == pytest.approx(0.4 / 3) and told[2]["error"] == pytest.approx(0.7767 / 3**0.5, abs=1e-4)
    assert (told[2]["wins"], told[2]["of"]) == (1, 3)
    assert {row["verdict"] for row in verdicts(result | {"cells": [cell for cell in result["cells"] if cell["seed"] == 0]})} == {""}
    flipped = result | {"grid": grid | {"metric": "t2i_r10"}}
    assert {row["difference"] for row in verdicts(flipped)} == {0} and "t2i_r10 in points" in text(flipped)
    page = text(result)
    assert page.index("| loses |") < page.index("| ties |") < page.index("| full | 3 |")
    assert "| a | 0.5 | top1 | **9.0 ± 0.1** | 6.0 ± 1.0 | 6.2 ± 0.3 | 6.5 ± 0.1 | full | close, random |" in overview([result])
    plots(result, tmp_path)
    assert (tmp_path / "selection_a.svg").stat().st_size > 5000


def test_the_grids_that_are_shipped_can_be_read() -> None:
    for path in sorted((ROOT / "benchmarks" / "grids").glob("*.yaml")):
        grid = load(Grid, path)
        assert set(grid.matched) | set(grid.matched.values()) | set(grid.ours) | set(grid.whole) <= set(grid.selectors), path


@pytest.mark.slow
def test_processes_say_which_run_failed_and_why(tmp_path: Path) -> None:
    cell = Cell("a", "random", 0.5, 0, str(tmp_path / "none.yaml"), str(tmp_path / "run"), [])
    with pytest.raises(RuntimeError, match=r"ended with 2:\n(.|\n)*none.yaml"):
        list(in_processes([cell], 1))
