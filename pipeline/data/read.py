"""Random access to the members of a sample: one pread per sample from shards that are local files, checked against the index."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from pipeline.data import storage
from pipeline.data.cache import ShardCache
from pipeline.data.errors import BadSample, DataError
from pipeline.data.index import Index
from pipeline.data.index_format import REBUILD

# Members of one sample lie side by side with a header of 512 bytes and padding between them. A gap that is larger than this means that
# something else lies between; then each member is read by itself.
_GAP = 16 * 1024
# A shard that is opened will be read whole, in random order. Up to this size the kernel is asked to read it ahead in one go: from a cold
# disk that was three times faster than a small read per sample. Larger ones would push other shards out of the page cache.
_READ_AHEAD = 256 * 1024 * 1024


class Reader:
    """Reads samples of an index by global id. One per process and thread; workers get it by pickle or fork, without open files.

    `max_open` bounds the file descriptors: a read in a shard outside the bound costs one open.
    """

    def __init__(self, index: Index, cache: ShardCache, max_open: int = 128) -> None:
        self.index, self.cache, self.max_open = index, cache, max_open
        self._open: OrderedDict[int, int] = OrderedDict()
        self._ranged = [cache.ranged(url) for url in index.shards]

    def read(self, row: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Extension -> bytes of the asked members of sample `row`; None asks for those that it has.

        The checksum covers all members of the sample, also those that are not asked for. Raises BadSample ("checksum",
        "missing_member"), DataError where the index does not match its shard or the storage does not answer, IndexError.
        """
        shard = self.index.shard_of(row)
        view = self.index.view(shard)
        at = row - view.start
        spans = [(offset.item(at), length, extension) for extension, offset, size in view.members if (length := size.item(at)) >= 0]
        spans.sort()
        members: dict[str, bytes] = {}
        crc = 0
        if spans:
            first, last = spans[0][0], spans[-1][0] + spans[-1][1]
            together = last - first <= sum(span[1] for span in spans) + _GAP * len(spans)
            block = self._bytes(shard, first, last - first) if together else b""
            for offset, length, extension in spans:
                data = block[offset - first : offset - first + length] if together else self._bytes(shard, offset, length)
                crc = zlib.crc32(data, crc)
                members[extension] = data
        if crc != view.crc.item(at):
            raise BadSample("checksum", f"sample {row} in {self.index.shards[shard]}: crc {crc:08x}, the index has {view.crc.item(at):08x}")
        if extensions is None:
            return members
        try:
            return {extension: members[extension] for extension in extensions}
        except KeyError as missing:
            raise BadSample(
                "missing_member", f"sample {row} in {self.index.shards[shard]} has {sorted(members)}, asked for {missing}"
            ) from None

    def close(self) -> None:
        """Closes the files; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if self._ranged[shard]:
            return self.cache.read(self.index.shards[shard], offset, size)
        descriptor = self._open.get(shard)
        try:
            if descriptor is None:
                descriptor = self._descriptor(shard)
            else:
                self._open.move_to_end(shard)
            data = os.pread(descriptor, size, offset)
        except OSError:
            data = self._again(shard, offset, size)
        if len(data) < size:
            raise DataError(
                f"{self.index.shards[shard]}: ends at byte {offset + len(data)}, the index expects a member at {offset}+{size}. "
                f"The index does not match its shard: restore the shard from its source, or {REBUILD}"
            )
        return data

    def _descriptor(self, shard: int) -> int:
        index = self.index
        # The cache has evicted these while they were open: their disk space comes back when the last reader lets go.
        for gone in [other for other, descriptor in self._open.items() if _deleted(descriptor)]:
            os.close(self._open.pop(gone))
        size = int(index.shard_bytes[shard])
        descriptor = self._open[shard] = self.cache.open(index.shards[shard], size, index.shard_sha256[shard])
        if size <= _READ_AHEAD and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        if len(self._open) > self.max_open:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _again(self, shard: int, offset: int, size: int) -> bytes:
        """The slow path after an I/O error: a fresh descriptor each time, since a stale handle (NFS) never recovers."""

        def attempt() -> bytes:
            old = self._open.pop(shard, None)
            if old is not None:
                os.close(old)
            return os.pread(self._descriptor(shard), size, offset)

        return storage.with_retries(attempt, self.index.shards[shard], *self.cache.retries)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "cache": self.cache, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def _deleted(descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:
        return False  # a stale handle: the next read through it finds out and opens it again
