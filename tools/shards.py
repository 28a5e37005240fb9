"""One shard from start to finish: written or only looked through, its part of the index, and last its statistics, which mean "done"."""

import hashlib
import io
import json
import os
import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.data.errors import BadSample
from pipeline.data.index_format import ShardInfo
from tools.scan import scan_tar
from tools.sources.base import Source

PARTS = "parts"  # pieces of the index, removed when the index is there


class Task(NamedTuple):
    """What a worker needs for one shard: rows of the source and the captions to write, or the URL of a shard that exists."""

    number: int
    first: int = 0  # position of its first sample in the data set; the key is the position, so that it tells nothing about the name
    rows: np.ndarray | None = None  # int64 [n]
    given: list[str] | None = None  # captions to write instead of the true ones
    url: str = ""


class Output(NamedTuple):
    """Where a data set goes, and what it was made with."""

    url: str
    build: str  # digest of the options
    options: dict[str, Any]
    in_place: bool  # shards stay where they are

    def shard(self, number: int) -> str:
        return storage.join(self.url, f"{number:06d}.tar")

    def stats(self, number: int) -> str:
        return storage.join(self.url, f"{PARTS}/{number:06d}.stats.json" if self.in_place else f"{number:06d}.stats.json")

    def part(self, number: int) -> str:
        return storage.join(self.url, f"{PARTS}/{number:06d}.parquet")


class Stats(NamedTuple):
    """The statistics file of a finished shard."""

    name: str
    samples: int
    bytes: int
    sha256: str
    extensions: tuple[str, ...]
    seconds: float
    failures: dict[str, int]
    build: str
    options: dict[str, Any]

    @property
    def info(self) -> ShardInfo:
        return ShardInfo(self.name, self.bytes, self.sha256, self.samples, self.extensions)

    @classmethod
    def parse(cls, data: bytes) -> "Stats":
        """Raises ValueError or TypeError for what is no statistics file."""
        values = json.loads(data)
        return cls(**values | {"extensions": tuple(values["extensions"])})


def make(task: Task, source: Source | None, out: Output) -> Stats:
    """Writes (or, for a shard that exists, looks through) one shard and publishes it, its part of the index and its statistics, in
    this order. Raises DataError; a run that is cut off here leaves nothing that counts."""
    started = time.perf_counter()
    failures: Counter[str] = Counter()
    local = storage.is_local(task.url) if task.url else False
    path = storage.local_path(task.url) if local else storage.temporary(task.url or out.shard(task.number))
    try:
        if source is not None:
            failures = _write(path, task, source)
        elif not local:
            storage.fetch(task.url, path)
        scan = scan_tar(path, task.url or out.shard(task.number)).checked()
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        name = task.url or f"{task.number:06d}.tar"
        if source is not None and scan.rows.num_rows:  # a shard that lost all its samples is left out
            storage.publish(path, out.shard(task.number))
        storage.write_bytes(out.part(task.number), part_bytes(scan.rows))
        seconds = round(time.perf_counter() - started, 3)
        stats = Stats(
            name, scan.rows.num_rows, size, sha256, scan.extensions, seconds, dict(sorted(failures.items())), out.build, out.options
        )
        storage.write_bytes(out.stats(task.number), json.dumps(stats._asdict(), indent=1).encode())
        return stats
    finally:
        if not local and os.path.exists(path):
            os.unlink(path)


def _write(path: str, task: Task, source: Source) -> Counter[str]:
    from webdataset.writer import TarWriter  # brings torch along: only where shards are written

    assert task.rows is not None
    failures: Counter[str] = Counter()
    # the fixed time, user and group make equal samples equal bytes
    with open(path, "wb") as file, TarWriter(file, user="dissect", group="dissect", mtime=0, encoder=False) as tar:
        for at, pair in enumerate(source.pairs(task.rows)):
            caption = pair.caption if task.given is None and not isinstance(pair, BadSample) else task.given and task.given[at]
            if isinstance(pair, BadSample):
                failures[pair.cause] += 1
            else:
                members = {pair.extension: pair.image, "txt": None if caption is None else caption.encode(), **pair.more}
                found = {name: data for name, data in members.items() if data is not None}
                tar.write({"__key__": f"{task.first + at:09d}", **found})
    return failures


def part_bytes(rows: pa.Table) -> bytes:
    """A shard's rows of the index as a Parquet file."""
    out = io.BytesIO()
    pq.write_table(rows, out, compression="zstd")
    return out.getvalue()


def rows_of(stats: Stats, number: int, out: Output) -> pa.Table:
    """A finished shard's rows of the index: its part, or where that is gone, the shard itself looked through again. Raises DataError."""
    try:
        return storage.read_parquet(out.part(number))
    except (FileNotFoundError, pa.ArrowException):
        pass
    url = stats.name if out.in_place else out.shard(number)
    path = storage.local_path(url) if storage.is_local(url) else storage.temporary(url)
    try:
        if not storage.is_local(url):
            storage.fetch(url, path)
        return scan_tar(path, url).checked().rows
    finally:
        if not storage.is_local(url) and os.path.exists(path):
            os.unlink(path)
