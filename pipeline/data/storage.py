"""Where bytes live: local paths and any fsspec URL. One place for timeouts, retries and publication that is all or nothing."""

import contextlib
import errno
import itertools
import os
import random
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from pipeline.data.errors import BadSample, DataError, StorageError

ATTEMPTS = 4
BACKOFF_S, BACKOFF_MOST_S = 0.5, 10.0
OUTAGE_S = 120.0  # how long a training run asks for its next shard, which costs less than to start it again
T = TypeVar("T")

# Asking again cannot mend these.
_FINAL = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
    NotImplementedError,
    TypeError,
    DataError,
    BadSample,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# s3fs would open ten connections to one large object and hold 500 MB; shards are many, so one stream each is enough. The retries of
# botocore and s3fs are kept low because ours go round them and attempts multiply: at their defaults a server that takes connections and
# never answers would hold a run for 25 minutes. s3fs keeps 2, because it resumes a cut download where it was cut.
_S3_RETRIES = 2
_S3_DEFAULTS = {"max_concurrency": 1}
_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 1}}


def is_local(url: str) -> bool:
    """True for plain paths and file:// URLs."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.split("://", 1)[1] if "://" in url else url


def join(folder: str, name: str) -> str:
    """`name` inside `folder`; a name that is a URL itself stays as it is."""
    return name if "://" in name else f"{folder.rstrip('/') or '/'}/{name}" if folder else name


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Fetched anew for every use: fsspec keeps one per process, and none survives
    a fork. Settings of the user (fsspec's config files, FSSPEC_* and AWS_* variables) win over ours. Raises DataError."""
    options: dict[str, Any] = {}
    protocol = url.split("://")[0]
    theirs = fsspec.config.conf.get(protocol, {})
    if protocol in ("s3", "s3a"):
        options = _S3_DEFAULTS | theirs | {"config_kwargs": _S3_CONFIG | theirs.get("config_kwargs", {})}
    try:
        if protocol in ("http", "https") and "client_kwargs" not in theirs:
            from aiohttp import ClientTimeout

            # its default ends every download after five minutes, however well it goes, and waits as long for a silent server
            options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=5, sock_read=15)}}
        fs, path = url_to_fs(url, **options)
        if protocol in ("s3", "s3a"):
            fs.retries = _S3_RETRIES
        return fs, path
    except ImportError as error:
        raise DataError(
            f"{url}: {error}. Object stores need an fsspec driver, for s3:// it is pip install 's3fs' (extra [train])"
        ) from None
    except ValueError as error:
        raise DataError(f"{url}: {error}. Expected a path or a URL that fsspec knows, such as s3://bucket/folder") from None


def with_retries(action: Callable[[], T], where: str, attempts: int = ATTEMPTS, backoff_s: float = BACKOFF_S, outage_s: float = 0.0) -> T:
    """Runs `action`, again after an I/O error, waiting backoff_s x 2^n between attempts; gives up after `attempts`, and not before
    `outage_s` seconds.

    Raises StorageError with the attempts and the last error; what cannot be mended by asking again ends at once as another DataError, a
    missing file as FileNotFoundError, so that the caller can say what it means.
    """
    began = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action()
        except (DataError, BadSample, FileNotFoundError):
            raise
        except _FINAL as error:
            raise DataError(f"{where}: {type(error).__name__}: {error}. Check the permissions and that it is a file") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise DataError(f"{error.filename or where}: {error.strerror}. Free some space or name another folder") from error
            if "Credentials" in type(error).__name__:
                raise DataError(f"{where}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or an AWS profile") from error
            if attempt >= attempts and time.monotonic() - began >= outage_s:
                raise StorageError(
                    f"{where}: {attempt} attempts failed, the last with {type(error).__name__}: {error}. "
                    f"Check that the storage answers from this machine (endpoint, network, AWS_ENDPOINT_URL)"
                ) from error
            if attempt == attempts:
                print(f"{where}: {type(error).__name__}: {error}. Asked again for up to {outage_s:.0f} s", file=sys.stderr, flush=True)
        wait = min(backoff_s * 2 ** (attempt - 1), BACKOFF_MOST_S)
        time.sleep(wait * random.uniform(0.75, 1.25))  # jitter: workers that failed together ask apart
    raise AssertionError("unreachable")


def fetch(url: str, to: str, attempts: int = ATTEMPTS, backoff_s: float = BACKOFF_S) -> None:
    """Copies a whole file to the local path `to` with one sequential read. Raises DataError."""

    def get() -> None:
        fs, path = filesystem(url)
        fs.get_file(path, to)

    try:
        with_retries(get, url, attempts, backoff_s)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file. Check the URL, or build the shards again with python -m tools.make_shards") from None


