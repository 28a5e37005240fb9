"""A rank that hangs is named, with host, process, step and stacks, and the others end: bar 5. Every hang is a real one."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from pipeline.distributed.stacks import COLLECTIVES
from pipeline.distributed.watchdog import EXIT, Report, hung
from tests.runs import Child, Launcher, arguments, free_port, losses, wait_for

TIMEOUT = 4.0  # seconds
FOREVER = ("visits=1000000", "data.workers=1", f"watchdog.timeout={TIMEOUT}", "checkpoint.every=1000000")

# the image side of the linear tower, which stops, in the way that the environment names, after some forwards
STUCK = """
import ctypes, os, time
from pipeline.towers import linear


def stuck_in_python(calls, tower):
    if calls > 40:
        time.sleep(3600)


def stuck_in_c(calls, tower):
    if calls > 40:
        ctypes.PyDLL(None).sleep(3600)  # unlike CDLL it keeps the interpreter's lock


def slow_in_evaluation(calls, tower):
    if not tower.training:
        time.sleep(0.4)


def slow_once(calls, tower):
    if calls == 10:
        time.sleep(3)


class Config(linear.Config):
    def build(self, folder):
        tower, calls, how = super().build(folder), [], os.environ.get("STUCK")

        def hook(*_):
            calls.append(1)
            globals()[how](len(calls), tower)

        if how:
            tower.register_forward_hook(hook)
        return tower
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the tower above."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "stuck.py").write_text(STUCK)
    return tmp_path


