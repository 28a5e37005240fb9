"""One save in two halves: the loop copies this rank's share into host memory, a thread of each rank writes it while training goes on.

The threads talk through the folder of the checkpoint alone, never through a collective, which would meet those of the loop. A rank whose
files are on disk says so in done-<rank>.json, with sizes and SHA-256. Rank 0's thread waits for all of these, makes them into COMMIT, and
removes old checkpoints. What goes wrong in a thread is kept until the ranks can agree on it: at a stop vote, the next save, or the end.
"""

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.distributed import checkpoint
from pipeline.distributed.checkpoint import CheckpointConfig, CheckpointError
from pipeline.distributed.comm import Comm
from pipeline.distributed.host import Files, Host
from pipeline.distributed.remote import AwayError, UploadError, Uploads

T = TypeVar("T")
LOOK_EVERY = 0.05  # seconds between looks at the other ranks' files, and at a thread that is waited for
LAG = 120.0  # seconds after which a file that another rank has written must be seen by rank 0
LAST_WORDS = 10.0  # seconds that rank 0 waits for the files of others when training has ended by an error: they may be dead


class Saved(NamedTuple):
    """What a save took. seconds: from its beginning to the end of this rank's thread (on rank 0: COMMIT); stalled: of training."""

    step: int
    size: int  # bytes of this rank's files
    stalled: float
    seconds: float


