"""`accelerate launch` with every file of configs/accelerate, on CPUs: without GPUs each file starts the same ranks over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.test_ranks import assert_same_choices
from tests.runs import PATIENCE, ROOT, arguments, command_line, free_environment, free_port

# stage 3 shards nothing of a linear model unless its threshold is lowered
STAGE_2, STAGE_3 = "engine.zero={stage: 2}", "engine.zero={stage: 3, persist_below: 100}"


def launch(file: str, *options: str) -> list[str]:
    """The command line up to and with `-m pipeline`; `options` are accelerate's own."""
    path = str(ROOT / "configs" / "accelerate" / f"{file}.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *options, "-m", "pipeline"]


def world_size(run: Path) -> int:
    return json.loads((run / "facts.json").read_text(encoding="utf-8"))["world_size"]


@pytest.mark.parametrize(
    ("file", "options", "engine", "ranks"),
    [
        ("cpu_2", (), "engine.zero=null", 2),
        ("one_gpu", (), "engine.zero=null", 1),
        pytest.param("zero2_node", ("--num_processes", "2"), STAGE_2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_file_of_one_machine_trains_like_one_process(
    trained: Path, icons_small: Path, tmp_path: Path, file: str, options: tuple[str, ...], engine: str, ranks: int
) -> None:
    port = ("--main_process_port", str(free_port()))
    done = command_line([*launch(file, *options, *port), *arguments(icons_small, tmp_path / "run", engine)])
    assert done.returncode == 0, done.stderr
    assert world_size(tmp_path / "run") == ranks
    assert_same_choices(trained, tmp_path / "run")


@pytest.mark.slow
def test_the_file_of_two_machines_trains_like_one_process(trained: Path, icons_small: Path, tmp_path: Path) -> None:
    """Two launches on this machine stand for two machines of one process each; the file's other settings are as they are."""
    where = ("--num_processes", "2", "--main_process_port", str(free_port()))
    training = arguments(icons_small, tmp_path / "run", STAGE_3)
    machines = [
        subprocess.Popen(
            [*launch("zero3_multinode", *where, "--machine_rank", str(rank)), *training],
            cwd=ROOT,
            env=free_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for machine in machines:
            _, said = machine.communicate(timeout=PATIENCE)
            assert machine.returncode == 0, said
    finally:
        for machine in machines:
            machine.kill()
    assert world_size(tmp_path / "run") == 2
    assert_same_choices(trained, tmp_path / "run")
