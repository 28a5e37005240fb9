"""One process group per run folder: the kernel's lock, and behind it the name of the newest start, for a job that outlived its node."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from pipeline.config import ConfigError

PATIENCE = 300.0  # seconds that a newer start waits for an older one to save and leave


class Owner(NamedTuple):
    """Who trains in a folder. `job` is empty outside of Slurm; `start` counts the starts of one job."""

    job: str
    start: int
    host: str
    process: int

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        job, start = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(job, int(start), socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        process = f"process {self.process} on {self.host}"
        return f"start {self.start} of job {self.job} ({process})" if self.job else process


class Lock:
    """Held by the process that made it. The kernel frees it when its holder dies, however it dies (a lock by lockf and not by flock: that
    would be inherited by the loader's workers, which outlive a killed trainer by some seconds).

    When Slurm loses a node it starts the job again elsewhere, and ranks that still run there would write into the same folder. The newer
    start leaves its name in run.owner; the older one sees that at a vote, saves, and goes, and only then the newer one goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.owner, self._name = Owner.here(), folder / "run.owner"
        self._file = (folder / "run.lock").open("a+")
        if not self._try():
            holder = self._holder()
            if not (holder and holder.job and holder.job == self.owner.job and holder.start < self.owner.start):
                raise ConfigError(
                    f"{folder}: {holder or 'another process'} is training in this folder. Wait for it, stop it, or choose another folder with out="
                )
            self._claim()
            print(f"{folder}: {holder} is still training here; waiting for it to save and leave", flush=True)
            deadline = time.monotonic() + PATIENCE
            while not self._try():
                if time.monotonic() > deadline:
                    raise ConfigError(f"{folder}: {holder} did not leave within {PATIENCE:.0f} s; end it, then start this job again")
                time.sleep(0.5)
        if self.owner.job:
            self._claim()
        self._file.truncate(0)
        self._file.write(json.dumps(self.owner))
        self._file.flush()

    def superseded(self) -> str | None:
        """Who has claimed the folder since, in words; None while it is this process's."""
        try:
            newest = Owner(*json.loads(self._name.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # a file system that lags; the next look will find it
        return None if newest == self.owner else str(newest)

    def taken(self) -> str | None:
        """Who has gone on into the folder although this process is still there, in words: on a file system that has no locks, or lost
        them. None while nobody has; one that only waits for this process to save and leave has not."""
        holder = self._holder()
        return None if holder is None or holder == self.owner else str(holder)

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            print(
                f"{self._file.name}: this file system has no locks ({error}); nothing keeps a second process out of the folder", flush=True
            )
        return True

    def _holder(self) -> Owner | None:
        self._file.seek(0)
        try:
            return Owner(*json.loads(self._file.read()))
        except (ValueError, TypeError):
            return None

    def _claim(self) -> None:
        partial = self._name.with_suffix(".part")
        partial.write_text(json.dumps(self.owner), encoding="utf-8")
        partial.replace(self._name)
