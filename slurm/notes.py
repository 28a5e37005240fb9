"""launch.json and starts.jsonl of a run folder: how it was submitted, and every start and end of its job. Imports nothing heavy."""

import fcntl
import json
import struct
import time
from pathlib import Path
from typing import Any


def write_launch(run: Path, facts: dict[str, Any]) -> None:
    """launch.json: what `slurm.status` reads."""
    partial = run / "launch.json.part"
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    partial.replace(run / "launch.json")


def read_launch(run: Path) -> dict[str, Any]:
    """launch.json; empty for a run that was not launched from here."""
    try:
        return json.loads((run / "launch.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def note(run: Path, event: str, **values: Any) -> None:
    """Adds a line to starts.jsonl."""
    with (run / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": time.time()} | values) + "\n")


def notes(run: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl, oldest first."""
    path, found = run / "starts.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut off by a full disk
    return found


def committed_step(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none; by its name, nothing is verified."""
    commits = run.glob(f"checkpoints/step-{'[0-9]' * 8}/COMMIT")
    return max((int(path.parent.name.split("-")[1]) for path in commits), default=0)


def is_locked(run: Path) -> bool:
    """Whether a process trains in the folder, as far as this file system's locks reach; asks without taking the lock."""
    try:
        with (run / "run.lock").open("rb") as file:
            asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)  # Linux's struct flock, the whole file
            return struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return False
