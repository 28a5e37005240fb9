"""python -m slurm.status RUN...: state, restarts, last step, rate, time left and the log's end, from the run folder and squeue.

Never from submitit's Job.done(): after a node failure that says done, and stays with it, while Slurm starts the job again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from slurm.notes import committed_step, is_locked, notes, read_launch
from slurm.queue import Queued, look

QUIET = 600  # seconds without a line of metrics after which the age of the last one is worth a word


@dataclass
class Status:
    """One run, as far as its folder and the queue tell."""

    run: str
    state: str
    why: str = ""
    job: str | None = None
    nodes: str = ""
    restarts: int = 0
    crashes: int = 0
    step: int = 0
    steps: int | None = None
    saved: int = 0
    rate: float | None = None  # candidates a second
    eta_seconds: float | None = None
    quiet_seconds: float | None = None  # since the last line of metrics
    log: list[str] = field(default_factory=list)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _end_of(path: Path, size: int = 65_536) -> list[str]:
    """The last lines of a file that may be large, without what a progress line overwrote."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _last_metrics(run: Path) -> dict[str, Any]:
    for line in reversed(_end_of(run / "metrics.jsonl")):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be cut off
        if isinstance(values, dict) and "loss" in values:
            return values
    return {}


def read(run: str | Path, queued: dict[str, Queued] | None, tail: int) -> Status:
    """The status of a run by its folder, or the URL of that; `queued` is what squeue said, None where it could not be asked."""
    name, view = str(run), None
    if "://" in name:
        from pipeline.distributed.views import View  # brings torch with it

        view = View(name)
    run = view.folder if view else Path(run)
    told, events, metrics, result = read_launch(run), notes(run), _last_metrics(run), _json(run / "result.json")
    job = told.get("job")
    saved = view.saved() if view else committed_step(run)
    status = Status(name, "", job=job, step=metrics.get("step", 0), steps=_json(run / "facts.json").get("steps"), saved=saved)
    mine = [event for event in events if event.get("job") == job]
    status.restarts = max((event.get("start", 0) for event in mine), default=0)
    status.crashes = sum(event["event"] == "crash" for event in mine)
    status.rate, status.eta_seconds = metrics.get("candidates_per_second"), metrics.get("eta_seconds")
    if (run / "metrics.jsonl").is_file() and not view:  # a copy's time says nothing
        status.quiet_seconds = max(0.0, time.time() - (run / "metrics.jsonl").stat().st_mtime)
    _judge(status, told, mine, result, queued, view.lives if view else lambda: is_locked(run))
    if told.get("logs") and job and tail:
        # a rank that left with a message has it in a log of its own; rank 0 may have been killed before it said anything
        spoke = {event["rank"] for event in mine if event["event"] == "refused" and event["start"] == status.restarts}
        logs = [Path(told["logs"]) / f"{job}_{rank}_log.out" for rank in sorted(spoke or {0})[:2]]
        status.log = [line for log in logs for line in _end_of(log)[-tail:]]
    return status


def _judge(
    status: Status,
    told: dict[str, Any],
    events: list[dict],
    result: dict[str, Any],
    queued: dict[str, Queued] | None,
    lives: Callable[[], bool],
) -> None:
    """State and reason: the queue's word while Slurm has the job, the folder's afterwards."""
    found = (queued or {}).get(status.job or "")
    newest = max((event.get("start", 0) for event in events), default=0)  # an older start may have written its end last
    last = next((event for event in reversed(events) if event.get("start", 0) == newest), {})
    if result.get("complete") and not (found and found.waits_or_runs):
        status.state, status.eta_seconds = "complete", 0.0
    elif found and found.state == "PENDING":
        status.state, status.why = "waiting", found.in_words()
        if told.get("after") and found.reason == "Dependency":
            status.why += f": job {told['after']}"
    elif found and found.waits_or_runs:
        status.state, status.nodes = found.state.lower(), found.nodes
    elif found:
        status.state, status.why = found.state.lower(), _last_words(last)
        if told.get("after") and not events:
            status.why = f"it never started: job {told['after']}, which it waited for, was not complete"
    elif lives():
        status.state = "running"
    elif last.get("event") == "end":
        status.state, status.why = "ended", _last_words(last)
    elif told.get("executor") == "slurm" and queued is None:
        status.state, status.why = "unknown", "there is no squeue here to ask; what follows is what the folder says"
    else:
        status.state, status.why = "stopped", "nothing trains in it, and it is not complete; the same command goes on"
    if status.state in ("complete", "waiting"):
        status.rate = None


def _last_words(event: dict[str, Any]) -> str:
    if event.get("event") != "end":
        return "Slurm ended it; the same launch command goes on from its newest checkpoint"
    return f"exit code {event['code']} after the checkpoint of step {event['step']}; its log says why"


def duration(seconds: float) -> str:
    """75 -> 1 min, 9000 -> 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"


def page(status: Status) -> str:
    """A few lines for people."""
    where = f" on {status.nodes}" if status.nodes else ""
    lines = [f"{status.run}: {status.state}{where}" + (f": {status.why}" if status.why else "")]
    parts = [
        f"job {status.job}" if status.job else "",
        f"restarted {status.restarts} times" + (f", {status.crashes} of them after a crash" if status.crashes else ""),
    ]
    lines.append("  " + ", ".join(filter(None, parts)))
    step = f"  step {status.step}" + (f" of {status.steps}" if status.steps else "") + f", newest checkpoint {status.saved}"
    if status.rate:
        step += f", {status.rate:.0f} candidates/s"
    if status.eta_seconds and status.state in ("running", "waiting", "unknown"):
        step += f", {duration(status.eta_seconds)} to go"
    if status.quiet_seconds and status.quiet_seconds > QUIET and status.state != "complete":
        step += f"; no step recorded for {duration(status.quiet_seconds)}"
    lines.append(step)
    return "\n".join([*lines, *(f"  | {line}" for line in status.log)])


def main(arguments: list[str] | None = None) -> int:
    """Prints every run; 0 when all of them are complete, waiting or running, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description="How runs are doing.")
    parser.add_argument("runs", nargs="+", type=lambda run: run.removeprefix("file://"), help="run folders, or their URLs")
    parser.add_argument("--tail", type=int, default=5, help="lines of rank 0's log, or of those of two ranks that refused to go on")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    args = parser.parse_args(arguments)
    missing = [run for run in args.runs if "://" not in run and not Path(run).is_dir()]
    if missing:
        print(f"error: {', '.join(missing)}: no such folder; give the `out` of a run", file=sys.stderr)
        return 2
    launched = [read_launch(Path(run)) for run in args.runs if "://" not in run]
    queued = look([told["job"] for told in launched if told.get("job") and told.get("executor") == "slurm"])
    try:
        found = [read(run, queued, args.tail) for run in args.runs]
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(json.dumps(asdict(status)) if args.json else page(status) for status in found))
    return int(any(status.state not in ("complete", "waiting", "running", "completing", "configuring") for status in found))


if __name__ == "__main__":
    sys.exit(main())