def start(launcher: Launcher, command: list[str], lab: Path, stuck: dict[int, str]) -> list[Child]:
    """Two ranks, some of which will be stuck in one of the ways above."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [*command, "towers={student: {name: lab.stuck}}"]
    return [
        launcher.start(command, RANK=str(r), LOCAL_RANK=str(r), PYTHONPATH=str(lab), **world, **({"STUCK": stuck[r]} if r in stuck else {}))
        for r in range(2)
    ]


def children(process: int) -> list[int]:
    """Of Linux."""
    return [int(number) for path in Path(f"/proc/{process}/task").glob("*/children") for number in path.read_text().split()]


def alive(process: int) -> bool:
    """No zombie, which a container without an init keeps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def message(run: Path, child: Child, rank: int) -> str:
    """What is in the run folder about a hung rank; the same is on stderr."""
    (path,) = run.glob("hang-*.txt")
    said = path.read_text()
    assert all(line in child.output() for line in said.splitlines())
    found = re.match(r"watchdog: rank (\d) hangs at step (\d+): host (\S+), process (\d+); ", said)
    assert found and int(found[1]) == rank and found[3] == socket.gethostname(), said
    step = losses(run)[-1][0]  # the last one that was recorded; the run stands in the next
    assert step - 1 <= int(found[2]) <= step + 1, (step, said)
    return said


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank_is_named_and_the_other_ends(
    launcher: Launcher, icons_small: Path, tmp_path: Path, rank: int, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    pair = launcher.ranks(2, arguments(icons_small, run, *FOREVER), free_port())
    other = pair[1 - rank]
    try:
        wait_for(lambda: other.poll() is not None or ((run / "metrics.jsonl").exists() and len(losses(run)) > 20), "some steps")
        workers = children(other.pid)
        assert workers
        assert pair[rank].kill(signal.SIGSTOP)
        began = time.monotonic()
        assert other.wait() == EXIT, other.output()
        taken = time.monotonic() - began
        said = message(run, other, rank)
        assert float(re.search(r"stands still since (\d+) s", said)[1]) < 2 * TIMEOUT  # by its own looks, which a busy machine makes rarer
        assert f"process {pair[rank].pid};" in said and "it does not answer: the process is stopped or gone" in said
        assert "pipeline/trainer.py" in said and any(part in said for part in COLLECTIVES)  # the waiting rank's stack
        assert f"stack of process {pair[rank].pid}" in said  # by py-spy, or how to get it
        wait_for(lambda: not any(map(alive, workers)), "the other's loader workers")
        with capsys.disabled():
            print(f"\nrank {rank} stopped: named and ended after {taken:.1f} s with a timeout of {TIMEOUT} s")
    finally:
        pair[rank].kill(signal.SIGCONT if rank else signal.SIGKILL)  # what a person does, and what a launcher does
    assert pair[rank].wait() != 0


@pytest.mark.parametrize(("rank", "how"), [(1, "stuck_in_python"), (0, "stuck_in_c")])
def test_a_rank_that_is_stuck_in_its_own_code_shows_where(launcher: Launcher, icons_small: Path, lab: Path, rank: int, how: str) -> None:
    run = lab / "run"
    pair = start(launcher, arguments(icons_small, run, *FOREVER), lab, {rank: how})
    assert pair[1 - rank].wait() == EXIT, pair[1 - rank].output()
    said = message(run, pair[1 - rank] if how == "stuck_in_c" else pair[0], rank)
    if how == "stuck_in_python":
        assert "it answers, but its main thread stands still" in said
        stacks = said.split("stack of rank ")[1:]
        assert stacks[0].startswith("1:") and f"in {how}" in stacks[0] and any(part in stacks[1] for part in COLLECTIVES)
        assert pair[rank].wait() == EXIT  # its own thread ends it
    else:  # nothing of its Python runs, but a timer in C does
        assert "it does not answer" in said
        shown = pair[rank].output()
        assert "Timeout (0:00:0" in shown and f"in {how}" in shown
        assert pair[rank].kill(signal.SIGKILL)
        pair[rank].wait()


def test_a_long_evaluation_of_one_rank_is_no_hang(launcher: Launcher, icons_small: Path, lab: Path) -> None:
    run = lab / "run"
    evaluation = [
        "selector={name: random}",
        "evaluation.every=18",
        "evaluation.batch=50",
        "evaluation.workers=1",
        f"evaluation.data={icons_small}",
    ]
    command = arguments(icons_small, run, "watchdog.timeout=2.0", "data.workers=1")
    pair = start(launcher, [*command, *evaluation], lab, {0: "slow_in_evaluation"})
    said = [child.finish() for child in pair]
    assert "hang" not in "".join(said) and not list(run.glob("hang-*"))
    evaluations = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_seconds" in line]
    assert len(evaluations) == 1 and float(re.search(r'"eval_seconds": ([\d.]+)', evaluations[0])[1]) > 3


def test_one_process_says_where_it_stands_and_goes_on(launcher: Launcher, icons_small: Path, lab: Path) -> None:
    command = arguments(icons_small, lab / "run", "watchdog.timeout=1.0", "towers={student: {name: lab.stuck}}")
    said = launcher.run(command, PYTHONPATH=str(lab), STUCK="slow_once")
    messages = [part for part in said.split("watchdog: ") if "has not moved for 1 s" in part]
    assert sum("in slow_once" in part for part in messages) == 1  # a disk that is slow at a save may have another one
    assert losses(lab / "run")[-1][0] == 18


def report(step: int, still: float, waits: bool, *lines: int) -> Report:
    return Report(1, step, still, waits, list(lines), "node", 1, "")


def test_who_holds_up_the_others() -> None:
    waiting, stuck = report(7, 9.0, True, 10, 40), report(7, 9.0, False, 10, 30)
    assert hung([waiting, stuck, waiting], set(), 8.0) == [1]
    assert hung([waiting, waiting, waiting], {2}, 8.0) == [2]
    assert hung([waiting, report(7, 1.0, False, 10, 30), waiting], set(), 8.0) == []  # it works
    assert hung([waiting, report(7, 1.0, False, 10, 30), waiting], {2}, 8.0) == []
    assert hung([waiting, report(6, 9.0, False, 10, 50), stuck], set(), 8.0) == [1]  # a step behind
    assert hung([report(7, 9.0, False, 10, 60), stuck], set(), 8.0) == [1]  # both at the device, one before the other
    assert hung([waiting, report(7, 9.0, True, 10, 20)], set(), 8.0) == [1]  # in another collective
    assert hung([waiting, waiting], set(), 8.0) == [0, 1]  # the network
