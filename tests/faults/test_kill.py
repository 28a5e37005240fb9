"""Killed at random moments and started again with the same command, a run ends as if nothing had happened: bar 5 of the issue."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.runs import (
    PRUNES,
    SAVES,
    SKIPS,
    Child,
    Launcher,
    arguments,
    assert_same_end,
    last_checkpoint,
    losses,
    selection_log,
    skipped,
    wait_for,
)


def steps_done(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def commits(run: Path) -> set[Path]:
    return set((run / "checkpoints").glob("*/COMMIT"))


def was_saving(run: Path) -> bool:
    """Whether a killed process left a checkpoint that is not whole, or more of them than it keeps."""
    folders = list((run / "checkpoints").glob("step-*"))
    whole = [folder for folder in folders if (folder / "COMMIT").is_file()]
    return len(whole) < len(folders) or len(whole) > 2 or any(run.glob("selection/*.part"))


def kill_at(child: Child, run: Path, chance: random.Random, kind: str) -> bool:
    """Kills a training process at a moment drawn by `chance`: while it starts, so many steps later, or while it saves. False where it
    came to its end before."""
    began, saved = steps_done(run), commits(run)
    if kind == "start":
        time.sleep(chance.uniform(0, 0.6))
    elif kind == "step":
        more = chance.randint(1, 6)
        wait_for(lambda: child.poll() is not None or steps_done(run) >= began + more, f"{more} steps", every=0.001)
        time.sleep(chance.uniform(0, 0.03))
    else:
        unsaved = lambda: [f for f in (run / "checkpoints").glob("step-*") if not (f / "COMMIT").is_file()]  # noqa: E731
        wait_for(lambda: child.poll() is not None or (commits(run) != saved and unsaved()), "a save", every=0.0005)
        time.sleep(chance.uniform(0, 0.004))
    child.kill(signal.SIGKILL)
    code = child.wait()
    assert code in (0, -signal.SIGKILL), child.output()
    return code != 0


def killed_run(launcher: Launcher, command: list[str], run: Path, kills: int, seed: int) -> dict[str, int]:
    """Trains with so many kills on the way, then to the end; counts what was hit, and how often there was a checkpoint to go on from.

    The first kill comes while it saves for the second time at least: on a slow machine, too, there is something to go on from.
    """
    chance, hit = random.Random(seed), {"kills": 0, "saving": 0, "resumed": 0}
    for number in range(kills):
        child = launcher.start(command)
        if not kill_at(child, run, chance, chance.choice(["start", "step", "save", "save"]) if number else "save"):
            break
        hit["kills"] += 1
        hit["saving"] += was_saving(run)
        hit["resumed"] += bool(commits(run))
    launcher.run(command)
    return hit


def compare(run: Path, expected: Path) -> None:
    """The whole trace of losses, the ids that were drawn and chosen, score table, weights and optimizer."""
    assert [step for step, _, _ in losses(run)] == list(range(1, 38))
    assert_same_end(run, expected)
    assert selection_log(run)["sample"].equals(selection_log(expected)["sample"])
    assert len(commits(run)) == 2 and not was_saving(run)  # nothing cut off is left lying about


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_killed_run_ends_like_an_uninterrupted_one(
    launcher: Launcher, icons_small: Path, uninterrupted: Path, tmp_path: Path, workers: int
) -> None:
    run = tmp_path / "run"
    hit = killed_run(launcher, arguments(icons_small, run, *SAVES, f"data.workers={workers}"), run, 3, seed=workers)
    assert hit["kills"] >= 2 and hit["resumed"] >= 1  # a fast machine may be done before the third
    compare(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_killed_twenty_times_ends_like_an_uninterrupted_one(
    launcher: Launcher, icons_small: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture
) -> None:
    longer = (*SAVES, "visits=120")
    launcher.run(arguments(icons_small, tmp_path / "expected", *longer, "data.workers=0"))
    run = tmp_path / "run"
    hit = killed_run(launcher, arguments(icons_small, run, *longer, f"data.workers={workers}"), run, 20, seed=100 + workers)
    with capsys.disabled():
        print(f"\n{workers} workers: {hit}")
    assert hit["kills"] == 20 and hit["saving"] >= 2
    assert_same_end(run, tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "share", "workers"), [(SKIPS, 0.4, 0), (SKIPS, 0.4, 2), (PRUNES, 0.2, 2)])
def test_a_killed_run_that_skips_ends_like_an_uninterrupted_one(
    launcher: Launcher, icons_small: Path, tmp_path: Path, rule: tuple[str, ...], share: float, workers: int
) -> None:
    run, expected = tmp_path / "run", tmp_path / "expected"
    launcher.run(arguments(icons_small, expected, *SAVES, *rule, "data.workers=0"))
    hit = killed_run(launcher, arguments(icons_small, run, *SAVES, *rule, f"data.workers={workers}"), run, 5, seed=200 + workers)
    assert hit["resumed"] >= 1 and skipped(run) > share
    compare(run, expected)


def test_a_signal_to_stop_saves_the_step_and_the_same_command_goes_on(
    launcher: Launcher, icons_small: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run, done = tmp_path / "run", 0
    command = arguments(icons_small, run, *SAVES, "data.workers=1", "checkpoint.every=1000")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        done += 3
        child = launcher.start(command, HOLD=str(done))
        wait_for(lambda child=child, done=done: child.poll() is not None or steps_done(run) == done, "three steps", every=0.001)
        assert child.kill(number)
        said = child.finish()  # exit code 0
        assert steps_done(run) == done and last_checkpoint(run).name == f"step-{done:08d}"
        assert f"stopped by {number.name} at step {done} of 37, saved; the same command goes on" in said
    launcher.run(command)
    assert_same_end(run, uninterrupted)


FAILING = """
from pipeline.towers import linear


class Config(linear.Config):
    def build(self, folder):
        tower, calls = super().build(folder), []

        def fail(*_):
            calls.append(1)
            if len(calls) > 6:
                raise RuntimeError("nobody foresaw this")

        tower.register_forward_hook(fail)
        return tower
"""


def test_an_error_that_nobody_foresaw_ends_the_process_and_its_workers(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "failing.py").write_text(FAILING)
    command = arguments(icons_small, tmp_path / "run", "towers={student: {name: lab.failing}}", "data.workers=2")
    child = launcher.start(command, PYTHONPATH=str(tmp_path))
    assert child.wait() == 1
    assert "RuntimeError: nobody foresaw this" in child.output() and steps_done(tmp_path / "run") >= 1


def test_a_second_interrupt_does_not_wait(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = launcher.start(arguments(icons_small, run, "visits=100000", "stop.every=1000000"))  # it would not be asked for hours
    wait_for(lambda: child.poll() is not None or steps_done(run) >= 2, "two steps")
    child.kill(signal.SIGINT)
    seen = steps_done(run)
    wait_for(lambda: child.poll() is not None or steps_done(run) >= seen + 3, "steps after the first one")  # by then it was heard
    assert child.poll() is None
    child.kill(signal.SIGINT)
    assert child.wait() != 0 and "KeyboardInterrupt" in child.output()