def read_bytes(
    url: str,
    start: int | None = None,
    end: int | None = None,
    attempts: int = ATTEMPTS,
    backoff_s: float = BACKOFF_S,
    outage_s: float = 0.0,
) -> bytes:
    """A file, or its bytes [start, end). Raises FileNotFoundError or DataError."""

    def get() -> bytes:
        fs, path = filesystem(url)
        data = fs.cat_file(path, start=start, end=end)
        if end is not None and len(data) < end - (start or 0):
            raise EOFError(f"{len(data)} bytes came for the range {start or 0}..{end}; the file is shorter, or the connection was cut")
        return data

    return with_retries(get, url, attempts, backoff_s, outage_s)


def read_parquet(url: str, columns: list[str] | None = None) -> pa.Table:
    """A small Parquet file, whole. Raises FileNotFoundError, DataError, pa.ArrowException.

    Without Arrow's threads: one of them may still hold the Python bytes while the interpreter ends, and takes the process down with it.
    """
    return pq.ParquetFile(pa.BufferReader(read_bytes(url)), pre_buffer=False).read(columns, use_threads=False)


def size_of(url: str) -> int | None:
    """Size in bytes, None where there is no such file. Raises DataError."""

    def ask() -> int:
        fs, path = filesystem(url)
        fs.invalidate_cache()
        return int(fs.info(path)["size"])

    try:
        return with_retries(ask, url)
    except FileNotFoundError:
        return None


def sizes_in(folder: str) -> dict[str, int]:
    """File name -> bytes of the files of one folder, by one listing; empty where there is no such folder. Raises DataError."""

    def ask() -> dict[str, int]:
        fs, path = filesystem(folder)
        fs.invalidate_cache()
        return {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0)
            for entry in fs.ls(path, detail=True)
            if entry["type"] == "file"
        }

    try:
        return with_retries(ask, folder)
    except FileNotFoundError:
        return {}


def read_many(urls: list[str]) -> dict[str, bytes]:
    """Small files, asked for together where the storage can. Raises DataError."""

    def get() -> dict[str, bytes]:
        pairs = [filesystem(url) for url in urls]
        found = pairs[0][0].cat([path for _, path in pairs], on_error="raise")
        found = found if isinstance(found, dict) else {pairs[0][1]: found}
        return {url: found[path] for url, (_, path) in zip(urls, pairs)}

    return with_retries(get, urls[0]) if urls else {}


@contextlib.contextmanager
def opened(url: str) -> Iterator[Any]:
    """A file for reading with seeks. Raises FileNotFoundError, DataError."""
    fs, path = filesystem(url)
    with with_retries(lambda: fs.open(path, "rb"), url) as file:
        yield file


def remove_folder(url: str) -> None:
    """Removes a folder and what is in it; nothing happens where it is not there."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def make_folder(url: str) -> None:
    """Creates a folder where the storage has folders."""

    def make() -> None:
        fs, path = filesystem(url)
        fs.makedirs(path, exist_ok=True)

    with_retries(make, url)


def publish(local: str, url: str) -> None:
    """Puts the finished local file where `url` says; a reader sees nothing or all of it. The local file is gone afterwards.
    A local target costs one rename when both are on one disk, which the caller arranges with `temporary`."""
    if is_local(url):
        with open(local, "rb") as file:
            os.fsync(file.fileno())
        os.replace(local, local_path(url))
        return

    def put() -> None:
        fs, path = filesystem(url)
        fs.put_file(local, path)

    with_retries(put, url)
    os.unlink(local)


def write_bytes(url: str, data: bytes) -> None:
    """Writes a small file, all or nothing."""
    if is_local(url):
        temp = temporary(url)
        with open(temp, "wb") as file:
            file.write(data)
        publish(temp, url)
        return

    def put() -> None:
        fs, path = filesystem(url)
        fs.pipe_file(path, data)

    with_retries(put, url)


def temporary(url: str) -> str:
    """A name for a file that becomes `url`: hidden beside a local target (so that the rename is atomic), else in the temporary folder."""
    unique = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    if is_local(url):
        folder, name = os.path.split(os.path.abspath(local_path(url)))
        return os.path.join(folder, f".{name}.{unique}.tmp")
    return os.path.join(tempfile.gettempdir(), f"{url.rsplit('/', 1)[-1]}.{unique}.tmp")


def sweep(folder: str) -> None:
    """Removes the temporary files in a local folder whose writer, a process of this machine, has died."""
    if not is_local(folder) or not os.path.isdir(local_path(folder)):
        return
    for entry in os.scandir(local_path(folder)):
        found = re.search(rf"^\..*\.{re.escape(socket.gethostname())}\.(\d+)\.[0-9a-f]{{8}}\.tmp$", entry.name)
        if not found:
            continue
        try:
            os.kill(int(found[1]), 0)  # signal 0 only asks whether it lives
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
        except PermissionError:
            pass
