"""Where a run lives: a folder that all ranks see, or an object store and a folder on each machine that follows it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pipeline.config import ConfigError
from pipeline.data.errors import DataError, StorageError
from pipeline.data.lanes import RankLanes
from pipeline.data.storage import is_local, local_path
from pipeline.distributed import checkpoint, claim, copies, remote
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.claim import Claim
from pipeline.distributed.comm import Comm
from pipeline.distributed.copies import Copy
from pipeline.distributed.lock import Lock
from pipeline.distributed.remote import Uploads
from pipeline.distributed.store import Patience, Store

T = TypeVar("T")


def folder_of(out: str, cache: Path) -> Path:
    """The folder in which this machine's ranks of a run work. `out`: the run folder, a path or a URL."""
    return Path(local_path(out)) if is_local(out) else copies.place(out, cache, "runs")


def open_home(out: str, cache: Path, comm: Comm, upload_timeout: float) -> "Home":
    """Makes the run folder this start's own. Collective. Raises on every rank: ConfigError (another process has it, it cannot be written
    to, or credentials are wrong), StorageError (it does not answer), CheckpointError (the store's newest checkpoint is damaged)."""
    return Home(folder_of(out, cache), comm) if is_local(out) else RemoteHome(out, folder_of(out, cache), comm, upload_timeout)


def together(comm: Comm, action: Callable[[], T]) -> T:
    """`action` on every rank; what goes wrong on one is raised on all, for they would wait for it for ever. Collective."""
    trouble = value = None
    try:
        value = action()
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        trouble = error
    if comm.any(trouble is not None):
        away = comm.any(isinstance(trouble, StorageError))  # the ranks' exit codes should say the same
        raise trouble or (StorageError if away else CheckpointError)("another rank cannot go on; its message says why")
    return value


class Home:
    """A run folder on a file system that all ranks see; rank 0 holds its lock."""

    uploads: Uploads | None = None

    def __init__(self, folder: Path, comm: Comm) -> None:
        self.folder, self.comm = folder, comm
        trouble = self._lock(comm.rank == 0)
        if trouble := comm.broadcast(trouble):
            raise ConfigError(trouble)

    def _lock(self, mine: bool) -> str | None:
        """Takes the lock if it is this rank's to take; what stands against it in words."""
        self.lock: Lock | None = None
        try:
            if mine:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = Lock(self.folder)
        except ConfigError as error:
            return str(error)
        except OSError as error:
            return f"out: {self.folder}: cannot be the run folder ({error}); choose another one"
        return None

    def superseded(self) -> str | None:
        """Who waits for this process to leave, in words; asked on rank 0."""
        return self.lock.superseded() if self.lock else None

    def taken(self) -> str | None:
        """Who trains in the folder although this process is still there, in words; asked on rank 0."""
        return self.lock.taken() if self.lock else None

    def share(self) -> None:
        """What rank 0 has prepared is there for every rank. Collective."""
        self.comm.barrier()

    def fetch(self, lanes: RankLanes) -> None:
        """The newest checkpoint is there, as far as this rank reads it. Collective. Raises CheckpointError, DataError."""

    def refresh(self, name: str) -> None:
        """A file of the run folder is as others left it."""

    def close(self, well: bool) -> None:
        """What is left to say. `well`: the run came to its end or was asked to stop."""

    def __enter__(self) -> "Home":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(kind is None)


