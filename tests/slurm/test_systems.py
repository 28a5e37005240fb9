"""The further systems on a cluster, by their tiny configurations: chained stages, and a job that is told to go."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import ROOT, Launcher, assert_same_end, free_port, last_checkpoint, losses, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import FILE, reached, run, settled
from tests.slurm.test_preemption import preempt
from tools.make_shards import main as make_shards

pytestmark = pytest.mark.slurm
SHARDS = {
    "clips": ["--count", "128"],
    "items": ["--limit", "96", "--size", "32"],
    "icons": ["--limit", "128", "--size", "32"],
    "two_sensors": ["--limit", "64"],
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Small training shards of a source, made when first asked for."""
    top = tmp_path_factory.mktemp("systems")

    def shards(source: str) -> Path:
        if not (top / source).exists():
            assert make_shards([source, str(top / source), "--shard-size", "32", "--workers", "1", *SHARDS[source]]) == 0
        return top / source

    return shards


@pytest.fixture
def empty_after(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; afterwards its queue is empty."""
    yield cluster
    cluster.clear()


def shortened(data: Path, out: Path, steps: int) -> list[str]:
    """Overrides: a few steps on two ranks."""
    length = ["visits=null", f"steps={steps}", "record.log_every=1", "checkpoint.every=100000"]
    lanes = ["data.batch=16", "data.groups=2", "data.lanes=4", "data.window=2", "data.workers=0"]
    return [f"out={out}", f"data.sources=[{{url: {data}}}]", "evaluation.data=null", *length, *lanes]


def config(name: str) -> str:
    """A shipped configuration."""
    return str(ROOT / "configs" / "pretrain" / f"{name}.yaml")


def submit(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m slurm.launch` for the cluster of the tests."""
    done = run("slurm.launch", *arguments, "--cluster", str(FILE))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def job_of(folder: Path) -> str:
    """The number under which a run was submitted."""
    return json.loads((folder / "launch.json").read_text())["job"]


@pytest.mark.parametrize(
    ("first", "second", "sources", "kept"),
    [
        ("sfa_vivit_tiny_stage1", "sfa_vivit_tiny_stage2", ("clips", "clips"), ("student.spatial.", "student.spatial.")),
        ("icons", "notellm2_tiny", ("icons", "items"), ("student.model.visual.", "student.vision.")),
    ],
)
def test_a_system_of_two_stages_is_one_submission(
    empty_after: Cluster, made: Made, tmp_path: Path, first: str, second: str, sources: tuple[str, str], kept: tuple[str, str]
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    one, other = (shortened(made(source), folder, steps=4) for source, folder in zip(sources, folders))
    other.append(f"init_from.run={folders[0]}")
    submit(config(first), *one, "--then", config(second), *(word for change in other for word in ("--then-set", change)))
    for folder in folders:
        assert settled(empty_after, job_of(folder)) == "COMPLETED", [path.read_text() for path in folder.glob("launch/*.out")]
        assert json.loads((folder / "result.json").read_text())["complete"] and len(losses(folder)) == 4
        assert json.loads((folder / "facts.json").read_text())["world_size"] == 2
    before, after = (
        {
            key.partition(prefix)[2]: value
            for key, value in load_file(last_checkpoint(folder) / "model.safetensors").items()
            if prefix in key
        }
        for folder, prefix in zip(folders, kept)
    )
    assert after and all(value.equal(before[key]) for key, value in after.items()), "what the first stage learnt is frozen in the second"


def test_cromss_is_preempted_and_ends_as_if_it_had_not_been(empty_after: Cluster, launcher: Launcher, made: Made, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for child in launcher.ranks(2, ["train", config("cromss_tiny"), *shortened(made("two_sensors"), whole, steps=120)], free_port()):
        child.finish()
    submit(config("cromss_tiny"), *shortened(made("two_sensors"), folder, steps=120))
    job = job_of(folder)
    wait_for(lambda: reached(folder, 5), "step 5", every=0.02)
    preempt(empty_after, job)
    saved = losses(folder)[-1][0]
    assert 5 <= saved < 120
    assert settled(empty_after, job) == "COMPLETED" and empty_after.restarts(job) == 1
    assert_same_end(whole, folder)
