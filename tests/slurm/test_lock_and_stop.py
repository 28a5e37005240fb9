"""Two starts of one job on one folder, and signals that come before there is anything to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.distributed import stop
from pipeline.distributed.comm import LocalComm
from pipeline.distributed.lock import Lock
from pipeline.distributed.stop import Stop, StopConfig, listen
from pipeline.trainer import Trainer
from slurm.notes import is_locked
from tests.distill import config, train
from tests.runs import ROOT, wait_for

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.distributed.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
while not (found := lock.superseded()):
    time.sleep(0.02)
print(found, time.time(), flush=True)
"""


def holder(folder: Path, **environment: str) -> subprocess.Popen:
    """A process that holds the folder's lock until another start claims it."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    return child


def test_a_newer_start_waits_for_the_older_one_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1") as older:
        assert is_locked(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        mine = Lock(tmp_path)
        taken = time.time()
        claim, left = older.stdout.readline().rsplit(maxsplit=1)
        assert claim.startswith(f"start 2 of job 7 (process {os.getpid()} on ") and float(left) <= taken
        assert older.wait(60) == 0 and mine.superseded() is None


@pytest.mark.parametrize(("job", "start"), [("8", "5"), ("7", "1"), ("7", "0"), ("", "0")])
def test_any_other_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, start: str) -> None:
    older = holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    try:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", start)
        with pytest.raises(ConfigError, match=r"start 1 of job 7 \(process \d+ on .*\) is training in this folder"):
            Lock(tmp_path)
        assert older.poll() is None
    finally:
        older.kill()
        older.communicate()
    wait_for(lambda: not is_locked(tmp_path), "the lock of a dead process")


def test_a_signal_before_the_first_step_stops_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_listening", None)
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        inbox = listen()
        os.kill(os.getpid(), signal.SIGUSR2)
        with Stop(StopConfig(every=2), LocalComm()) as asked:
            assert not asked.agreed(1) and not inbox.agreed
            assert asked.agreed(2) and inbox.agreed and asked.received == "SIGUSR2"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_after_the_last_step_there_is_nothing_to_go_on_with(digits: Path, tmp_path: Path) -> None:
    """A job that is complete is not queued again, and what is left to write is written."""

    def told_at_the_end(trainer: Trainer) -> tuple[Stop, object]:
        trainer.evaluate, trainer.evaluate_every = (lambda step: os.kill(os.getpid(), signal.SIGUSR2)), trainer.steps
        return trainer.stop, signal.getsignal(signal.SIGUSR2)

    asked, before = train(config(digits, tmp_path / "run"), told_at_the_end)
    assert asked.received == "SIGUSR2" and not asked.inbox.agreed
    with asked:
        with asked:
            pass
        assert signal.getsignal(signal.SIGUSR2) == asked.inbox.remember
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_newer_start_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "LOOK_EVERY", 0.0)
    answers = iter([None, "start 2 of job 7"])
    with Stop(StopConfig(), LocalComm(), lambda: next(answers)) as asked:
        assert not asked.agreed(1)
        assert asked.agreed(2) and asked.received == "start 2 of job 7"
