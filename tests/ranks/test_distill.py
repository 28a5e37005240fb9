"""Stage 2 on two ranks, in every ZeRO stage, killed and resumed: frozen and online teacher, critic and its optimizer, queues and banks."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.distributed.adversaries import FILE
from pipeline.run import RunConfig
from tests.distill import AMID, THREE, command, config, live
from tests.runs import Launcher, assert_same_end, free_port, kill_at, last_checkpoint, losses

STAGES = {
    "DDP": None,
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "persist_below": 100},
}


def made(digits: Path, colour: Path, out: Path, **engine: object) -> RunConfig:
    given = {"precision": "fp32", "threads": 1} | engine
    return config(digits, out, towers=THREE, objectives=AMID, teachers=live(colour), engine=given, checkpoint={"every": 4}, steps=14)


@pytest.fixture(scope="module")
def alone(launcher: Launcher, digits: Path, colour: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, not interrupted."""
    out = tmp_path_factory.mktemp("alone") / "run"
    launcher.run(command(made(digits, colour, out)))
    return out


def assert_same_training(run: Path, expected: Path) -> None:
    """Losses and gradients of every step, and what the objectives have gathered."""
    one, other = (np.array(losses(path)) for path in (run, expected))
    assert one.shape == other.shape and np.abs(one - other).max() < 2e-5
    here, there = (load_file(last_checkpoint(path) / "model.safetensors") for path in (run, expected))
    state = [name for name in there if ".contrast" in name]
    assert {name.split(".")[1] for name in state} == {"amid", "crd"}
    for name in state:
        assert np.allclose(here[name].numpy(), there[name].numpy(), atol=1e-3), name
    critics = [load_file(last_checkpoint(path) / FILE) for path in (run, expected)]
    for name in critics[0]:
        assert np.allclose(critics[0][name].numpy(), critics[1][name].numpy(), atol=1e-3), name


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "DDP" else pytest.mark.slow) for name in STAGES])
def test_two_ranks_train_like_one_process(launcher: Launcher, digits: Path, colour: Path, alone: Path, tmp_path: Path, name: str) -> None:
    given = command(made(digits, colour, tmp_path / "run", zero=STAGES[name]))
    for child in launcher.ranks(2, given, free_port()):
        child.finish()
    assert_same_training(tmp_path / "run", alone)


def test_a_killed_run_ends_like_an_uninterrupted_one(launcher: Launcher, digits: Path, colour: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = command(made(digits, colour, run))
    for steps in (5, 10):
        kill_at(steps, run, launcher.start(given, HOLD=str(steps)))
    launcher.run(given)
    assert_same_end(run, alone)
    assert (last_checkpoint(run) / FILE).read_bytes() == (last_checkpoint(alone) / FILE).read_bytes()


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_in_stage_2_resumes_bit_for_bit(launcher: Launcher, digits: Path, colour: Path, tmp_path: Path) -> None:
    for name, kills in (("whole", ()), ("killed", (5, 9))):
        given = command(made(digits, colour, tmp_path / name, zero={"stage": 2}))
        for steps in kills:
            kill_at(steps, tmp_path / "killed", *launcher.ranks(2, given, free_port(), HOLD=str(steps)))
        for child in launcher.ranks(2, given, free_port()):
            child.finish()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
