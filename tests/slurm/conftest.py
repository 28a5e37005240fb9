"""A real Slurm for the tests of this folder. Where it cannot run they are skipped with the reason; with CI=true they fail instead."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.config import read_yaml
from slurm.queue import ACTIVE
from tests.runs import DEBUG, PATIENCE, ROOT, Launcher, free_environment, free_port, losses, wait_for
from tests.slurm.cluster import Cluster, install

FILE = ROOT / "configs" / "cluster" / "cpu.yaml"
LOCAL = ROOT / "configs" / "cluster" / "local.yaml"
SHORT = ["visits=60", "data.workers=1", "checkpoint.every=20"]  # 187 steps, about 15 s
Launch = Callable[..., str]
Say = Callable[[str], None]


def cannot(reason: str) -> NoReturn:
    """Skips the test; fails it where CI=true: there it has to run."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to run the Slurm tests: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four idle nodes."""
    if reason := install():
        cannot(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def launch(cluster: Cluster, icons_small: Path, tmp_path: Path) -> Iterator[Launch]:
    """Launches configs/pretrain/debug.yaml into tmp_path/run as a user would, and gives the job's number; afterwards the queue is empty."""

    def start(*arguments: str, out: str = "run", code: int = 0) -> str:
        command = ["slurm.launch", str(DEBUG), "--cluster", str(FILE), f"out={tmp_path / out}", *settings(icons_small), *arguments]
        done = run(*command)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout.partition(": job ")[2].split()[0].rstrip(",") if code == 0 else done.stderr

    yield start
    cluster.clear()


@pytest.fixture(scope="session")
def short(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of SHORT without Slurm and without a fault."""
    out = tmp_path_factory.mktemp("short") / "run"
    for child in launcher.ranks(2, train(out, icons_small, *SHORT), free_port()):
        child.finish()
    return out


def settings(data: Path) -> list[str]:
    """A small run on given shards."""
    return [f"data.sources=[{{url: {data}}}]", "evaluation.data=null", "engine.threads=1"]


def follow(first: Path, path: Path) -> Path:
    """Writes the configuration of a second stage: the first one's weights to start from, and to learn from."""
    taught = {"init_from": {"run": str(first), "towers": {"student": "student"}}, "teachers": {"old": {"name": "live", "run": str(first)}}}
    kd = {"name": "feature_kd", "student": "image", "teacher": "old.image", "projector": "none"}
    taught |= {"objectives": {"clip": {"name": "clip"}, "kd": kd}}
    path.write_text(json.dumps(read_yaml(DEBUG.read_text()) | taught))
    return path


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m MODULE ...` in the repository."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=free_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)


def status(folder: Path) -> dict:
    """What `python -m slurm.status` tells of a run."""
    return json.loads(run("slurm.status", str(folder), "--json", "--tail", "20").stdout)


def train(out: Path, data: Path, *overrides: str) -> list[str]:
    """The command line of the same run without Slurm."""
    return ["train", str(DEBUG), f"out={out}", *settings(data), *overrides]


def reached(folder: Path, step: int) -> bool:
    """Whether the run has recorded a step."""
    return (folder / "metrics.jsonl").is_file() and any(line[0] >= step for line in losses(folder))


def settled(cluster: Cluster, job: str) -> str:
    """Waits until Slurm has finished with a job; its state. An empty answer is none: on a busy machine a question may time out.

    Longer than for one process: a job may start several times, and waits in between.
    """
    return wait_for(lambda: (state := cluster.state(job)) not in ("", *ACTIVE) and state, f"the end of job {job}", 3 * PATIENCE, 0.2)


@pytest.fixture
def say(capsys: pytest.CaptureFixture) -> Say:
    """Prints a measured figure past pytest's capture."""

    def out(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return out


def pytest_configure(config: pytest.Config) -> None:
    """The mark of what `make test` leaves out."""
    config.addinivalue_line("markers", "slurm: starts a real Slurm, minutes; `make test-slurm`")
