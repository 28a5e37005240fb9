"""The half of a save that runs beside training: killed, out of room, slow, or not to be committed. Two ranks are two processes."""

import errno
import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.distributed import checkpoint
from pipeline.distributed.checkpoint import CheckpointConfig, CheckpointError
from pipeline.distributed.comm import LocalComm
from pipeline.distributed.host import Files, Host
from pipeline.distributed.lock import Lock, Owner
from pipeline.distributed.saver import Saver
from tests.runs import Launcher, arguments, assert_same_end, free_port, last_checkpoint, losses, wait_for


class Gate:
    """A file whose writing takes as long as the test wants, with the value that the loop had when it was copied."""

    def __init__(self) -> None:
        self.open, self.writing = threading.Event(), threading.Event()
        self.value = torch.zeros(4)

    def share(self, host: Host) -> Files:
        held = host.take("value", self.value)

        def write(path: Path) -> None:
            self.writing.set()
            assert self.open.wait(60)
            path.write_text(str(held.tolist()))

        return {"slow": write}


@pytest.fixture
def gate() -> Iterator[Gate]:
    found = Gate()
    yield found
    found.open.set()


def commits(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("checkpoints/*/COMMIT"))


def test_training_goes_on_beside_a_save_and_the_next_one_waits_for_it(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(CheckpointConfig(), tmp_path, LocalComm())
    saver.save(1, {}, gate.share)
    assert gate.writing.wait(60) and not commits(tmp_path)
    gate.value += 1  # what the next step does to the weights
    second = threading.Thread(target=lambda: (saver.wait(), saver.save(2, {}, gate.share), saver.wait()))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not (tmp_path / "checkpoints" / "step-00000002").exists()
    gate.open.set()
    second.join(60)
    assert commits(tmp_path) == ["step-00000001", "step-00000002"]
    texts = [(tmp_path / "checkpoints" / step / "slow").read_text() for step in commits(tmp_path)]
    assert texts == [str([0.0] * 4), str([1.0] * 4)]
    for step in commits(tmp_path):
        assert sorted(path.name for path in (tmp_path / "checkpoints" / step).iterdir()) == ["COMMIT", "run.json", "slow"]
        checkpoint.verify(tmp_path / "checkpoints" / step)


def test_the_host_memory_is_the_same_at_every_save_unless_nothing_is_kept() -> None:
    weight, whole = torch.zeros(3, 4), torch.zeros(10)
    kept, passing = Host(keep=True), Host(keep=False)
    first = kept.take("w", weight)
    weight += 1
    assert torch.equal(first, weight - 1) and kept.take("w", weight) is first and torch.equal(first, weight)
    assert passing.take("w", weight).data_ptr() == weight.data_ptr()  # written from where it is
    assert passing.take("p", whole[2:5], copy=True).untyped_storage().nbytes() == 12  # nothing else is written with it


def test_a_wait_moves_for_the_watchdog_while_its_thread_does(tmp_path: Path, gate: Gate) -> None:
    saver, turns = Saver(CheckpointConfig(), tmp_path, LocalComm()), []

    def busy(path: Path) -> None:
        while saver.moved < 5:
            turns.append(hashlib.sha256(bytes(50_000_000)))  # one call that lasts longer than a look
        path.write_text("")

    saver.save(1, {}, lambda host: {"busy": busy})
    assert saver.moved == 0  # only a loop that waits may point at the thread
    saver.wait()
    saver.save(2, {}, gate.share)
    assert gate.writing.wait(60)
    before, waiting = saver.moved, threading.Thread(target=saver.wait)
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive() and saver.moved <= before + 2  # the thread stands still, and so does who waits for it
    gate.open.set()
    waiting.join(60)


def test_a_folder_that_another_process_has_taken_gets_no_commit(tmp_path: Path, gate: Gate) -> None:
    lock = Lock(tmp_path)
    saver = Saver(CheckpointConfig(), tmp_path, LocalComm(), lock.taken)
    gate.open.set()
    saver.save(1, {}, gate.share)
    saver.wait()
    other = Owner("7", 2, "node9", 123)
    (tmp_path / "run.owner").write_text(json.dumps(other))  # one that only waits for this one to leave
    saver.save(2, {}, gate.share)
    saver.wait()
    (tmp_path / "run.lock").write_text(json.dumps(other))  # one that went on, as it can where there are no locks
    saver.save(3, {}, gate.share)
    with pytest.raises(CheckpointError, match=r"step-00000003: not committed, because start 2 of job 7 \(process 123 on node9\) trains in"):
        saver.wait()
    assert commits(tmp_path) == ["step-00000001", "step-00000002"]
    assert (tmp_path / "checkpoints" / "step-00000003").exists()  # perhaps the other one's


def test_a_disk_that_is_full_for_the_log_is_agreed_on_before_ranks_share(tmp_path: Path) -> None:
    shared = []

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-00000001: could not be written .*make room"):
        Saver(CheckpointConfig(), tmp_path, LocalComm()).save(1, {}, lambda host: shared.append(host) or {}, full)
    assert not shared and not (tmp_path / "checkpoints" / "step-00000001").exists()


def test_a_checkpoint_stays_when_an_older_one_cannot_be_removed(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(f"{folder}")

    gate.open.set()
    saver = Saver(CheckpointConfig(keep=1, asynchronous=False), tmp_path, LocalComm())
    saver.save(1, {}, gate.share)
    monkeypatch.setattr(checkpoint, "remove", refuse)
    with pytest.raises(CheckpointError, match="PermissionError"):
        saver.save(2, {}, gate.share)
    assert commits(tmp_path) == ["step-00000001", "step-00000002"]
    checkpoint.verify(tmp_path / "checkpoints" / "step-00000002")


def test_an_error_of_training_lets_the_save_under_way_become_whole(tmp_path: Path, gate: Gate) -> None:
    with pytest.raises(ValueError), Saver(CheckpointConfig(), tmp_path, LocalComm()) as saver:
        saver.save(1, {}, gate.share)
        threading.Timer(0.2, gate.open.set).start()
        raise ValueError("of the loop")
    assert commits(tmp_path) == ["step-00000001"]


# what SLOW names ("step-00000012 5.0 1") takes so many seconds to write, on that rank; on the rank FULL no file grows beyond 100 kB after the first COMMIT
LAB = """
import os, resource, time
from pathlib import Path
from pipeline.distributed import saver, state
from pipeline.towers import linear

inner, (step, seconds, rank) = state.save_file, os.environ.get("SLOW", "none 0 0").split()
saver.LAST_WORDS = 1.0


def save_file(tensors, path, metadata=None):
    inner(tensors, path, metadata)
    if path.parent.name == step and os.environ.get("RANK", "0") == rank:
        Path(os.environ["SAYS"]).touch()
        time.sleep(float(seconds))


state.save_file = save_file


class Config(linear.Config):
    def build(self, folder):
        tower = super().build(folder)

        def full(*_):
            if os.environ["RANK"] == os.environ["FULL"] and any(folder.glob("checkpoints/*/COMMIT")):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

        if "FULL" in os.environ:
            tower.register_forward_hook(full)
        return tower
"""


@pytest.fixture
def command(icons_small: Path, tmp_path: Path) -> list[str]:
    """Trains into tmp_path / "run", with a checkpoint every 6 of its 18 steps."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "saving.py").write_text(LAB)
    return arguments(icons_small, tmp_path / "run", "checkpoint.every=6", "towers={student: {name: lab.saving}}")


def test_a_run_killed_while_its_thread_writes_goes_on_from_the_checkpoint_before(
    launcher: Launcher, trained: Path, tmp_path: Path, command: list[str]
) -> None:
    run, says = tmp_path / "run", tmp_path / "writes"
    child = launcher.start(command, PYTHONPATH=str(tmp_path), SLOW="step-00000012 3600 0", SAYS=str(says))
    wait_for(lambda: child.poll() is not None or (says.exists() and len(losses(run)) > 14), "steps beside a save")
    assert child.kill(signal.SIGKILL) and child.wait() == -signal.SIGKILL
    assert commits(run) == ["step-00000006"] and (run / "checkpoints" / "step-00000012" / "model.safetensors").exists()
    says.unlink()
    launcher.run(command, PYTHONPATH=str(tmp_path), SLOW="step-00000018 1.5 0", SAYS=str(says))  # the process does not leave before
    assert says.exists() and commits(run) == ["step-00000012", "step-00000018"]
    assert_same_end(run, trained)


def test_a_rank_that_dies_while_it_writes_keeps_nobody_waiting(launcher: Launcher, tmp_path: Path, command: list[str]) -> None:
    says = tmp_path / "writes"
    slow = {"PYTHONPATH": str(tmp_path), "SLOW": "step-00000012 3600 1", "SAYS": str(says)}
    first, second = launcher.ranks(2, [*command, "visits=60"], free_port(), **slow)
    wait_for(lambda: first.poll() is not None or says.exists(), "the write of rank 1")
    assert second.kill(signal.SIGKILL) and second.wait() == -signal.SIGKILL
    assert first.wait() != 0  # its own files are written, those of the other never come
    assert commits(tmp_path / "run") == ["step-00000006"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000012" / "done-00000.json").exists()


@pytest.mark.parametrize("rank", [1, 0])
def test_a_disk_that_is_full_for_one_rank_stops_all_of_them(launcher: Launcher, tmp_path: Path, command: list[str], rank: int) -> None:
    run = tmp_path / "run"
    ranks = launcher.ranks(2, [*command, "visits=60"], free_port(), PYTHONPATH=str(tmp_path), FULL=str(rank))
    said = []
    for child in ranks:
        assert child.wait() == 2, child.output()
        said.append(child.output())
    assert "could not be written (" in said[rank] and "make room, or lower checkpoint.keep" in said[rank]
    assert "could not be written by another rank; its message says why. Earlier checkpoints stay as they were" in said[1 - rank]
    assert commits(run) and sorted(path.name for path in run.glob("checkpoints/*")) == commits(run)  # what was cut off makes room
    assert checkpoint.newest(run)[0] == last_checkpoint(run) and len(losses(run)) < 180
