"""Starts real training runs for the tests, and compares what they left behind bit for bit.

`Launcher` is a process that has imported everything and forks a child for every command: the child is an ordinary process with its own
pid that can be killed, but it starts in a tenth of a second and not in five.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).parent.parent
DEBUG = ROOT / "configs" / "pretrain" / "debug.yaml"
PRELOADED = """
    accelerate.checkpointing safetensors.torch tokenizers torch._inductor.config
    pipeline.evaluation.evaluate pipeline.objectives.clip pipeline.run pipeline.selection.dissect pipeline.towers.linear
"""
SAVES = ("visits=12", "checkpoint.every=2", "towers.student.dropout=0.2")  # 37 steps; about half of the time goes into saving
SKIPS = ("data.skip={share: 0.5, after_visits: 1, rescore_visits: 4, lookahead: 5}", "visits=12")  # half of a lane's 50 samples at most
PRUNES = ("selector={name: info_batch, warmup_visits: 1, prune: 0.6, lookahead: 5}", "visits=12")
PATIENCE = 240.0  # seconds; only a hang takes that long, also on a machine that does other work


def arguments(data: Path, out: Path, *overrides: str) -> list[str]:
    """`train configs/pretrain/debug.yaml` on given shards into a given folder; one thread: two wait for each other on a busy machine."""
    return ["train", str(DEBUG), f"out={out}", f"data.sources=[{{url: {data}}}]", "evaluation.data=null", "engine.threads=1", *overrides]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE, every: float = 0.005) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(every)
    return value


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher of ranks sets."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    return {k: v for k, v in os.environ.items() if k not in ranks and not k.startswith("ACCELERATE_")} | more


def command_line(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs a whole command line in the repository, as a user would."""
    env = free_environment(**environment)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)


class Child:
    """One command that runs in a process of its own."""

    def __init__(self, launcher: "Launcher", pid: int, log: Path) -> None:
        self.launcher, self.pid, self.log = launcher, pid, log
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code as subprocess gives it (minus the signal that killed it), None while it runs."""
        if self._code is None:
            self._code = self.launcher.ask({"poll": self.pid})
        return self._code

    def wait(self) -> int:
        """The exit code; a process that hangs is killed and fails the test."""
        try:
            wait_for(lambda: self.poll() is not None, f"process {self.pid}, {self.log}", every=0.01)
        except AssertionError:
            self.kill(signal.SIGKILL)
            raise
        return self._code

    def kill(self, number: int) -> bool:
        """Sends a signal; False when the process had ended before."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def finish(self) -> str:
        """Waits for exit code 0; gives stdout and stderr."""
        code = self.wait()
        assert code == 0, f"exit code {code}\n{self.output()}"
        return self.output()

    def output(self) -> str:
        """stdout and stderr so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def kill_at(steps: int, run: Path, *ranks: Child) -> None:
    """SIGKILL to every rank of a run once that many of its steps are logged, those of earlier starts too, and there is a checkpoint.

    The ranks are started with HOLD=steps: none can come to its end before, nor see another one die, and a slow disk has time to save.
    """

    def reached() -> bool:
        there = any(run.glob("checkpoints/*/COMMIT")) and len(losses(run)) >= steps
        return there or any(child.poll() is not None for child in ranks)

    wait_for(reached, f"{steps} steps", every=0.002)
    assert all(child.kill(signal.SIGKILL) for child in ranks), ranks[0].output()
    for child in ranks:
        child.wait()


class Launcher:
    """See the module's docstring. One for a test session."""

    def __init__(self, logs: Path) -> None:
        self.logs, self._count = logs, 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.runs"], cwd=ROOT, env=free_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, message: dict[str, Any]) -> Any:
        """One line of JSON there, one back."""
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, command: Sequence[str], **environment: str) -> Child:
        """Starts `python -m pipeline COMMAND`, or `python -m MODULE ...` where the first word has a dot.

        HOLD=N among the variables: training stands still once step N is recorded, until a signal comes. So a test that does something
        after so many steps, and is late on a busy machine, finds the run there and not at its end.
        """
        self._count += 1
        log = self.logs / f"{self._count:04d}.log"
        log.touch()
        pid = self.ask({"run": list(command), "log": str(log), "environment": environment})
        return Child(self, pid, log)

    def run(self, command: Sequence[str], **environment: str) -> str:
        """Starts and waits for exit code 0; gives stdout and stderr."""
        return self.start(command, **environment).finish()

    def ranks(self, size: int, command: Sequence[str], port: int, **environment: str) -> list[Child]:
        """Starts one process for each rank with the variables that torchrun sets."""
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [self.start(command, RANK=str(rank), LOCAL_RANK=str(rank), **world, **environment) for rank in range(size)]

    def close(self) -> None:
        """Ends the server; the children have ended by then."""
        self._server.terminate()  # to close its stdin is not enough: processes forked from this one may have it open too
        self._server.communicate(timeout=60)


