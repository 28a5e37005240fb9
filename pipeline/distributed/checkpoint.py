"""Checkpoints that are either whole or do not exist: COMMIT is written last and lists every file with size and SHA-256."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from pipeline.config import Strict
from pipeline.data.lanes import RankLanes
from pipeline.distributed.host import Files, Host

# settings that came later, and what a checkpoint that does not know them was trained with
BEFORE = {"selector.classes": "two", "selector.level": "cosine", "scoring.ahead": False}
FORMAT = 2  # 1: torch's optimizer.bin, which only the same number of ranks could read


class CheckpointError(ValueError):
    """A checkpoint that must not be used or could not be written: says which, why, and what to do."""


class CheckpointConfig(Strict):
    """When to save and how much to keep."""

    every: int = Field(500, ge=1, description="steps between checkpoints; one is always written at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")
    asynchronous: bool = Field(
        True,
        description="training goes on while a checkpoint is written, from a copy in host memory that is kept: this rank's share of the "
        "moments, and on rank 0 the weights. false: training waits, and nothing is copied that is on the host",
    )
    upload_timeout: float = Field(
        1800.0, gt=0, description="where `out` is a URL: seconds that the store may be away, at one request, before the run stops"
    )


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / "checkpoints" / f"step-{step:08d}"


def commit(folder: Path, files: dict[str, Any]) -> None:
    """Makes a folder a checkpoint: `files` by name as `fingerprint` gives them, all of them on disk."""
    write_durably(folder / "COMMIT", commit_text(files))
    sync(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """A small file that is whole and on disk, or does not exist."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path: Path) -> dict[str, Any]:
    """What COMMIT says about a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def superfluous(run: Path, keep: int) -> list[Path]:
    """All but the newest `keep` checkpoints: also what was cut off while it was written, or deleted."""
    folders = _folders(run)
    kept = [folder for folder in folders if (folder / "COMMIT").is_file()][-keep:]
    return [folder for folder in folders if folder not in kept]


def remove(folder: Path) -> None:
    """Deletes a checkpoint, COMMIT first: a half-deleted folder is never mistaken for one."""
    (folder / "COMMIT").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))  # and nothing that somebody keeps beside them


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
        found = fingerprint(path) if path.is_file() else "nothing"
        if found != expected:
            raise CheckpointError(
                f"{path}: was changed after it was committed (COMMIT says {expected}, found {found}). "
                f"Restore the file, or delete the folder {folder} to resume from the checkpoint before it"
            )
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def _committed_files(folder: Path) -> dict[str, Any]:
    return listed((folder / "COMMIT").read_bytes(), str(folder))


def commit_text(files: dict[str, Any]) -> str:
    """What COMMIT says."""
    return json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1)


def listed(text: bytes, folder: str) -> dict[str, Any]:
    """What a COMMIT in `folder` lists. Raises CheckpointError where it cannot be read or is of a newer format."""
    try:
        commit = json.loads(text)
        known, files = commit["format"] == FORMAT, dict(commit["files"])
        if any("/" in name or name in ("", ".", "..") for name in files):  # what is fetched is written under this name
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{folder}/COMMIT: is damaged; delete {folder} to resume from the checkpoint before it") from None
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
    if found.get("reference", expected.get("reference")) != expected.get("reference"):
        raise CheckpointError(
            f"{folder}: was trained with another reference of the selector: the rows of selector.reference, or the losses of selector.table, were "
            f"written again. Restore the files, or train into a new folder with out="
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
        where = {key: f"{path}.{key}" if path else key for key in keys}
        return [d for key in keys for d in _differences(was.get(key, BEFORE.get(where[key])), now.get(key), where[key])]
    return [] if was == now else [(path, was, now)]


def lanes_file(lanes: RankLanes, table: dict[str, torch.Tensor], host: Host) -> Files:
    """This rank's score table, and what else is kept of each sample, one row group a lane; the ids are implied by the lanes' order."""
    columns = {name: host.take(f"lanes|{name}", tensor) for name, tensor in table.items()}

    def write(path: Path) -> None:
        rows = pa.table({name: pa.array(column.numpy()) for name, column in columns.items()})
        with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
            for first, last in zip(lanes.start[:-1], lanes.start[1:]):
                writer.write_table(rows.slice(first, last - first), row_group_size=max(1, int(last - first)))

    return {f"lanes-{lanes.lanes[0]:05d}-{lanes.lanes[-1]:05d}.parquet": write}


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
