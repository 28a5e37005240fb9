"""What breaks on a cluster, on a real one: the run ends as if nothing had happened, or says loudly why not."""

import math
import signal
import time
from pathlib import Path

import pytest

from slurm.notes import committed_step, notes
from tests.runs import Launcher, assert_same_end, free_port, losses, selection_log, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launch, Say, reached, settled, train

pytestmark = pytest.mark.slurm
LONG = ["visits=200", "data.workers=1", "checkpoint.every=20"]  # 625 steps, about 40 s
LONGER = ["visits=800", "data.workers=1", "checkpoint.every=100000"]  # 2,500, so that no machine ends them before Slurm has looked around


@pytest.fixture(scope="module")
def whole(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without Slurm and without a fault."""
    return undisturbed(launcher, icons_small, tmp_path_factory.mktemp("whole") / "run", LONG)


@pytest.fixture(scope="module")
def whole_longer(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of LONGER."""
    return undisturbed(launcher, icons_small, tmp_path_factory.mktemp("whole_longer") / "run", LONGER)


def undisturbed(launcher: Launcher, data: Path, out: Path, overrides: list[str]) -> Path:
    """Trains two ranks to the end; the run's folder."""
    for child in launcher.ranks(2, train(out, data, *overrides), free_port()):
        child.finish()
    return out


def again(folder: Path, job: str, step: int, since: float) -> str:
    """Waits for a step; in words how long it took since a moment."""
    wait_for(lambda: reached(folder, step), f"step {step} of job {job}", every=0.05)
    return f"{time.monotonic() - since:.0f} s to the next step"


def test_a_killed_rank_ends_the_job_which_starts_again(cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path, say: Say) -> None:
    folder, job = tmp_path / "run", launch(*LONG)
    wait_for(lambda: reached(folder, 50) and committed_step(folder) >= 40, "step 50, and the checkpoint before it")
    (rank,) = cluster.ranks(cluster.nodes[1])
    saved, began = committed_step(folder), time.monotonic()
    cluster.kill(rank, signal.SIGKILL)
    wait_for(lambda: [e for e in notes(folder) if e["event"] == "crash"], "the crash", every=0.1)
    step, left = losses(folder)[-1][0], committed_step(folder)  # it is some seconds until the next start
    wait_for(lambda: len([e for e in notes(folder) if e["event"] == "start"]) == 2, "the second start", every=0.1)
    resumed = notes(folder)[-1]["step"]
    said = again(folder, job, step + 1, began)
    assert settled(cluster, job) == "COMPLETED"
    assert [event["event"] for event in notes(folder)] == ["start", "crash", "start", "end"]
    assert 40 <= saved <= resumed == left and step - resumed < 40  # 20 steps, and as many more while a save is under way
    assert_same_end(whole, folder)
    say(f"rank 1 killed at step {step}: resumed at {resumed}, {said}")


def test_a_run_that_dies_again_and_again_is_given_up(cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    folder, job = tmp_path / "run", launch(*LONG, "checkpoint.every=100000", "--resource", "crashes=1")
    for start in range(2):
        wait_for(lambda start=start: len([e for e in notes(folder) if e["event"] == "start"]) == start + 1, "a start", every=0.1)
        node = notes(folder)[-1]["nodes"][1]
        rank = wait_for(lambda node=node: cluster.ranks(node), "rank 1", every=0.1)[0]
        time.sleep(3)
        cluster.kill(rank, signal.SIGKILL)
    assert settled(cluster, job) == "FAILED"
    assert [event["event"] for event in notes(folder)] == ["start", "crash", "start", "end"]
    assert "2 times in a row without a checkpoint later than step 0" in next(folder.glob("launch/*_0_log.out")).read_text()


def test_a_crashed_node_is_left_for_others(cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path, say: Say) -> None:
    folder, job = tmp_path / "run", launch(*LONG)
    wait_for(lambda: reached(folder, 50), "step 50")
    began = time.monotonic()
    cluster.crash(cluster.nodes[1])
    step = losses(folder)[-1][0]
    try:
        said = again(folder, job, step + 1, began)
        assert settled(cluster, job) == "COMPLETED"
        starts = [event for event in notes(folder) if event["event"] == "start"]
        assert len(starts) >= 2 and cluster.nodes[1] in starts[0]["nodes"] and cluster.nodes[1] not in starts[-1]["nodes"]
        assert_same_end(whole, folder)
        say(f"node of rank 1 crashed at step {step}: {len(starts) - 1} restarts, resumed at {starts[-1]['step']}, {said}")
    finally:
        cluster.boot(cluster.nodes[1])
        wait_for(lambda: cluster.idle() == len(cluster.nodes), "the node", every=0.2)


def test_ranks_that_outlive_their_nodes_save_and_make_room(
    cluster: Cluster, launch: Launch, whole_longer: Path, tmp_path: Path, say: Say
) -> None:
    folder, job = tmp_path / "run", launch(*LONGER)
    wait_for(lambda: reached(folder, 20), "step 20")
    began = time.monotonic()
    for node in cluster.nodes[:2]:
        cluster.kill(cluster.daemon(node), signal.SIGKILL)
    try:
        wait_for(lambda: cluster.restarts(job), "Slurm to start it again", every=0.2)
        assert cluster.ranks(cluster.nodes[0]) and cluster.ranks(cluster.nodes[1]), "the ranks of the first start live on"
        wait_for(lambda: len([e for e in notes(folder) if e["event"] == "start"]) == 2, "the second start", every=0.1)
        taken = time.monotonic() - began
        wait_for(lambda: committed_step(folder) > 0, "the first start's last checkpoint", every=0.1)
        step = committed_step(folder)
        said = again(folder, job, step + 1, began)
        assert settled(cluster, job) == "COMPLETED"
        assert_same_end(whole_longer, folder)
        say(f"both slurmd killed, ranks live: second start after {taken:.0f} s, the first saved step {step} and left, {said}")
    finally:
        for node in cluster.nodes[:2]:
            cluster.crash(node)
            cluster.boot(node)
        wait_for(lambda: cluster.idle() == len(cluster.nodes), "the nodes", every=0.2)


def test_the_time_limit_is_a_pause(cluster: Cluster, launch: Launch, whole_longer: Path, tmp_path: Path, say: Say) -> None:
    # Slurm looks at limits twice a minute: one is set so that at its next look there are 60 to 150 seconds left
    folder, job = tmp_path / "run", launch(*LONGER, "--resource", "signal_delay=150")
    wait_for(lambda: reached(folder, 20), "step 20")
    cluster.ask("scontrol", "update", f"job={job}", f"TimeLimit={math.ceil((time.time() - notes(folder)[0]['time'] + 90) / 60)}")
    wait_for(lambda: [e for e in notes(folder) if e["event"] in ("saved", "end")], "the pause", every=0.1)
    cluster.ask("scontrol", "update", f"job={job}", "TimeLimit=60")
    assert settled(cluster, job) == "COMPLETED"
    events = notes(folder)
    saves, starts = ([event["step"] for event in events if event["event"] == name] for name in ("saved", "start"))
    assert saves and starts == [0, *saves] and cluster.restarts(job) == len(saves)
    assert_same_end(whole_longer, folder)
    say(f"time limit: stopped and resumed at steps {saves}")


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path) -> None:
    folder, job = tmp_path / "run", launch(*LONG, "checkpoint.every=100000")
    wait_for(lambda: reached(folder, 20), "step 20")
    cluster.ask("scancel", "--signal=TERM", job)  # what a preemption sends where Slurm does not pass on USR2: the job still runs
    wait_for(lambda: len([e for e in notes(folder) if e["event"] == "start"]) == 2, "the second start", every=0.1)
    first = committed_step(folder)
    wait_for(lambda: reached(folder, first + 20), "more steps")
    cluster.ask("scancel", job)
    wait_for(lambda: cluster.state(job) == "CANCELLED", "the end", every=0.1)
    assert committed_step(folder) > first and cluster.restarts(job) == 1
    time.sleep(8)  # a requeue would show by then
    assert cluster.state(job) == "CANCELLED" and cluster.restarts(job) == 1
    other = launch(*LONG, "checkpoint.every=100000")  # the same command goes on
    assert settled(cluster, other) == "COMPLETED"
    assert_same_end(whole, folder)


def test_a_restart_on_fewer_nodes_sees_the_same_samples(cluster: Cluster, launch: Launch, whole: Path, tmp_path: Path, say: Say) -> None:
    folder, job = tmp_path / "run", launch(*LONG)
    wait_for(lambda: reached(folder, 50), "step 50")
    cluster.ask("scancel", "--signal=USR2", job)
    wait_for(lambda: cluster.state(job) == "PENDING", "the requeue")
    cluster.ask("scontrol", "update", f"job={job}", "NumNodes=1", "NumTasks=1")
    wait_for(lambda: len([e for e in notes(folder) if e["event"] == "start"]) == 2, "the second start", every=0.1)
    assert settled(cluster, job) == "COMPLETED"
    starts = [event for event in notes(folder) if event["event"] == "start"]
    assert [start["world"] for start in starts] == [2, 1]
    step, before, after = starts[1]["step"], selection_log(whole), selection_log(folder)
    assert before["sample"].equals(after["sample"]) and before["step"].equals(after["step"])
    rows = before["step"].to_numpy() < step + 50
    same = (before["kept"].to_numpy() == after["kept"].to_numpy())[rows]
    assert same.mean() > 0.999  # the order of sums differs between 1 and 2 ranks, which may flip a pair at the edge
    assert losses(whole)[:step] == losses(folder)[:step]
    for here, there in zip(losses(whole)[step : step + 20], losses(folder)[step : step + 20]):
        assert here == pytest.approx(there, rel=1e-4)
    say(f"2 nodes -> 1 after step {step}: same samples, {(~same).sum()} of {rows.sum()} choices differ up to 50 steps later")
