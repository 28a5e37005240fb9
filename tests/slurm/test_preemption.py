"""A job that is told to go saves the step it is in, goes back into the queue, and ends as if nothing had happened."""

import json
import random
import time
from pathlib import Path

import pytest

from slurm.notes import committed_step, notes
from tests.runs import Launcher, assert_same_end, free_port, losses, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launch, Say, reached, settled, train

pytestmark = pytest.mark.slurm
LONG = ["visits=200", "data.workers=2", "checkpoint.every=100000"]  # about 40 s of steps; nothing is saved but at a stop


def preempt(cluster: Cluster, job: str) -> None:
    """A job of a higher partition takes all nodes for a second."""
    high = cluster.ask("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: cluster.state(job) != "RUNNING", "the preemption", every=0.1)
    wait_for(lambda: cluster.state(high) == "COMPLETED", "the end of the job that preempted", every=0.1)


def test_ten_preemptions_lose_no_step_and_change_nothing(
    cluster: Cluster, launch: Launch, launcher: Launcher, icons_small: Path, tmp_path: Path, say: Say
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for child in launcher.ranks(2, train(whole, icons_small, *LONG), free_port()):
        child.finish()
    steps, draw = losses(whole)[-1][0], random.Random(time.time_ns())
    job, back = launch(*LONG), []
    for wanted in sorted(draw.sample(range(1, steps // 2), 10)):  # each takes some steps more to be heard; the last one is not to be late
        wait_for(lambda wanted=wanted: reached(folder, wanted) and cluster.state(job) == "RUNNING", f"step {wanted}", every=0.02)
        before, began = losses(folder)[-1][0], time.monotonic()
        preempt(cluster, job)
        saved = committed_step(folder)
        assert saved >= before and losses(folder)[-1][0] == saved, "the checkpoint is of the last step that was trained"
        wait_for(lambda saved=saved: reached(folder, saved + 1), "the next step", every=0.05)
        back.append(time.monotonic() - began)
    assert settled(cluster, job) == "COMPLETED"
    events = notes(folder)
    starts, saves = ([event["step"] for event in events if event["event"] == name] for name in ("start", "saved"))
    assert len(starts) == 11 and starts == [0, *saves] and cluster.restarts(job) == 10
    assert not [event for event in events if event["event"] == "crash"]
    assert_same_end(whole, folder)
    say(f"preempted at steps {saves} of {steps}; from the preemption to the next step {min(back):.0f} to {max(back):.0f} s")
    assert json.loads((folder / "result.json").read_text())["complete"]
