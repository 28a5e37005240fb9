"""Checkpoints of a run folder in an object store: written to local disk, uploaded by every rank, committed by rank 0, fetched to resume.

The store is the truth. A checkpoint exists when its COMMIT does, which rank 0 writes last, after every rank has said under the number of
this start which files it uploaded, and the store lists them with these sizes. Objects are created, not overwritten, and before each one
the claim is looked at: what an older start still does cannot change what a newer one has committed.
"""

import fcntl
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.data.errors import DataError, StorageError
from pipeline.distributed import checkpoint, claim
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.copies import CHECKPOINTS, Copy
from pipeline.distributed.store import Patience, Store, Stored

Listed = dict[str, dict[str, Any]]  # file name -> size, sha256, as in COMMIT
POLL = 0.5  # seconds between rank 0's looks for what the other ranks have uploaded


class UploadError(CheckpointError):
    """A checkpoint that could not be brought to the store, for a reason that waiting does not mend; this machine has it."""


class AwayError(UploadError, StorageError):
    """The same because the store did not answer in time; a launcher may start the same command again."""


def folder_of(step: int) -> str:
    """The name of a checkpoint in the store, as in a run folder."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def committed(store: Store) -> list[int]:
    """The steps of all whole checkpoints, oldest first. Raises DataError."""
    commits = (re.fullmatch(rf"{CHECKPOINTS}/step-(\d+)/COMMIT", name) for name in store.listing(CHECKPOINTS))
    return sorted(int(found[1]) for found in commits if found)


def files_of(store: Store, step: int) -> Listed:
    """What COMMIT lists. Raises CheckpointError where it is damaged, of another version, or not what the store holds; FileNotFoundError."""
    where = f"{store.url}/{folder_of(step)}"
    files = checkpoint.listed(store.read(f"{folder_of(step)}/COMMIT"), where)
    there = store.listing(folder_of(step))
    for name, expected in files.items():
        found = there.get(f"{folder_of(step)}/{name}")
        if found is None or found.size != expected["size"]:
            raise CheckpointError(
                f"{where}/{name}: has {found.size if found else 'no'} bytes, COMMIT says {expected['size']}. Restore the object, "
                f"or delete {where} to resume from the checkpoint before it"
            )
    return files


def fetch(store: Store, step: int, files: Listed, names: Iterable[str], run: Path) -> None:
    """Brings files of a checkpoint into `run`, those that are not there as COMMIT has them; several processes may fetch the same.

    Raises CheckpointError where the store holds other bytes than COMMIT says, DataError.
    """
    folder = checkpoint.folder_of(run, step)
    for name in names:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f".{name}.lock"):
            if (folder / name).is_file() and checkpoint.fingerprint(folder / name) == files[name]:
                continue
            found = store.get(f"{folder_of(step)}/{name}", folder / name)
        if found != files[name]["sha256"]:
            (folder / name).unlink(missing_ok=True)
            raise CheckpointError(
                f"{store.url}/{folder_of(step)}/{name}: was changed after it was committed (COMMIT says SHA-256 {files[name]['sha256']}, "
                f"found {found}). Restore the object, or delete {store.url}/{folder_of(step)} to resume from the checkpoint before it"
            )


def commit_here(run: Path, step: int, files: Listed) -> None:
    """A COMMIT for what was fetched of a checkpoint, so that this machine's part of it is one like any other."""
    folder = checkpoint.folder_of(run, step)
    checkpoint.commit(folder, {name: entry for name, entry in files.items() if (folder / name).is_file()})


def leave_only(run: Path, step: int, files: Listed) -> None:
    """Removes what another attempt at the step, by another number of ranks, has left here: who reads a checkpoint looks for names."""
    for path in checkpoint.folder_of(run, step).glob("[!.]*"):
        if path.name not in files and path.name != "COMMIT":
            path.unlink(missing_ok=True)


def unfinished(run: Path) -> list[Path]:
    """Local checkpoint folders with words of ranks, oldest first."""
    return sorted({path.parent for path in (run / CHECKPOINTS).glob("step-*/done-*-of-*.json")})