class RemoteHome(Home):
    """A run folder in an object store. One rank of each machine, its first, keeps the machine's folder."""

    def __init__(self, url: str, folder: Path, comm: Comm, upload_timeout: float) -> None:
        self.folder, self.comm, self.keeper = folder, comm, comm.local_rank == 0
        self.store, self.claim = Store(url), None
        trouble = self._lock(self.keeper)
        if comm.any(trouble is not None):
            raise ConfigError(trouble or "another machine's run folder cannot be used; its message says why")
        number, before = self._claim()
        patience = Patience(self.store.url, upload_timeout, says=self.keeper)
        self.copy = Copy(self.store, folder) if self.keeper else None
        self.uploads = Uploads(self.store, number, patience, self.copy)
        try:
            self._settle(number, before)
        except BaseException:
            self.close(well=False)
            raise

    def _claim(self) -> tuple[int, str | None]:
        """Rank 0 claims the run; the claim's number, and the token of the one before."""
        told: tuple[Any, str | None] = (0, None)
        if self.comm.rank == 0:
            try:
                self.claim = Claim(self.store, gone=self._token())
                told = (self.claim.number, self.claim.before.token if self.claim.before else None)
                print(f"{self.store.url}: this start is number {told[0]}; it works in {self.folder} on this machine", flush=True)
            except ConfigError as error:
                told = ("config", str(error))
            except DataError as error:
                told = ("storage" if isinstance(error, StorageError) else "config", f"out: {error}")
        number, before = self.comm.broadcast(told)
        if isinstance(number, str):
            raise (StorageError if number == "storage" else ConfigError)(before)
        return number, before

    def _token(self) -> str | None:
        """Of the claim under which this machine's folder was used last; its holder is gone, for this process has the folder's lock."""
        try:
            return json.loads((self.folder / "claim.json").read_text(encoding="utf-8"))["token"]
        except (OSError, ValueError, KeyError):
            return None

    def _settle(self, number: int, before: str | None) -> None:
        """What this machine has and the store has not is uploaded if nobody has trained since, else dropped; then the store is the truth."""
        token = self.comm.broadcast(self.claim.token if self.claim else None)
        own = self.keeper and before is not None and self._token() == before  # nobody else has claimed the run since

        def begin() -> None:
            if self.keeper:
                if not own:
                    self.copy.forget()
                    for word in (self.folder / copies.CHECKPOINTS).glob("step-*/done-*.json"):
                        word.unlink()  # before the new token counts: what was dropped once is not finished by a later start
                checkpoint.write_durably(self.folder / "claim.json", json.dumps({"number": number, "token": token}))

        together(self.comm, begin)
        steps = together(self.comm, lambda: remote.committed(self.store) if self.comm.rank == 0 else [])
        newest = max(self.comm.broadcast(steps), default=0)
        self._finish(newest, own)
        told = together(self.comm, self._newest)
        self.step, self.files = self.comm.broadcast(told)

        def follow() -> None:
            if not self.keeper:
                return
            for old in (self.folder / copies.CHECKPOINTS).glob("step-*"):
                if old.name != checkpoint.folder_of(self.folder, self.step).name or not self.files:
                    checkpoint.remove(old)
            remote.leave_only(self.folder, self.step, self.files)
            for part in (self.folder / "selection").glob("step-*-rank*.p*"):
                if int(part.name.split("-")[1]) > self.step:
                    part.unlink()  # of steps that are about to be run again, perhaps by another number of ranks
            self.copy.pull(lambda name: not copies.is_large(name))
            if self.files:
                remote.fetch(self.store, self.step, self.files, ["run.json"], self.folder)
                remote.commit_here(self.folder, self.step, {"run.json": self.files["run.json"]})

        together(self.comm, follow)

    def _finish(self, newest: int, own: bool) -> None:
        """Uploads checkpoints that another start wrote here and could not bring away, if all of their parts are at hand."""
        mine = [f for f in remote.unfinished(self.folder) if own and f.name > checkpoint.folder_of(self.folder, newest).name]
        together(self.comm, lambda: [self.uploads.send(f, listed, rank, size) for f in mine for rank, size, listed in remote.words(f)])

        def commit() -> None:
            for folder in mine if self.comm.rank == 0 else []:
                if self.uploads.commit(folder, give_up=lambda: True):
                    print(f"{self.store.url}: {folder.name}, which was only in {self.folder}, is uploaded", flush=True)

        together(self.comm, commit)

    def _newest(self) -> tuple[int, remote.Listed]:
        if self.comm.rank:
            return 0, {}
        steps = remote.committed(self.store)
        return (steps[-1], remote.files_of(self.store, steps[-1])) if steps else (0, {})

    def superseded(self) -> str | None:
        later = self.claim.superseded() if self.claim else None
        return later or super().superseded()

    def share(self) -> None:
        together(self.comm, lambda: self.copy.push() if self.comm.rank == 0 else None)
        together(self.comm, lambda: self.copy.pull(lambda name: not copies.is_large(name)) if self.keeper and self.comm.rank else None)

    def fetch(self, lanes: RankLanes) -> None:
        mine = set(lanes.lanes.tolist())

        def needed(name: str) -> bool:
            if not name.startswith("lanes-"):
                return True
            first, last = (int(number) for number in Path(name).stem.split("-")[1:])
            return not mine.isdisjoint(range(first, last + 1))

        names = sorted(filter(needed, self.files))
        turn = self.comm.local_rank * len(names) // self.comm.local_size  # the ranks of a machine begin with different files
        together(self.comm, lambda: remote.fetch(self.store, self.step, self.files, names[turn:] + names[:turn], self.folder))
        together(self.comm, lambda: remote.commit_here(self.folder, self.step, self.files) if self.keeper and self.files else None)
        together(self.comm, lambda: self._begin() if self.comm.rank == 0 else None)

    def _begin(self) -> None:
        """Drops parts of the selection log from after the checkpoint: these steps are about to be run again, perhaps by another number of
        ranks. Publishes what describes this start."""
        logs = [name for name in self.store.listing("selection") if name.startswith("selection/step-")]
        self.store.remove(name for name in logs if int(name.split("-")[1]) > self.step)
        self.copy.push()

    def refresh(self, name: str) -> None:
        if self.keeper:
            self.copy.pull(lambda found: found == name)

    def close(self, well: bool) -> None:
        store = self.store if well else self.store.once()
        patient = self.uploads.patience if well else lambda action: action()
        try:
            if self.keeper:
                self.copy.store = store
                self.copy.push(lambda action: patient(lambda: (claim.check(store, self.uploads.number), action())[1]))
        except (CheckpointError, DataError, TimeoutError, OSError) as error:
            print(f"{self.store.url}: the record of the run since its last checkpoint is in {self.folder} only ({error})", flush=True)
        try:
            if self.claim:
                self.claim.leave(store)
        except DataError:
            pass  # the next start on another machine waits for a sign of life, in vain
