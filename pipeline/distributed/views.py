"""A run opened by those who do not train it: where its folder is, or, where that is a URL, a copy of what is asked for."""

import fnmatch
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.storage import is_local, local_path
from pipeline.distributed import checkpoint, claim, copies, remote
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.copies import Copy
from pipeline.distributed.store import Store

WEIGHTS = ("model.safetensors", "run.json")  # of a checkpoint; the rest is only read to train on


class View:
    """`folder` is the run folder, or this machine's copy of it; nothing but what is pulled is then in it. `place`: a path or a URL.

    Raises ConfigError where there is no run at a URL, DataError where the store does not answer.
    """

    def __init__(self, place: str | Path) -> None:
        self.store: Store | None = None
        self.folder = Path(local_path(str(place)))
        if not is_local(str(place)):
            self.store = Store(str(place))
            self.folder = copies.place(self.store.url, copies.cache(), "views")
            if not self.store.listing():
                raise ConfigError(f"{place}: there is no run, not a single object; give the `out` of a run that was trained")
            self._copy(lambda name: not copies.is_large(name))

    def pull(self, *patterns: str) -> None:
        """Makes sure that files of these names, as a shell would match them, are here and are the newest."""
        if self.store:
            self._copy(lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns))

    def weights(self, which: str, patterns: tuple[str, ...] = WEIGHTS) -> None:
        """Makes sure that the weights of a checkpoint are here, or other files of it: newest, best, or a step. Raises CheckpointError,
        DataError."""
        if which == "best":
            self.pull("best/*")
        if self.store is None or not (which == "newest" or which.isdigit()):
            return
        for attempt in range(3):
            steps = self._steps()
            wanted = int(which) if which.isdigit() else max(steps, default=None)
            if wanted is None:
                return  # whoever looks for it says so
            if wanted not in steps:
                raise CheckpointError(
                    f"{self.store.url}: has no checkpoint of step {wanted}; there are {', '.join(map(str, steps)) or 'none'}"
                )
            try:
                files = remote.files_of(self.store, wanted)
                needed = {name: files[name] for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
                remote.leave_only(self.folder, wanted, files)
                remote.fetch(self.store, wanted, files, needed, self.folder)
                remote.commit_here(self.folder, wanted, needed)
                return
            except (CheckpointError, FileNotFoundError):
                if attempt == 2 or wanted in remote.committed(self.store):
                    raise  # otherwise it was one of the oldest, and has just been removed by the run

    def push(self) -> None:
        """What was written into the folder goes to where the run is. Raises DataError."""
        if self.store:
            with self._alone():
                Copy(self.store, self.folder).push()

    def saved(self) -> int:
        """The step of the newest checkpoint in the store, 0 where there is none. Raises DataError."""
        return max(remote.committed(self.store), default=0)

    def lives(self) -> bool:
        """Whether somebody trains the run, as far as the store's clock and this machine's agree. Raises DataError."""
        held = claim.newest(self.store)
        return held is not None and not held.left and time.time() - self.store.written(held.name) < claim.DEAD_AFTER

    def _steps(self) -> list[int]:
        """The store's checkpoints. What is here of later ones was deleted there, and is not the newest any more."""
        with self._alone():
            steps = remote.committed(self.store)
            for folder in checkpoint.committed(self.folder):
                if not steps or folder.name > checkpoint.folder_of(self.folder, steps[-1]).name:
                    checkpoint.remove(folder)
        return steps

    def _copy(self, wanted: Callable[[str], bool]) -> None:
        with self._alone():
            Copy(self.store, self.folder).pull(wanted, exact=True)

    def _alone(self) -> AbstractContextManager:
        """Other processes on this machine that read the same run wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return remote.alone(self.folder / ".lock")