def words(folder: Path) -> list[tuple[int, int, Listed]]:
    """(rank, size, files) of every word in a local checkpoint folder."""
    found = []
    for path in sorted(folder.glob("done-*-of-*.json")):
        _, rank, _, size = path.stem.split("-")
        found.append((int(rank), int(size), json.loads(path.read_text(encoding="utf-8"))))
    return found


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time is inside."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Uploads:
    """What the ranks of one start bring to the store; `number` is its claim's. Called by threads beside training.

    `record`, on one rank of each machine: the rest of the run folder, which goes first, for a checkpoint vouches for it.
    """

    def __init__(self, store: Store, number: int, patience: Patience, record: Copy | None) -> None:
        self.store, self.number, self.patience, self.record = store, number, patience, record
        self._once = store.once()

    def send(self, folder: Path, listed: Listed, rank: int, size: int) -> None:
        """One of `size` ranks' files of the checkpoint in `folder`, then its word that they are there.

        The word is kept beside them, so that another start on this machine can finish what this one does not. Raises CheckpointError
        (another process has the run, or the store was away for too long), OSError.
        """
        checkpoint.write_durably(folder / f"done-{rank:05d}-of-{size:05d}.json", json.dumps(listed))
        self._ask(folder, lambda: claim.check(self._once, self.number))
        if self.record:
            self.record.push(lambda action: self._ask(folder, lambda: (claim.check(self._once, self.number), action())[1]))
        for name in listed:
            self._ask(folder, lambda name=name: self._new(f"{CHECKPOINTS}/{folder.name}/{name}", folder / name))
        word = json.dumps({"size": size, "files": listed}).encode()
        self._ask(folder, lambda: self._once.write(self._word(folder.name, rank), word))

    def commit(self, folder: Path, give_up: Callable[[], bool] = lambda: False) -> Listed | None:
        """Rank 0: writes COMMIT when every rank has given its word; None when `give_up` says so before. Gives what it lists."""
        where = f"{CHECKPOINTS}/{folder.name}"
        while (files := self._ask(folder, lambda: self._all(folder.name))) is None:
            if give_up():
                return None
            time.sleep(POLL)
        self._ask(folder, lambda: claim.check(self._once, self.number))
        there = self._ask(folder, lambda: self._once.listing(where))
        for name, entry in files.items():
            if there.get(f"{where}/{name}", Stored(-1, "")).size != entry["size"]:
                raise CheckpointError(f"{self.store.url}/{where}/{name}: is not what was uploaded; somebody else writes there, look who")
        strays = [name for name in there if name.removeprefix(f"{where}/") not in files]  # ranks' words, and an attempt that was cut off
        self._ask(folder, lambda: self._once.remove(name for name in strays if not name.endswith("/COMMIT")))
        self._ask(folder, lambda: claim.check(self._once, self.number))
        self._ask(folder, lambda: self._once.write(f"{where}/COMMIT", checkpoint.commit_text(files).encode()))
        return files

    def retire(self, keep: int) -> None:
        """Rank 0: removes all but the newest checkpoints, COMMIT first, and older attempts that were cut off."""

        def remove() -> None:
            claim.check(self._once, self.number)
            parts = (re.fullmatch(rf"{CHECKPOINTS}/step-(\d+)/[^/]+", name) for name in self._once.listing(CHECKPOINTS))
            steps = {found[0]: int(found[1]) for found in parts if found}
            kept = sorted(step for name, step in steps.items() if name.endswith("/COMMIT"))[-keep:]
            old = [name for name, step in steps.items() if kept and step < kept[-1] and step not in kept]
            self._once.remove(name for name in old if name.endswith("/COMMIT"))
            self._once.remove(name for name in old if not name.endswith("/COMMIT"))

        with suppress(DataError):  # the new one is there; the next save tells of a store that is away, and tidies up as well
            remove()

    def hurry(self) -> None:
        """Training has ended by an error: a store that is away is waited for no longer than a minute."""
        self.patience.seconds = min(self.patience.seconds, 60.0)

    def _new(self, name: str, path: Path) -> None:
        claim.check(self._once, self.number)
        if not self._once.put(name, path, new=True):
            claim.check(self._once, self.number)  # of an attempt that was cut off, this one's or an older start's
            self._once.remove([name])
            if not self._once.put(name, path, new=True):
                raise StorageError(f"{self.store.at(name)}: somebody else writes there at this moment")  # asked again

    def _word(self, folder: str, rank: int) -> str:
        return f"{CHECKPOINTS}/{folder}/done-{rank:05d}.{self.number:06d}"

    def _all(self, folder: str) -> Listed | None:
        """What the ranks have uploaded, once the word of each is there."""
        words = [name for name in self._once.listing(f"{CHECKPOINTS}/{folder}") if name.endswith(f".{self.number:06d}")]
        if not words or len(words) < json.loads(self._once.read(words[0]))["size"]:
            return None
        told = [json.loads(word) for word in self._once.read_many(words)]
        return {name: entry for word in told for name, entry in sorted(word["files"].items())}

    def _ask(self, folder: Path, action: Callable[[], Any]) -> Any:
        try:
            return self.patience(action)
        except TimeoutError as error:
            kind, when, why = AwayError, f" within checkpoint.upload_timeout {self.patience.seconds:.0f} s", error
        except DataError as error:
            kind, when, why = UploadError, "", error
        raise kind(
            f"{self.store.url}: the checkpoint {folder.name} could not be uploaded{when} ({why}). Earlier checkpoints stay as they were, and "
            f"this one is whole in {folder}: the same command on this machine uploads it first, when "
            + ("the storage answers again" if kind is AwayError else "that is mended")
        )
