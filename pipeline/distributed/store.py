"""A folder in an object store by names relative to it: what a run folder needs of a store and shards do not (create, list, remove)."""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.data import storage
from pipeline.data.errors import DataError, StorageError

IN_MEMORY = 64_000_000  # bytes; a smaller file is read at once, so that one which grows meanwhile arrives as it was at some moment
T = TypeVar("T")


class Stored(NamedTuple):
    """An object in a listing."""

    size: int
    version: str  # another one after every write


class Store:
    """Every method asks at most `attempts` times and then raises DataError; a missing object is FileNotFoundError."""

    def __init__(self, url: str, attempts: int = storage.ATTEMPTS) -> None:
        self.url, self.attempts = url.rstrip("/"), attempts

    def at(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}"

    def once(self) -> "Store":
        """The same folder, asked once: for callers that wait and ask again by themselves."""
        return Store(self.url, attempts=1)

    def _ask(self, action: Callable[[], T], name: str) -> T:
        return storage.with_retries(action, self.at(name), self.attempts)

    def listing(self, under: str = "") -> dict[str, Stored]:
        """All objects whose name begins with the folder `under`, by name. Raises DataError, also for a name that leads out of the folder: a
        copy on disk has files of these names."""

        def ask() -> dict[str, Stored]:
            fs, root = storage.filesystem(self.url)
            fs.invalidate_cache()
            found = fs.find(f"{root}/{under}".rstrip("/"), detail=True)
            first = len(root.rstrip("/")) + 1
            names = {name: name[first:] for name in found}
            if outside := [name for name, inside in names.items() if inside.startswith("/") or ".." in inside.split("/")]:
                raise DataError(f"{self.url}: holds an object whose name leads out of this folder, {outside[0]!r}; find out who wrote it")
            return {names[name]: Stored(int(entry["size"] or 0), _version(entry)) for name, entry in found.items()}

        return self._found(lambda: self._ask(ask, under))

    def read(self, name: str) -> bytes:
        """A small object."""
        return storage.read_bytes(self.at(name), attempts=self.attempts)

    def read_many(self, names: list[str]) -> list[bytes]:
        """Small objects, asked for together where the store can."""
        found = storage.read_many([self.at(name) for name in names])
        return [found[self.at(name)] for name in names]

    def exists(self, name: str) -> bool:
        """Whether there is such an object now."""

        def ask() -> bool:
            fs, path = storage.filesystem(self.at(name))
            fs.invalidate_cache()
            return fs.isfile(path)

        return self._ask(ask, name)

    def written(self, name: str) -> float:
        """When an object was written last, in seconds since 1970 by the store's clock."""

        def ask() -> float:
            fs, path = storage.filesystem(self.at(name))
            fs.invalidate_cache()
            return fs.modified(path).timestamp()

        return self._ask(ask, name)

    def write(self, name: str, data: bytes) -> None:
        """A small object, whether it was there or not."""

        def put() -> None:
            fs, path = storage.filesystem(self.at(name))
            _parent(fs, path)
            fs.pipe_file(path, data)

        self._found(lambda: self._ask(put, name))

    def create(self, name: str, data: bytes) -> bool:
        """A small object that nobody has written before; False where somebody has. Atomic where the store has conditional writes."""

        def put() -> bool:
            fs, path = storage.filesystem(self.at(name))
            _parent(fs, path)
            try:
                _new(fs.pipe_file, path, data)
            except Exception:  # every driver has its own error for a condition that failed, so the store is asked what it was
                fs.invalidate_cache()
                if not fs.isfile(path):
                    raise
                return fs.cat_file(path) == data  # an answer was lost on the way and the request sent again
            return True

        return self._found(lambda: self._ask(put, name))

    def put(self, name: str, path: Path, new: bool = False) -> bool:
        """A local file. `new`: only where nothing is yet; False where something is, and the store can tell."""

        def send() -> bool:
            fs, target = storage.filesystem(self.at(name))
            _parent(fs, target)
            how = _new if new else lambda call, *args: call(*args)
            try:
                if path.stat().st_size < IN_MEMORY:
                    how(fs.pipe_file, target, path.read_bytes())
                else:
                    how(fs.put_file, str(path), target)
            except Exception:
                fs.invalidate_cache()
                if not new or not fs.isfile(target):
                    raise
                return False
            return True

        if not path.is_file():
            raise FileNotFoundError(f"{path}: is gone, before it was uploaded")
        return self._found(lambda: self._ask(send, name))

    def get(self, name: str, path: Path) -> str:
        """Fetches an object into a local file, all or nothing; gives its SHA-256."""
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        path.parent.mkdir(parents=True, exist_ok=True)

        def fetch() -> None:
            fs, source = storage.filesystem(self.at(name))
            fs.get_file(source, str(partial))

        try:
            self._ask(fetch, name)
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return found

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, many with one request where the store can; those that are not there are passed over."""
        names = list(names)

        def drop() -> None:
            pairs = [storage.filesystem(self.at(name)) for name in names]
            try:
                pairs[0][0].rm([path for _, path in pairs])
            except FileNotFoundError:  # one of them, and nobody says which are left
                for fs, path in pairs:
                    with contextlib.suppress(FileNotFoundError):
                        fs.rm_file(path)

        if names:
            self._ask(drop, names[0])

    def _found(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except FileNotFoundError as error:
            raise DataError(f"{self.url}: {error}; there is no such bucket, or no such folder that could be written to") from None


def _new(call: Callable, *args: Any) -> None:
    """A write that fails where there is something already, if the driver knows how to ask for that; otherwise a write."""
    try:
        call(*args, mode="create")
    except (TypeError, NotImplementedError):
        call(*args)


def _parent(fs: object, path: str) -> None:
    """Folders, where a store has them: a mounted disk does, S3 would create a bucket."""
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _version(entry: dict) -> str:
    """What a listing says that changes with every write."""
    for key in ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created"):
        if entry.get(key):
            return str(entry[key])
    return ""


class Patience:
    """Goes on asking a store that does not answer, while training goes on; says so once, and once that it answers again."""

    def __init__(self, url: str, seconds: float, says: bool = True) -> None:
        self.url, self.seconds, self.says, self._silent_since = url, seconds, says, None

    def __call__(self, action: Callable[[], T]) -> T:
        """`action` until it succeeds. Raises TimeoutError with the last error in words when that takes more than `seconds`, and any error
        but StorageError at once."""
        wait, began = 0.5, time.monotonic()
        while True:
            try:
                value = action()
            except StorageError as error:
                now = time.monotonic()
                if now - began > self.seconds:
                    raise TimeoutError(f"{error}") from error
                if self._silent_since is None:
                    self._silent_since = now
                    if self.says:
                        print(
                            f"{self.url}: cannot be reached ({error}); asked again for up to {self.seconds:.0f} s, training goes on",
                            flush=True,
                        )
                time.sleep(min(wait, 15.0))
                wait *= 2
            else:
                if self._silent_since is not None and self.says:
                    print(f"{self.url}: answers again after {time.monotonic() - self._silent_since:.0f} s", flush=True)
                self._silent_since = None
                return value
