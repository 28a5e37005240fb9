"""index.parquet: which shard, offset and size every member of every sample has. Parquet travels; an Arrow file built from it once is
mapped, so that the workers of a node share its pages and a billion samples cost address space instead of memory."""

import bisect
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data import storage
from pipeline.data.errors import DataError
from pipeline.data.index_format import FILE, META, REBUILD, build_mapped

_VIEWS = 1024  # shards whose numpy views are kept; a view is about 1 kB of Python objects


class ShardView(NamedTuple):
    """The rows of one shard, zero-copy views of the mapping; n = samples of the shard."""

    start: int  # global id of the first row
    crc: np.ndarray  # uint32 [n]
    members: tuple[tuple[str, np.ndarray, np.ndarray], ...]  # (extension, offset int64 [n], size int64 [n]); size -1: missing


class Index:
    """The samples of one data set. Opened with `Index.open`; pickles as a path, so a worker maps the same pages again.

    url: the index's folder. digest: sha256 of index.parquet. build: digest of the options it was built with. shards: full paths or URLs.
    shard_sha256: as recorded. shard_start: int64 [S+1], first global id of each shard. shard_bytes: int64 [S]. extensions: member names.
    """

    def __init__(self, folder: str, digest: str, mapped: str) -> None:
        self.url, self.digest, self._path = folder, digest, mapped
        self._file = pa.ipc.open_file(pa.memory_map(mapped))
        meta = json.loads(self._file.schema.metadata[META])
        shards = meta["shards"]
        self.build: str = meta["build"]
        self.shard_names = [shard["name"] for shard in shards]
        self.shards = [_resolve(folder, name) for name in self.shard_names]
        self.shard_sha256 = [shard["sha256"] for shard in shards]
        self.shard_bytes = np.array([shard["bytes"] for shard in shards], dtype=np.int64)
        self.shard_start = np.concatenate([[0], np.cumsum([shard["samples"] for shard in shards])]).astype(np.int64)
        self.num_samples = int(self.shard_start[-1])
        self.extensions = tuple(name.removesuffix(".size") for name in self._file.schema.names if name.endswith(".size"))
        self._starts: list[int] = self.shard_start.tolist()  # bisect on a list is ten times faster than searchsorted for one row
        self._views: OrderedDict[int, ShardView] = OrderedDict()

    @classmethod
    def open(cls, url: str, cache_dir: str | None = None) -> "Index":
        """Opens the index of a folder (or an index file) at any fsspec URL. The mapped file is built on first use: in `cache_dir`, else
        beside a local index, else in the user's cache folder. Costs one read and hash of index.parquet. Raises DataError."""
        url = str(url).rstrip("/")
        url = storage.local_path(url) if storage.is_local(url) else url
        source = url if url.endswith(".parquet") else storage.join(url, FILE)
        folder = source.rsplit("/", 1)[0] if "/" in source else "."
        if storage.is_local(source):
            if not os.path.isfile(source):
                raise DataError(f"{source}: no such index. Expected a folder with {FILE}; {REBUILD}")
            return cls._of_parquet(source, source, folder, cache_dir)
        fetched = storage.temporary(source)
        try:
            storage.fetch(source, fetched)
            return cls._of_parquet(fetched, source, folder, cache_dir)
        finally:
            if os.path.exists(fetched):
                os.unlink(fetched)

    @classmethod
    def _of_parquet(cls, parquet: str, source: str, folder: str, cache_dir: str | None) -> "Index":
        with open(parquet, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        places = [cache_dir] if cache_dir else [os.path.dirname(os.path.abspath(parquet))] if parquet == source else []
        if not cache_dir:
            places.append(os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dissect-pipeline"))
        for place in places:
            mapped = os.path.join(place, f".index-{digest[:32]}.arrow")
            try:
                return cls(folder, digest, mapped)
            except (OSError, pa.ArrowException, KeyError, ValueError):
                pass  # not there yet, or damaged: it is only a copy
        trouble: OSError | None = None
        for place in places:
            try:
                os.makedirs(place, exist_ok=True)
                mapped = os.path.join(place, f".index-{digest[:32]}.arrow")
                build_mapped(parquet, source, mapped)
                return cls(folder, digest, mapped)
            except OSError as error:
                trouble = error
        raise DataError(f"{source}: cannot write its memory-mapped copy in {' or '.join(places)}: {trouble}. Name a writable cache folder")

    def __reduce__(self) -> tuple:
        return (Index, (self.url, self.digest, self._path))

    def __len__(self) -> int:
        return self.num_samples

    def shard_of(self, row: int) -> int:
        """The shard that holds global id `row`. Raises IndexError."""
        if not 0 <= row < self.num_samples:
            raise IndexError(f"{self.url}: no sample {row}; the ids are 0..{self.num_samples - 1}")
        return bisect.bisect_right(self._starts, row) - 1

    def view(self, shard: int) -> ShardView:
        """The rows of one shard as zero-copy arrays."""
        view = self._views.get(shard)
        if view is None:
            batch = self._file.get_batch(shard)
            columns = {name: batch.column(name).to_numpy(zero_copy_only=True) for name in batch.schema.names if name != "key"}
            members = tuple((extension, columns[f"{extension}.offset"], columns[f"{extension}.size"]) for extension in self.extensions)
            view = self._views[shard] = ShardView(self._starts[shard], columns["crc"], members)
            if len(self._views) > _VIEWS:
                self._views.popitem(last=False)
        return view

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) in bytes of the members that the sample has."""
        view = self.view(self.shard_of(row))
        at = row - view.start
        return {extension: (offset.item(at), size.item(at)) for extension, offset, size in view.members if size.item(at) >= 0}

    def keys(self, rows: Iterable[int]) -> list[str]:
        """The keys of some samples, in the order asked."""
        found: list[str] = []
        shard, column = -1, None
        for row in map(int, rows):
            if self.shard_of(row) != shard or column is None:
                shard = self.shard_of(row)
                column = self._file.get_batch(shard).column("key")
            found.append(column[row - self._starts[shard]].as_py())
        return found

    def check_shards(self) -> None:
        """Compares the shards that exist with those recorded, by one listing per folder. Raises DataError that names up to five."""
        listings: dict[str, dict[str, int]] = {}
        wrong: list[str] = []
        for shard, expected in zip(self.shards, self.shard_bytes.tolist()):
            folder, _, name = shard.rpartition("/")
            if folder not in listings:
                try:
                    listings[folder] = storage.sizes_in(folder)
                except DataError:
                    listings[folder] = {}  # some servers do not list; asking for the file gives the error that counts
            found = listings[folder].get(name)
            found = storage.size_of(shard) if found is None else found
            if found is None:
                wrong.append(f"{shard}: missing, the index expects {expected} bytes")
            elif found != expected:
                wrong.append(f"{shard}: has {found} bytes, the index expects {expected}")
            if len(wrong) == 5:
                break
        if wrong:
            raise DataError(
                "\n".join([*wrong, f"{self.url}: the index does not match its shards. Restore them from their source, or {REBUILD}"])
            )


def _resolve(folder: str, name: str) -> str:
    return storage.local_path(name) if name.startswith(("file://", "local://")) else storage.join(folder, name)