class Saver:
    """One for a run, on every rank; at most one save is under way.

    `taken` (rank 0) says who else trains in the folder by now, or None: asked just before COMMIT, which is then not written.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run: Path,
        comm: Comm,
        taken: Callable[[], str | None] | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        self.config, self.run, self.comm, self.taken, self.uploads = config, run, comm, taken, uploads
        self.host = Host(keep=config.asynchronous)
        self.moved = 0  # grows while the loop waits for a thread that gets on: the watchdog takes no long save for a hang
        self._writer: _Writer | None = None
        self._stalled = 0.0

    def save(self, step: int, facts: dict[str, Any], share: Callable[[Host], Files], first: Callable[[], None] = lambda: None) -> None:
        """Begins the checkpoint of a step; ends it too without checkpoint.asynchronous. `share` copies what this rank will write.

        `share` may be collective, and is asked once `first`, which may fail on one rank alone, has succeeded on all.

        Collective. Raises CheckpointError on every rank, for the save before this one as well; the earlier checkpoints stay as they are.
        """
        self.wait()
        began = time.perf_counter()
        folder = checkpoint.folder_of(self.run, step)
        self._together(folder, lambda: (self._begin(folder), first()))
        files = self._together(folder, lambda: share(self.host))
        self.host.arrived()
        if self.comm.rank == 0:
            text = json.dumps({"format": checkpoint.FORMAT, "step": step} | facts, indent=1)
            files["run.json"] = lambda path: checkpoint.write_durably(path, text)
        self._writer = _Writer(self, step, files, began)
        self._writer.start()
        self._stalled = time.perf_counter() - began
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> Saved | None:
        """Until the save that is under way is whole; None where none is. Collective. Raises CheckpointError on every rank if it failed on any."""
        writer = self._writer
        if writer is None:
            return None
        began = time.perf_counter()
        self._until(writer.written)
        failed = self.comm.any(writer.trouble is not None)
        writer.decide(failed)  # rank 0's thread may still wait for the files of one that failed
        self._until(writer.ended)
        self._writer = None
        if self.comm.any(failed or writer.trouble is not None):
            lost, away = (self.comm.any(isinstance(writer.trouble, kind)) for kind in (UploadError, AwayError))
            if lost and writer.trouble is None:
                raise (AwayError if away else UploadError)(f"{writer.folder}: could not be uploaded by another rank; its message says why")
            raise self._failed(writer.folder, writer.trouble) from writer.trouble
        return Saved(writer.step, writer.size, self._stalled + time.perf_counter() - began, writer.seconds)

    def busy(self) -> bool:
        """Whether this rank's thread still works. Not collective, waits for nothing."""
        return self._writer is not None and not self._writer.ended.is_set()

    def failed(self) -> bool:
        """Whether this rank's thread has met trouble; what the ranks vote on. Not collective, waits for nothing."""
        return self._writer is not None and self._writer.trouble is not None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Where training ends by an error, the save under way may still become whole: it is what the next start goes on from."""
        writer = self._writer
        if writer is None or not isinstance(error, Exception):  # a second Ctrl-C waits for nothing
            return
        if self.uploads:
            self.uploads.hurry()
        self._until(writer.written)
        if isinstance(error, OSError) and writer.trouble is not None:  # the disk that is full for the loop as well
            raise self._failed(writer.folder, writer.trouble) from writer.trouble
        self._until(writer.ended, LAST_WORDS)
        writer.decide(failed=True)

    def _begin(self, folder: Path) -> None:
        if self.uploads and self.comm.local_rank == 0:  # on each machine; the one that was uploaded last is what a resume need not fetch
            for old in sorted(path for path in folder.parent.glob("step-*") if path != folder)[:-1]:
                checkpoint.remove(old)
        if self.comm.rank == 0 or (self.uploads and self.comm.local_rank == 0):
            shutil.rmtree(folder, ignore_errors=True)  # an attempt that was cut off
            folder.mkdir(parents=True)

    def _together(self, folder: Path, part: Callable[[], T]) -> T:
        """What goes wrong with the disk on one rank: all must agree before it leaves, or the others wait for ever."""
        trouble = value = None
        try:
            value = part()
        except (OSError, RuntimeError) as error:
            trouble = error
        if self.comm.any(trouble is not None):  # also waits for all of them
            raise self._failed(folder, trouble) from trouble
        return value

    def _until(self, event: threading.Event, seconds: float = float("inf")) -> None:
        deadline, before = time.monotonic() + seconds, self._writer.worked()
        while not event.wait(LOOK_EVERY) and time.monotonic() < deadline:
            self.moved += (worked := self._writer.worked()) != before
            before = worked

    def _failed(self, folder: Path, error: Exception | None) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        if self.comm.rank == 0 and not (folder / "COMMIT").is_file():  # with it, only an older checkpoint could not be removed
            shutil.rmtree(folder, ignore_errors=True)
        if error is None:
            return CheckpointError(
                f"{folder}: could not be written by another rank; its message says why. Earlier checkpoints stay as they were"
            )
        free = shutil.disk_usage(folder.parent).free / 1e6 if folder.parent.exists() else 0
        hint = f"{free:.0f} MB are free there; make room, or lower checkpoint.keep" if _is_full(error) else "look at the file system"
        return CheckpointError(
            f"{folder}: could not be written ({type(error).__name__}: {error}). Earlier checkpoints stay as they were. {hint}, then start the same command again"
        )


class _Writer(threading.Thread):
    """The half beside training. A daemon: a process that must leave does not wait for it, and what it leaves behind has no COMMIT."""

    def __init__(self, saver: Saver, step: int, files: Files, began: float) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.saver, self.step, self.files, self.began = saver, step, files, began
        self.folder = checkpoint.folder_of(saver.run, step)
        self.trouble: Exception | None = None
        self.size, self.seconds = 0, 0.0
        self.written, self.ended = threading.Event(), threading.Event()  # this rank's files, or not; and all that there is to do
        self._give_up, self._all_written = threading.Event(), float("inf")
        self._clock: int | None = None

    def worked(self) -> float:
        """CPU seconds of the thread; they grow inside of one long call that writes or hashes as well."""
        try:
            return time.clock_gettime(self._clock) if self._clock is not None else 0.0
        except OSError:  # it has ended
            return 0.0

    def decide(self, failed: bool) -> None:
        """What the ranks agreed on: one has failed, or all have written."""
        self._all_written = time.monotonic()
        if failed:
            self._give_up.set()

    def run(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):  # not on macOS; there a wait shows no movement
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            self._write()
            self.written.set()
            if self.saver.comm.rank == 0:
                self._commit()
        except Exception as error:  # of any kind: it must reach the loop
            self.trouble = error
        finally:
            self.seconds = time.perf_counter() - self.began
            self.files = {}
            self.written.set()
            self.ended.set()

    def _write(self) -> None:
        listed = {}
        try:
            for name, write in self.files.items():
                path = self.folder / name
                write(path)
                checkpoint.sync(path)
                listed[name] = checkpoint.fingerprint(path)
        except Exception:
            for name in self.files:  # the loop writes to the same disk, and should find room
                (self.folder / name).unlink(missing_ok=True)
            raise
        self.size = sum(entry["size"] for entry in listed.values())
        if self.saver.uploads:
            self.saver.uploads.send(self.folder, listed, self.saver.comm.rank, self.saver.comm.size)
            return
        checkpoint.write_durably(self.folder / f"done-{self.saver.comm.rank:05d}.json", json.dumps(listed))

    def _commit(self) -> None:
        """Rank 0: what all ranks have written becomes a checkpoint, if the folder is still this run's."""
        if self.saver.uploads:
            if self.saver.uploads.commit(self.folder, self._give_up.is_set):
                self.saver.uploads.retire(self.saver.config.keep)
            return
        done = self._all_done()
        if done is None:
            return
        listed = {name: entry for path in done for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        for path in done:
            path.unlink()
        if self.saver.taken and (other := self.saver.taken()):
            raise CheckpointError(
                f"{self.folder}: not committed, because {other} trains in {self.saver.run} by now; this process leaves the folder to it"
            )
        checkpoint.commit(self.folder, listed)
        for old in checkpoint.superfluous(self.saver.run, self.saver.config.keep):
            checkpoint.remove(old)

    def _all_done(self) -> list[Path] | None:
        """The ranks' words, once all are there; None where one has failed."""
        size = self.saver.comm.size
        while len(done := sorted(self.folder.glob("done-*.json"))) < size:
            if self._give_up.wait(LOOK_EVERY):
                return None
            if time.monotonic() > self._all_written + LAG:
                raise CheckpointError(
                    f"{self.folder}: {size - len(done)} of {size} ranks have written files that rank 0 does not see after {LAG:.0f} s. "
                    f"The run folder must be on a file system that all nodes share; choose one with out="
                )
        return done


def _is_full(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    said = str(error)
    return (
        getattr(error, "errno", None) in numbers
        or "space" in said.lower()
        or "enforce fail" in said  # torch's words
        or any(f"os error {number})" in said for number in numbers)  # safetensors'
    )
