"""Time that is short: a limit that comes in the middle of a save, or before one can end."""

import time
from pathlib import Path

import pytest

from slurm.notes import committed_step, notes
from tests.runs import Launcher, assert_same_end, losses, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launch, Say, free_port, reached, settled, status, train

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


def test_a_time_limit_in_the_middle_of_a_save_is_a_pause(cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path, say: Say) -> None:
    folder, job = tmp_path / "run", launch(*SLOW_SAVES, "checkpoint.every=1", "--resource", "minutes=2")
    wait_for(lambda: reached(folder, 3), "step 3")
    before = unfinished(folder)
    saved = wait_for(lambda: unfinished(folder) - before, "the beginning of a save")
    began = time.monotonic()
    cluster.ask("scancel", "--signal=USR2", job)  # the signal of the time limit, at a moment of our choice
    assert saved <= unfinished(folder), "the save had ended: the test shows nothing"
    wait_for(lambda: cluster.state(job) != "RUNNING", "the requeue", every=0.1)
    taken = time.monotonic() - began
    assert settled(cluster, job) == "COMPLETED"
    events = notes(folder)
    saves, starts = ([event["step"] for event in events if event["event"] == name] for name in ("saved", "start"))
    assert saves and starts == [0, *saves] and cluster.restarts(job) == len(saves)
    assert_same_end(whole, folder)
    say(f"signal while {saved.pop().name} was being saved: requeued after {taken:.1f} s; stopped and resumed at {saves}")


def test_a_time_limit_that_leaves_no_time_to_save_loses_what_was_not_committed(
    cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path, say: Say
) -> None:
    # no vote between the signal and the limit, as after too short a signal_delay
    deaf = ["stop.every=1000000", "--resource", "minutes=1", "--resource", "signal_delay=1"]
    folder, job = tmp_path / "run", launch(*SLOW_SAVES, "checkpoint.every=1", *deaf)
    assert settled(cluster, job) == "TIMEOUT" and cluster.restarts(job) == 0
    kept, step, left = committed_step(folder), losses(folder)[-1][0], unfinished(folder)
    told = status(folder)
    assert (told["state"], told["saved"]) == ("timeout", kept) and "the same launch command goes on" in told["why"]
    assert kept >= step - 2 and [path.name for path in left] in ([], [f"step-{kept + 1:08d}"])
    other = launch(*SLOW_SAVES, "checkpoint.every=1000")
    assert settled(cluster, other) == "COMPLETED"
    assert [event["step"] for event in notes(folder) if event["event"] == "start"] == [0, kept]
    assert_same_end(whole, folder)
    say(f"time limit without time to save: killed at step {step} in the save of {[path.name for path in left]}, resumed at {kept}")