@contextmanager
def put_back() -> Iterator[None]:
    """For runs inside of this process: what a run sets for a whole process is afterwards as it was."""
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def losses(folder: Path) -> list[tuple]:
    """(step, loss, gradient norm) of every whole line of metrics.jsonl that is a training step: the last one may just be being written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def skipped(folder: Path) -> float:
    """The largest share of candidates that were skipped between two lines of metrics.jsonl."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return max(line.get("skipped_share", 0.0) for line in lines)


def selection_log(folder: Path) -> pa.Table:
    """The selection log of all ranks: by step, within a step in the order of the batch."""
    parts = [pq.read_table(path) for path in sorted((folder / "selection").glob("*.parquet"))]
    return pa.concat_tables(parts).sort_by([("step", "ascending"), ("sample", "ascending")])


def columns(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns as arrays."""
    return {name: table[name].to_numpy() for name in table.column_names}


def same_rows(one: pa.Table, other: pa.Table) -> bool:
    """Equal columns bit for bit; a NaN equals itself."""
    here, there = columns(one), columns(other)
    return one.schema.equals(other.schema) and all(here[name].tobytes() == there[name].tobytes() for name in here)


def last_checkpoint(folder: Path) -> Path:
    """The newest folder with a COMMIT."""
    return sorted(path.parent for path in (folder / "checkpoints").glob("*/COMMIT"))[-1]


def commit_again(folder: Path) -> None:
    """Writes a COMMIT that fits the files as they are now, as someone would who can write to the folder."""
    names = [path.name for path in folder.iterdir() if path.name != "COMMIT"]
    files = {n: {"size": (folder / n).stat().st_size, "sha256": sha256((folder / n).read_bytes()).hexdigest()} for n in names}
    commit = json.loads((folder / "COMMIT").read_text(encoding="utf-8"))
    (folder / "COMMIT").write_text(json.dumps(commit | {"files": files}), encoding="utf-8")


def assert_same_end(one: Path, other: Path) -> None:
    """Loss trace, chosen samples with their scores, score table, weights and optimizer state are equal to the last bit."""
    assert losses(one) == losses(other)
    assert same_rows(selection_log(one), selection_log(other))
    here, there = last_checkpoint(one), last_checkpoint(other)
    assert here.name == there.name
    tables = [sorted(path.name for path in folder.glob("lanes-*.parquet")) for folder in (here, there)]
    assert tables[0] == tables[1] and tables[0]
    for name in tables[0]:
        assert same_rows(pq.read_table(here / name), pq.read_table(there / name)), name
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    states = [sorted(folder.glob("optimizer-*.safetensors")) for folder in (here, there)]
    assert [path.name for path in states[0]] == [path.name for path in states[1]] and states[0]
    for one_state, other_state in zip(*states):
        assert one_state.read_bytes() == other_state.read_bytes(), one_state.name


def _serve() -> None:
    """The launcher's side: reads commands from stdin, forks, answers."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    gc.freeze()  # what was imported is not looked through again at every child's end
    for line in sys.stdin:
        message = json.loads(line)
        if "run" in message:
            sys.stdout.flush()
            answer: int | None = os.fork() or _become(message)
        else:
            pid, status = os.waitpid(message["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _become(message: dict[str, Any]) -> int:
    """The child: the command with its output in the log."""
    import runpy

    os.environ.update(message["environment"])
    sys.path[:0] = filter(None, [message["environment"].get("PYTHONPATH")])
    log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if "HOLD" in message["environment"]:
        _hold(int(message["environment"]["HOLD"]))
    module, *rest = message["run"] if "." in message["run"][0] else ["pipeline", *message["run"]]
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)  # ends in sys.exit
    sys.exit(0)


def _hold(last: int) -> None:
    """In this process: see Launcher.start."""
    from pipeline.distributed.stop import Inbox
    from pipeline.record.metrics import Record

    event, remember, heard = Record.event, Inbox.remember, []

    def held(record: Any, values: dict[str, Any]) -> None:
        event(record, values)
        while values["step"] >= last and not heard:
            time.sleep(0.01)

    def hearing(inbox: Any, number: int, frame: Any) -> None:
        heard.append(number)
        remember(inbox, number, frame)

    Record.event, Inbox.remember = held, hearing


if __name__ == "__main__":
    _serve()
