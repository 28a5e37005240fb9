"""Whole shards of a remote data set on this node's disk: fetched once by one sequential read, shared by all processes, evicted by size."""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator

from pipeline.data import storage
from pipeline.data.errors import DataError

_POLL_S = 0.05


class ShardCache:
    """A folder with at most `max_bytes` of shards. `folder=None` is `cache: off`: remote members are then read by ranged GETs.

    Any number of processes may share the folder. What makes that safe: a shard is downloaded into `<name>.part` by whoever holds the
    flock of that file; the finished file is opened before it gets its final name, so nobody can evict it in between; every reader holds
    a shared flock on what it has open, and files without one are evicted first, the least recently opened before the others. A shard
    that must go although it is open stays readable for those who have it open.
    """

    def __init__(
        self,
        folder: str | None,
        max_bytes: int = 0,
        *,
        attempts: int = storage.ATTEMPTS,
        backoff_s: float = storage.BACKOFF_S,
        outage_s: float = 0.0,
        patience_s: float = 600,
    ) -> None:
        self.folder, self.max_bytes, self.patience_s = folder, max_bytes, patience_s
        self.retries = (attempts, backoff_s, outage_s)  # of storage.with_retries
        if folder is not None:
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise DataError(f"{folder}: cannot be the shard cache: {error}. Name a writable folder on a local disk") from None

    def ranged(self, url: str) -> bool:
        """True where members of this shard are to be read with `read` instead of from a local file."""
        return self.folder is None and not storage.is_local(url)

    def path(self, url: str, size: int, version: str = "") -> str:
        """The local path of a shard of `size` bytes, fetched if need be. Another process may evict it at any time: readers use `open`."""
        os.close(self.open(url, size, version))
        return storage.local_path(url) if storage.is_local(url) else self._final(url, size, version)

    def open(self, url: str, size: int, version: str = "") -> int:
        """A file descriptor for reading a shard of `size` bytes; `version` (its sha256) keeps a changed shard apart from the old one.

        Raises DataError: no such shard, another size than expected, larger than the cap, storage that does not answer.
        """
        if storage.is_local(url):
            return self._open_local(url)
        if self.folder is None:
            raise DataError(f"{url}: the cache is off, so there is no local file; read its members with ShardCache.read")
        if size > self.max_bytes:
            raise DataError(
                f"{url}: has {size} bytes, the cache in {self.folder} may hold {self.max_bytes}. Raise its cap, or make smaller shards"
            )
        final, deadline = self._final(url, size, version), time.monotonic() + self.patience_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(final, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.utime(descriptor)  # what "recently used" is measured by
                return descriptor
            descriptor = self._claim(final, size)
            if descriptor is not None:
                return self._fetch(url, size, final, descriptor)
            if time.monotonic() > deadline:
                raise DataError(
                    f"{url}: no room for {size} bytes in {self.folder} within {self.patience_s:.0f} s: "
                    f"its cap of {self.max_bytes} bytes is taken by shards that are being fetched. Raise the cap"
                )
            time.sleep(_POLL_S)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` by one ranged GET, retried. Raises DataError."""
        try:
            return storage.read_bytes(url, offset, offset + size, *self.retries) if size else b""
        except FileNotFoundError:
            raise DataError(
                f"{url}: no such shard. Restore it from its source, or build the index again with python -m tools.make_shards"
            ) from None

    def _open_local(self, url: str) -> int:
        path = storage.local_path(url)
        try:
            return storage.with_retries(lambda: os.open(path, os.O_RDONLY), path, *self.retries)
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such shard. Restore it from its source, or build the index again with python -m tools.make_shards"
            ) from None

    def _final(self, url: str, size: int, version: str) -> str:
        assert self.folder is not None
        return os.path.join(self.folder, f"{hashlib.sha256(f'{url} {version}'.encode()).hexdigest()[:40]}-{size}.tar")

    def _claim(self, final: str, size: int) -> int | None:
        """Makes room and returns the locked, empty `.part` of a shard that nobody is fetching; None: wait and look again."""
        with self._folder_lock():
            part = f"{final}.part"
            if os.path.exists(final) or _in_use(part):
                return None
            if not self._make_room(size):
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return descriptor

    def _make_room(self, size: int) -> bool:
        """Evicts until `size` more bytes fit under the cap. Downloads in flight count with their full size and are left alone."""
        assert self.folder is not None
        used, idle, open_ = 0, [], []
        for entry in os.scandir(self.folder):
            if not entry.name.endswith((".tar", ".part")):
                continue
            taken = int(entry.name.split(".")[0].rsplit("-", 1)[1])
            if entry.name.endswith(".part"):
                if _in_use(entry.path):
                    used += taken
                else:
                    os.unlink(entry.path)  # whoever fetched it was killed
                continue
            used += taken
            with contextlib.suppress(FileNotFoundError):
                (open_ if _in_use(entry.path) else idle).append((entry.stat().st_mtime_ns, taken, entry.path))
        for _, taken, path in [*sorted(idle), *sorted(open_)]:
            if used + size <= self.max_bytes:
                break
            os.unlink(path)
            used -= taken
        return used + size <= self.max_bytes

    def _fetch(self, url: str, size: int, final: str, descriptor: int) -> int:
        part = f"{final}.part"

        def get() -> None:
            fs, path = storage.filesystem(url)
            fs.get_file(path, part)
            got = os.fstat(descriptor).st_size
            if got != size:
                there = storage.size_of(url)
                if there != size:
                    raise DataError(
                        f"{url}: has {there} bytes, the index expects {size}. Restore the shard from its source, or index it again"
                    )
                raise EOFError(f"{got} of {size} bytes came")

        try:
            storage.with_retries(get, url, *self.retries)
            with self._folder_lock():  # whoever counts the folder sees the shard under one of its names
                os.rename(part, final)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return descriptor
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            os.close(descriptor)
            if isinstance(error, FileNotFoundError):
                raise DataError(
                    f"{url}: no such shard. Restore it from its source, or index the shards again with tools.make_shards"
                ) from None
            raise

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Held for milliseconds: looking at the folder, evicting, and creating a `.part` are one step for all processes."""
        assert self.folder is not None
        descriptor = os.open(os.path.join(self.folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _in_use(path: str) -> bool:
    """True where some process holds a flock on the file; False where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
