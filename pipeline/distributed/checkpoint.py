"""Checkpoints that are either whole or do not exist: COMMIT is written last and lists every file with size and SHA-256."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from pipeline.config import Strict
from pipeline.data.lanes import RankLanes
from pipeline.distributed.comm import Comm

FORMAT = 2  # 1: torch's optimizer.bin, which only the same number of ranks could read


class CheckpointError(ValueError):
    """A checkpoint that must not be used or could not be written: says which, why, and what to do."""


class CheckpointConfig(Strict):
    """When to save and how much to keep."""

    every: int = Field(500, ge=1, description="steps between checkpoints; one is always written at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / "checkpoints" / f"step-{step:08d}"


def write(run: Path, step: int, comm: Comm, facts: dict[str, Any], parts: list[Callable[[Path], None]], keep: int) -> Path:
    """Writes one checkpoint. Collective: every rank runs `parts` (each gets the folder), rank 0 commits, then old ones go.

    Raises CheckpointError when the disk is full or fails; the earlier checkpoints stay as they are.
    """
    folder = folder_of(run, step)

    def begin(folder: Path) -> None:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # an attempt that was cut off
            folder.mkdir(parents=True)

    def finish(folder: Path) -> None:
        if comm.rank == 0:
            _write_durably(folder / "run.json", json.dumps({"format": FORMAT, "step": step} | facts, indent=1))
            _commit(folder)
            _retire(run, keep)

    for part in (begin, *parts, finish):
        trouble = _attempt(part, folder)
        if comm.any(trouble is not None):  # also waits for all of them
            raise _failed(folder, comm, trouble) from trouble
    return folder


def _attempt(part: Callable[[Path], None], folder: Path) -> Exception | None:
    """What went wrong with the disk, if anything: the ranks must agree before one of them leaves, or the others wait for ever."""
    try:
        part(folder)
    except (OSError, RuntimeError) as error:  # torch's writers say RuntimeError, safetensors its own subclass of Exception
        return error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        return error
    return None


def _failed(folder: Path, comm: Comm, error: Exception | None) -> CheckpointError:
    if comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if error is None:
        return CheckpointError(
            f"{folder}: could not be written by another rank; its message says why. Earlier checkpoints stay as they were"
        )
    full = (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or "space" in str(error).lower()
        or "enforce fail" in str(error)
        or any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))  # safetensors' words
    )
    free = shutil.disk_usage(folder.parent).free / 1e6 if folder.parent.exists() else 0
    hint = f"{free:.0f} MB are free there; make room, or lower checkpoint.keep" if full else "look at the file system"
    return CheckpointError(
        f"{folder}: could not be written ({type(error).__name__}: {error}). Earlier checkpoints stay as they were. {hint}, then start the same command again"
    )


def _commit(folder: Path) -> None:
    files = {str(p.relative_to(folder)): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "COMMIT"}
    for name in files:
        _sync(folder / name)
    _write_durably(folder / "COMMIT", json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync(folder.parent)


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _retire(run: Path, keep: int) -> None:
    folders = _folders(run)
    kept = [p for p in folders if (p / "COMMIT").is_file()][-keep:]
    for old in (p for p in folders if p not in kept):  # also what was cut off while it was written, or deleted
        (old / "COMMIT").unlink(missing_ok=True)  # first, so that a half-deleted folder is never mistaken for a checkpoint
        shutil.rmtree(old, ignore_errors=True)


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-????????"))


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its run.json; a folder without COMMIT was cut off while it was written and is passed over.

    Raises CheckpointError when a committed one was changed afterwards: that is damage, and going further back would hide it.
    """
    for folder in reversed(_folders(run)):
        if (folder / "COMMIT").is_file():
            return folder, verify(folder)
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Compares every file with COMMIT and gives run.json. Raises CheckpointError that names the file and both values."""
    if not (folder / "COMMIT").is_file():
        raise CheckpointError(f"{folder}: has no COMMIT, so it was never finished; use an earlier checkpoint")
    for name, expected in _committed_files(folder).items():
        path = folder / name
        found = _fingerprint(path) if path.is_file() else "nothing"
        if found != expected:
            raise CheckpointError(
                f"{path}: was changed after it was committed (COMMIT says {expected}, found {found}). "
                f"Restore the file, or delete the folder {folder} to resume from the checkpoint before it"
            )
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def _committed_files(folder: Path) -> dict[str, Any]:
    """What COMMIT lists. Raises CheckpointError where it cannot be read or is of a newer format."""
    try:
        commit = json.loads((folder / "COMMIT").read_text(encoding="utf-8"))
        known, files = commit["format"] == FORMAT, dict(commit["files"])
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{folder / 'COMMIT'}: is damaged; delete {folder} to resume from the checkpoint before it") from None
    if not known:
        raise CheckpointError(
            f"{folder}: has format {commit['format']}, this version reads format {FORMAT}; "
            f"use the version of the package that wrote it, or train into a new folder with out="
        )
    return files


def committed(run: Path) -> list[Path]:
    """The folders of all finished checkpoints, oldest first; not verified."""
    return [folder for folder in _folders(run) if (folder / "COMMIT").is_file()]


def agree(run: Path, expected: dict[str, Any]) -> None:
    """Raises CheckpointError when the newest checkpoint was made by another configuration, index or lane layout, naming what differs."""
    finished = committed(run)
    if not finished:
        return
    folder = finished[-1]
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        known = {name: found[name] for name in ("index", "lanes", "groups", "config")} if found["format"] == FORMAT else expected
    except (OSError, ValueError, KeyError):
        return  # damaged; verify() says so, with what to do, before anything is loaded
    for name, meaning in (("index", "data.sources hold other samples"), ("lanes", "data.lanes differs"), ("groups", "data.groups differs")):
        if known[name] != expected[name]:
            raise CheckpointError(
                f"{folder}: {meaning} (checkpoint {known[name]}, now {expected[name]}). Restore what it was, or train into a new folder with out="
            )
    _agree_on_teachers(folder, found.get("teachers", {}), expected.get("teachers", {}))
    differing = _differences(known["config"], expected["config"])
    if differing:
        lines = "; ".join(f"{key} was {was!r}, now {now!r}" for key, was, now in differing[:8])
        raise CheckpointError(
            f"{folder}: was made with another configuration: {lines}. Set these back, or train into a new folder with out="
        )


def _agree_on_teachers(folder: Path, was: dict[str, str], now: dict[str, str]) -> None:
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            one, other = ((side.get(name) or "no such teacher")[:16] for side in (was, now))
            raise CheckpointError(
                f"{folder}: was trained with another teacher: teachers.{name} was {one}, now {other} (digests of settings and weights). A live "
                f"teacher changes with its own run's newest checkpoint: name a step in teachers.{name}.checkpoint. Restore what it was, or train "
                f"into a new folder with out="
            )


def _differences(was: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [d for key in keys for d in _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if was == now else [(path, was, now)]


def write_lanes(folder: Path, lanes: RankLanes, table: dict[str, torch.Tensor]) -> None:
    """This rank's score table, one row group a lane; the ids are implied by the lanes' order."""
    columns = {name: pa.array(tensor.cpu().numpy()) for name, tensor in table.items()}
    rows = pa.table(columns)
    path = folder / f"lanes-{lanes.lanes[0]:05d}-{lanes.lanes[-1]:05d}.parquet"
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for first, last in zip(lanes.start[:-1], lanes.start[1:]):
            writer.write_table(rows.slice(first, last - first), row_group_size=max(1, int(last - first)))


def read_lanes(folder: Path, lanes: RankLanes) -> dict[str, torch.Tensor]:
    """The score table rows of these lanes, whatever ranks wrote them. Opens only the files that hold them."""
    wanted, parts = set(lanes.lanes.tolist()), {}
    for path in sorted(folder.glob("lanes-*-*.parquet")):
        first, last = (int(number) for number in path.stem.split("-")[1:])
        mine = sorted(wanted.intersection(range(first, last + 1)))
        if mine:
            file = pq.ParquetFile(path)
            parts |= {lane: file.read_row_group(lane - first) for lane in mine}
    if set(parts) != wanted:
        raise CheckpointError(
            f"{folder}: holds no score table for lanes {sorted(wanted - set(parts))[:5]}; it was made with another data.lanes"
        )
    table = pa.concat_tables([parts[lane] for lane in sorted(parts)])
    return {name: torch.from_numpy(table[name].to_numpy().copy()) for name in table.column_names}
