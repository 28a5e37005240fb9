"""Time that is short, and clocks that differ: a time limit that comes in the middle of a save, and ranks whose hosts disagree by days."""

import os
import signal
import time
from pathlib import Path

import pytest

from slurm.notes import committed_step, notes
from tests.runs import Launcher, assert_same_end, free_port, losses, wait_for
from tests.slurm.cluster import Cluster, faketime
from tests.slurm.conftest import SHORT, Launch, Say, reached, settled, status, train

pytestmark = pytest.mark.slurm
SLOW_SAVES = ["towers.student.width=8192", "steps=40", "visits=", "data.workers=1"]  # 180 MB a checkpoint


@pytest.fixture(scope="module")
def whole(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of SLOW_SAVES without Slurm, saved once."""
    out = tmp_path_factory.mktemp("slow") / "run"
    for child in launcher.ranks(2, train(out, icons_small, *SLOW_SAVES, "checkpoint.every=1000"), free_port()):
        child.finish()
    return out


def unfinished(folder: Path) -> set[Path]:
    """Checkpoints that are being written, or were when their writer died."""
    return {path for path in (folder / "checkpoints").glob("step-*") if not (path / "COMMIT").is_file()}


def stopped_in_a_save(cluster: Cluster, ranks: list[int], folder: Path) -> set[Path]:
    """Stops the ranks while they write a checkpoint, however fast the disk; which one."""
    while True:
        before = unfinished(folder)
        saved = wait_for(lambda: unfinished(folder) - before, "the beginning of a save")  # noqa: B023
        for rank in ranks:
            cluster.kill(rank, signal.SIGSTOP)
        if saved <= unfinished(folder):
            return saved
        for rank in ranks:
            cluster.kill(rank, signal.SIGCONT)


def test_a_time_limit_in_the_middle_of_a_save_is_a_pause(cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path, say: Say) -> None:
    folder, job = tmp_path / "run", launch(*SLOW_SAVES, "checkpoint.every=1")
    wait_for(lambda: reached(folder, 3), "step 3")
    ranks = [cluster.ranks(node)[0] for node in cluster.nodes[:2]]
    saved = stopped_in_a_save(cluster, ranks, folder)
    began = time.monotonic()
    cluster.ask("scancel", "--signal=USR2", job)  # the signal of the time limit, at a moment of our choice
    for rank in ranks:
        cluster.kill(rank, signal.SIGCONT)  # Slurm sends it with every signal
    wait_for(lambda: cluster.state(job) != "RUNNING", "the requeue", every=0.1)
    taken = time.monotonic() - began
    assert settled(cluster, job) == "COMPLETED"
    events = notes(folder)
    saves, starts = ([event["step"] for event in events if event["event"] == name] for name in ("saved", "start"))
    assert saves and starts == [0, *saves] and cluster.restarts(job) == len(saves)
    assert_same_end(whole, folder)
    say(f"signal while {saved.pop().name} was being saved: requeued after {taken:.1f} s; stopped and resumed at {saves}")


def test_a_time_limit_that_leaves_no_time_to_save_loses_what_was_not_committed(
    cluster: Cluster, launch: Launch, tmp_path: Path, say: Say
) -> None:
    # no vote between the signal and the limit, as after too short a signal_delay
    deaf = ["stop.every=1000000", "--resource", "minutes=1", "--resource", "signal_delay=1"]
    endless = [*SLOW_SAVES, "checkpoint.every=1", "steps=100000"]
    folder, job = tmp_path / "run", launch(*endless, *deaf)
    assert settled(cluster, job) == "TIMEOUT" and cluster.restarts(job) == 0
    kept, step, left = committed_step(folder), losses(folder)[-1][0], unfinished(folder)
    told = status(folder)
    assert (told["state"], told["saved"]) == ("timeout", kept) and "the same launch command goes on" in told["why"]
    assert kept >= step - 2
    launch(*endless)
    wait_for(lambda: reached(folder, step + 2), "more steps", every=0.1)
    assert [event["step"] for event in notes(folder) if event["event"] == "start"] == [0, kept]
    steps = [line[0] for line in losses(folder)]
    assert steps == list(range(1, len(steps) + 1)), "no step is there twice"
    say(f"time limit without time to save: killed at step {step} in the save of {[path.name for path in left]}, resumed at {kept}")


def test_ranks_whose_clocks_differ_train_stop_and_resume_all_the_same(
    cluster: Cluster, launch: Launch, short: Path, tmp_path: Path, say: Say
) -> None:
    skew = {0: -2 * 3600, 1: 3 * 86400}  # seconds
    prolog = tmp_path / "prolog"  # slurmstepd runs it before each rank, and sets the variables that it prints
    cases = " ".join(f"{rank}) echo export FAKETIME={seconds:+d}s;;" for rank, seconds in skew.items())
    prolog.write_text(f"#!/bin/sh\necho export LD_PRELOAD={faketime()}\ncase $SLURM_PROCID in {cases} esac\n")
    prolog.chmod(0o755)
    folder = tmp_path / "run"
    job = launch(*SHORT, "checkpoint.every=100000", "watchdog.timeout=30", "--resource", f"srun=[--task-prolog={prolog}]")
    wait_for(lambda: reached(folder, 10), "step 10")  # there is something to do before it ends
    for rank, node in enumerate(cluster.nodes[:2]):
        (process,) = cluster.ranks(node)
        assert f"FAKETIME={skew[rank]:+d}s" in Path(f"/proc/{process}/environ").read_text().split("\0")
        assert faketime() in Path(f"/proc/{process}/maps").read_text()
    assert notes(folder)[0]["time"] - os.stat(folder / "launch.json").st_mtime == pytest.approx(skew[0], abs=600)
    told = status(folder)
    assert 0 < told["eta_seconds"] < 3600 and told["state"] == "running"
    step, began = losses(folder)[-1][0], time.monotonic()
    cluster.ask("scancel", "--signal=USR2", job)
    wait_for(lambda: len([e for e in notes(folder) if e["event"] == "start"]) == 2, "the second start", every=0.1)
    saved = notes(folder)[-1]["step"]
    wait_for(lambda: reached(folder, saved + 1), "the next step", every=0.05)
    taken = time.monotonic() - began
    assert settled(cluster, job) == "COMPLETED" and cluster.restarts(job) == 1
    assert saved >= step and [event["event"] for event in notes(folder)] == ["start", "saved", "start", "end"]
    assert not list(folder.glob("hang-*"))
    assert_same_end(short, folder)
    say(f"clocks 2 h behind and 3 days ahead: stopped and resumed at step {saved}, {taken:.0f} s to the next step")
