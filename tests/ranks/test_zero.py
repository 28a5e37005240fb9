"""ZeRO stages, offload and gradient accumulation on gloo ranks: the losses and choices of one process, at a share of the memory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.distributed import checkpoint
from tests.runs import Launcher, assert_same_end, columns, free_port, kill_at, last_checkpoint, losses, selection_log

ZERO = {
    "stage 0": "{stage: 0}",
    "stage 1": "{stage: 1}",
    "stage 1, optimizer on the host": "{stage: 1, offload: optimizer}",
    "stage 2": "{stage: 2}",
    "stage 2, optimizer on the host": "{stage: 2, offload: optimizer}",
    "stage 3": "{stage: 3, persist_below: 100}",
    "stage 3, optimizer on the host": "{stage: 3, persist_below: 100, offload: optimizer}",
    "stage 3, all on the host": "{stage: 3, offload: all}",
}
ELASTIC = ("data.groups=4", "steps=170", "checkpoint.every=5")


def start_cells(launcher: Launcher, size: int, out: Path, data: Path, cells: dict[str, list[str]], **environment: str) -> list:
    """The ranks of one launch that trains all cells."""
    command = ["tests.ranks.cells", str(out), str(data), json.dumps(cells)]
    return launcher.ranks(size, command, free_port(), **environment) if size > 1 else [launcher.start(command, **environment)]


def run_cells(launcher: Launcher, size: int, out: Path, data: Path, cells: dict[str, list[str]]) -> dict[str, dict]:
    """Trains all cells; gives what rank 0 saw of each."""
    for child in start_cells(launcher, size, out, data, cells):
        child.finish()
    return {name: json.loads((out / name / "seen.json").read_text(encoding="utf-8")) for name in cells}


@pytest.fixture(scope="module")
def alone(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of one process without DeepSpeed."""
    out = tmp_path_factory.mktemp("alone")
    run_cells(launcher, 1, out, icons_small, {"run": []})
    return out / "run"


def assert_same_training(run: Path, expected: Path) -> float:
    """The same samples offered and chosen at every step, losses within 1e-5; gives the largest difference."""
    here, there = columns(selection_log(run)), columns(selection_log(expected))
    for name in ("step", "visit", "sample", "kept"):
        assert np.array_equal(here[name], there[name]), (run.name, name)
    assert len(losses(run)) == len(losses(expected))
    worst = max(abs(a[1] - b[1]) for a, b in zip(losses(run), losses(expected)))
    assert worst < 1e-5, (run.name, worst)
    return worst


def test_two_ranks_of_stage_2_in_pieces_train_like_one_process(launcher: Launcher, icons_small: Path, alone: Path, tmp_path: Path) -> None:
    seen = run_cells(launcher, 2, tmp_path, icons_small, {"run": ["engine.zero={stage: 2}", "engine.micro_batch=5"]})["run"]
    assert_same_training(tmp_path / "run", alone)
    whole = 8 * seen["parameters"]
    assert sum(seen["optimizer_bytes"]) == pytest.approx(whole, rel=0.01) and max(seen["optimizer_bytes"]) < 0.51 * whole
    files = {path.name for path in last_checkpoint(tmp_path / "run").glob("*.safetensors")}
    assert files == {"model.safetensors", "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"}
    assert not list((tmp_path / "run").rglob("*.pt"))  # nothing of DeepSpeed's own, which is pickled


