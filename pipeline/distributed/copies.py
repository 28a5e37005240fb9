"""This machine's copy of a run folder in an object store: where it lies, and which of its files are the newer ones."""

import fnmatch
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline.distributed.store import Store

T = TypeVar("T")
CHECKPOINTS = "checkpoints"
# what means something on one machine only, or is not whole yet
PRIVATE = ("run.lock", "run.owner*", "claim.json", ".copy.json", ".*", "*.part", "*.tmp")
LARGE = ("selection/*", "trackers/*", "evaluation/*", "*/model.safetensors", "*trace*")  # what a start can do without


def cache() -> Path:
    """The user's cache folder, where no other one is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dissect-pipeline"


def place(url: str, folder: Path, kind: str) -> Path:
    """Where the copy of a run lies in a cache folder; its last part is the run's name. `kind`: runs (trained here) or views (only read).

    The machine's name is part of it, for a home folder, and the cache in it, may be the same on all machines.
    """
    url = url.rstrip("/")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{socket.gethostname()}"
    return folder / kind / name / url.rsplit("/", 1)[-1]


def is_private(name: str) -> bool:
    """Whether a file of a run folder stays where it is."""
    return name.startswith((f"{CHECKPOINTS}/", "owners/")) or any(fnmatch.fnmatch(name.rsplit("/", 1)[-1], p) for p in PRIVATE)


def is_large(name: str) -> bool:
    """Whether a file grows with the run, so that it is fetched only where it is read."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in LARGE)


class Copy:
    """The files of a run folder besides its checkpoints. Which ones the store has as they are here is noted in .copy.json: by size and time
    here, by version there. One process of a machine uses it at a time."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._same: dict[str, list[Any]] = json.loads((folder / ".copy.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._same = {}

    def pull(self, wanted: Callable[[str], bool], exact: bool = False) -> None:
        """Fetches what the store has newer, of the names that are wanted; `exact`: what it has no more goes here too. Raises DataError."""
        there = self.store.listing()
        for name in [name for name in self._same if name not in there] if exact else []:
            (self.folder / name).unlink(missing_ok=True)
            del self._same[name]
        for name, stored in there.items():
            if is_private(name) or not wanted(name) or self._same.get(name) == [*self._stat(name), stored.version]:
                continue
            self.store.get(name, self.folder / name)
            self._same[name] = [*self._stat(name), stored.version]
        self._note()

    def push(self, attempt: Callable[[Callable[[], Any]], Any] = lambda action: action()) -> None:
        """Uploads what is newer here. `attempt` runs each request; raises what it raises."""
        sent = {}
        for name, stat in self._changed():
            try:
                attempt(lambda name=name: self.store.put(name, self.folder / name))
            except FileNotFoundError:
                continue  # a temporary file of another name, or one that was replaced
            sent[name] = stat
        if sent:
            stored = attempt(self.store.listing)
            self._same |= {name: [*stat, stored[name].version] for name, stat in sent.items() if name in stored}
            self._note()

    def forget(self) -> None:
        """Empties the folder, but for the checkpoints: what is in it is of another time than what is in the store."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != CHECKPOINTS:
                shutil.rmtree(path)
            elif path.is_file() and path.name != "run.lock":
                path.unlink()
        self._same = {}

    def _changed(self) -> Iterator[tuple[str, list[int]]]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not is_private(name) and path.is_file() and (stat := self._stat(name)) != self._same.get(name, [])[:2]:
                yield name, stat

    def _stat(self, name: str) -> list[int]:
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return [-1, -1]
        return [found.st_size, found.st_mtime_ns]

    def _note(self) -> None:
        partial = self.folder / ".copy.json.part"
        partial.write_text(json.dumps(self._same), encoding="utf-8")
        partial.replace(self.folder / ".copy.json")