@pytest.mark.slow
def test_every_stage_offload_and_accumulation_trains_like_one_process(
    launcher: Launcher, icons_small: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cells = {"DDP": [], "DDP, in pieces": ["engine.micro_batch=5"]}
    for name, zero in ZERO.items():
        cells |= {name: [f"engine.zero={zero}"], f"{name}, in pieces": [f"engine.zero={zero}", "engine.micro_batch=5"]}
    seen = run_cells(launcher, 2, tmp_path, icons_small, cells)
    lines = []
    for name, facts in seen.items():
        worst = assert_same_training(tmp_path / name, alone)
        share = max(facts["optimizer_bytes"]) / (8 * facts["parameters"])
        assert share < (0.51 if "stage" in name and "stage 0" not in name else 1.01), name
        assert (facts["weights_here"] < facts["parameters"]) == ("stage 3" in name), name
        if "stage 3" in name and "pieces" not in name:
            assert facts["complete_traces"] == ["training", "scoring"], name  # the scoring pass does not break the training trace
        lines.append(f"{name:45} largest difference of a loss {worst:.1e}, optimizer bytes of a rank {share:.3f} of all")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(launcher: Launcher, icons_small: Path, alone: Path, tmp_path: Path) -> None:
    checkpointing, stage_3 = "towers.student.gradient_checkpointing=true", "engine.zero={stage: 3, persist_below: 100}"
    cells = {
        "DDP": [checkpointing],
        "stage 2": [checkpointing, "engine.zero={stage: 2}"],
        "stage 3": [checkpointing, stage_3],
        "stage 3, in pieces": [checkpointing, stage_3, "engine.micro_batch=5"],
    }
    run_cells(launcher, 2, tmp_path, icons_small, cells)
    for name in cells:
        assert_same_training(tmp_path / name, alone)


@pytest.mark.slow
def test_compiled_blocks_train_like_plain_ones(launcher: Launcher, icons_small: Path, alone: Path, tmp_path: Path) -> None:
    compiled = "engine.compile=true"
    run_cells(launcher, 1, tmp_path / "one", icons_small, {"alone": [compiled]})
    cells = {
        "DDP": [compiled],
        "stage 2": [compiled, "engine.zero={stage: 2}"],
        "stage 3": [compiled, "engine.zero={stage: 3, persist_below: 100}"],
    }
    run_cells(launcher, 2, tmp_path / "two", icons_small, cells)
    for run in (tmp_path / "one" / "alone", *(tmp_path / "two" / name for name in cells)):
        assert_same_training(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["{stage: 1}", "{stage: 2}", "{stage: 3, persist_below: 100}", "{stage: 3, offload: all}"])
def test_bf16_trains_in_every_stage(launcher: Launcher, icons_small: Path, tmp_path: Path, zero: str) -> None:
    cells = {"DDP": ["engine.precision=bf16"], "ZeRO": ["engine.precision=bf16", f"engine.zero={zero}"]}
    run_cells(launcher, 2, tmp_path, icons_small, cells)
    one, other = (np.array(losses(tmp_path / name))[:, 1] for name in cells)
    assert np.abs(one - other)[:5].max() < 0.02 and np.abs(one - other).max() < 0.2  # bf16's rounding may flip a choice


@pytest.mark.slow
def test_memory_of_the_optimizer_falls_as_one_over_ranks(
    launcher: Launcher, icons_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = []
    for size in (1, 2, 4):
        cells = {
            f"{size} ranks, stage {stage}": ["data.groups=4", f"engine.zero={{stage: {stage}, persist_below: 100}}"] for stage in (1, 2, 3)
        }
        for name, facts in run_cells(launcher, size, tmp_path, icons_small, cells).items():
            share = max(facts["optimizer_bytes"]) / (8 * facts["parameters"])
            assert share == pytest.approx(1 / size, rel=0.02), name
            lines.append(f"{name}: {max(facts['optimizer_bytes'])} bytes, {share:.3f} of all")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def kill_after(launcher: Launcher, size: int, out: Path, data: Path, cell: list[str], steps: int) -> int:
    """Starts a run, kills every rank with SIGKILL after so many steps of the whole run; gives the step of the newest checkpoint."""
    kill_at(steps, out / "run", *start_cells(launcher, size, out, data, {"run": cell}, HOLD=str(steps)))
    return checkpoint.newest(out / "run")[1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["{stage: 2}", "{stage: 3, persist_below: 100}"])
def test_a_killed_run_resumes_bit_for_bit(launcher: Launcher, icons_small: Path, tmp_path: Path, zero: str) -> None:
    cell = [f"engine.zero={zero}", "checkpoint.every=4", "steps=30"]
    run_cells(launcher, 2, tmp_path / "whole", icons_small, {"run": cell})
    for steps in (7, 18):
        kill_after(launcher, 2, tmp_path / "killed", icons_small, cell, steps)
    run_cells(launcher, 2, tmp_path / "killed", icons_small, {"run": cell})
    assert_same_end(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


@pytest.mark.slow
def test_four_ranks_then_two_then_one_go_on_with_the_same_samples_and_choices(
    launcher: Launcher, icons_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stage = {4: "engine.zero={stage: 2}", 2: "engine.zero={stage: 3, persist_below: 100}", 1: "engine.zero=null"}
    run_cells(launcher, 4, tmp_path / "whole", icons_small, {"run": [*ELASTIC, stage[4]]})
    changes = []
    for size, steps in ((4, 40), (2, 100)):
        changes.append(kill_after(launcher, size, tmp_path / "elastic", icons_small, [*ELASTIC, stage[size]], steps))
    assert run_cells(launcher, 1, tmp_path / "elastic", icons_small, {"run": [*ELASTIC, stage[1]]})["run"]["start"] == changes[-1]
    runs = [tmp_path / name / "run" for name in ("elastic", "whole")]
    here, there = (columns(selection_log(run)) for run in runs)
    assert np.array_equal(here["step"], there["step"]) and np.array_equal(here["sample"], there["sample"])
    flipped = here["step"][here["kept"] != there["kept"]]
    apart = np.abs(np.array(losses(runs[0]))[:, 1] - np.array(losses(runs[1]))[:, 1]).max()
    tables = [np.concatenate([pq.read_table(p)["score"] for p in sorted(last_checkpoint(run).glob("lanes-*"))]) for run in runs]
    with capsys.disabled():
        first = int(flipped.min()) if len(flipped) else "none"
        print(f"\n4 ranks -> 2 at step {changes[0]} -> 1 at step {changes[1]}: first choice that differs: {first}; ", end="")
        print(f"losses differ by at most {apart:.1e}, scores by {np.abs(tables[0] - tables[1]).max():.1e}")
    for change in changes:
        assert not ((flipped >= change) & (flipped < change + 50)).any()
    assert np.abs(tables[0] - tables[1]).max() < 1e-3


@pytest.mark.slow
def test_a_checkpoint_of_any_stage_is_read_by_any_other(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    stages = {"none": "null", "one": "{stage: 1, offload: optimizer}", "three": "{stage: 3, persist_below: 100}"}
    run_cells(launcher, 2, tmp_path, icons_small, {name: [f"engine.zero={zero}", "checkpoint.every=10"] for name, zero in stages.items()})
    cells = {}
    for source in stages:
        for target, zero in stages.items():
            copy = shutil.copytree(tmp_path / source, tmp_path / f"{source} to {target}")
            shutil.rmtree(copy / "checkpoints" / "step-00000020")
            cells[copy.name] = [f"engine.zero={zero}"]
    assert {facts["start"] for facts in run_cells(launcher, 2, tmp_path, icons_small, cells).values()} == {10}
    for name in cells:
        assert_same_training(tmp_path / name, tmp_path / "none")
