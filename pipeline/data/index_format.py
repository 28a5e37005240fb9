"""The file format of index.parquet: how it is written, checked, and turned into the Arrow file that is mapped."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.data.errors import DataError

FORMAT = 1
FILE = "index.parquet"
META = b"dissect_pipeline.index"
REBUILD = "build it again with python -m tools.make_shards"


class ShardInfo(NamedTuple):
    """One shard as the index records it."""

    name: str  # file name in the index's folder, or a full URL
    bytes: int
    sha256: str
    samples: int
    extensions: tuple[str, ...]


def write_index(url: str, shards: Sequence[ShardInfo], tables: Iterable[pa.Table], build: str) -> None:
    """Writes index.parquet at `url` (the file), all or nothing, one row group per shard.

    `tables` yields one table per shard in order: `key` string, `crc` uint32, `<ext>.offset` and `<ext>.size` int64 for the shard's own
    extensions. `build` is the digest of the options. Equal input gives equal bytes. Memory: one shard.
    """
    extensions = sorted({extension for shard in shards for extension in shard.extensions})
    meta = {
        "format": FORMAT,
        "build": build,
        "shards": [{"name": s.name, "bytes": s.bytes, "sha256": s.sha256, "samples": s.samples} for s in shards],
    }
    fields = [("sample", pa.int64()), ("key", pa.string()), ("shard", pa.dictionary(pa.int32(), pa.string())), ("crc", pa.uint32())]
    fields += [(f"{extension}.{part}", pa.int64()) for extension in extensions for part in ("offset", "size")]
    schema = pa.schema(fields, metadata={META: json.dumps(meta, sort_keys=True).encode()})
    temp, start = storage.temporary(url), 0
    try:
        with pq.ParquetWriter(temp, schema, compression="zstd", write_page_checksum=True) as writer:
            for shard, table in zip(shards, tables, strict=True):
                assert table.num_rows == shard.samples > 0
                missing = pa.array(np.full(shard.samples, -1, dtype=np.int64))
                columns = {
                    "sample": pa.array(np.arange(start, start + shard.samples, dtype=np.int64)),
                    "shard": pa.DictionaryArray.from_arrays(pa.array(np.zeros(shard.samples, dtype=np.int32)), pa.array([shard.name])),
                }
                own = set(table.column_names)
                rows = [columns.get(name, table[name] if name in own else missing) for name in schema.names]
                writer.write_table(pa.table(rows, schema=schema), row_group_size=shard.samples)
                start += shard.samples
        storage.publish(temp, url)
    finally:
        if os.path.exists(temp):
            os.unlink(temp)


def read_build(url: str) -> tuple[str, list[tuple[str, int]]] | None:
    """Digest of the options and (name, bytes) of every shard of an index file, None where there is none. Reads the footer only."""

    def read() -> dict[str, Any]:
        with storage.opened(url) as file:
            try:
                return _checked_meta(pq.ParquetFile(file), url)
            except pa.ArrowException as error:
                raise DataError(f"{url}: damaged or no Parquet file: {error}. Remove it, then {REBUILD}") from None

    try:
        meta = storage.with_retries(read, url)
    except FileNotFoundError:
        return None
    return meta["build"], [(shard["name"], shard["bytes"]) for shard in meta["shards"]]


def safe_name(name: str) -> bool:
    """True for a name that stays inside its folder: relative, no `..`, no backslash, no control characters."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and not re.search(r"[\\\x00-\x1f]", name)


def build_mapped(parquet: str, source: str, mapped: str) -> None:
    """Checks index.parquet and writes it as an Arrow file, one record batch per shard. Memory: one shard. Raises DataError, OSError."""
    temp = storage.temporary(mapped)
    try:
        file = pq.ParquetFile(parquet, page_checksum_verification=True)
        meta = _checked_meta(file, source)
        names = [name for name in file.schema_arrow.names if name not in ("sample", "shard")]
        schema = pa.schema([file.schema_arrow.field(name) for name in names], metadata={META: json.dumps(meta).encode()})
        with pa.OSFile(temp, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            start = 0
            for number, shard in enumerate(meta["shards"]):
                table = file.read_row_group(number).combine_chunks()
                _check_rows(table, shard, start, source)
                writer.write_table(pa.Table.from_arrays([table[name] for name in names], schema=schema), max_chunksize=table.num_rows)
                start += table.num_rows
        os.replace(temp, mapped)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{source}: damaged or no Parquet file: {error}. Fetch it again from its source, or {REBUILD}") from None
    except OSError as error:
        # Arrow reports a damaged page as a bare OSError; the system's own errors carry a number
        if error.errno is not None:
            raise
        raise DataError(f"{source}: damaged: {error}. Fetch it again from its source, or {REBUILD}") from None
    finally:
        if os.path.exists(temp):
            os.unlink(temp)


def _checked_meta(file: pq.ParquetFile, source: str) -> dict[str, Any]:
    raw = (file.schema_arrow.metadata or {}).get(META)
    if raw is None:
        raise DataError(
            f"{source}: a Parquet file, but no index of shards (no {META.decode()!r} metadata). Index shards with tools.make_shards tars"
        )
    try:
        meta = json.loads(raw)
        if int(meta["format"]) > FORMAT:
            raise DataError(f"{source}: index format {meta['format']}, this version reads up to {FORMAT}. Update the package, or {REBUILD}")
        shards = [
            {"name": str(s["name"]), "bytes": int(s["bytes"]), "sha256": s["sha256"], "samples": int(s["samples"])} for s in meta["shards"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: damaged metadata: {error!r}. Fetch it again from its source, or {REBUILD}") from None
    needed = {"sample": pa.int64(), "key": pa.string(), "shard": pa.dictionary(pa.int32(), pa.string()), "crc": pa.uint32()}
    for name in file.schema_arrow.names:
        needed.setdefault(name, pa.int64())
        if name.endswith(".size"):
            needed.setdefault(name.removesuffix(".size") + ".offset", pa.int64())
    for name, kind in needed.items():
        found = file.schema_arrow.field(name).type if name in file.schema_arrow.names else None
        if found != kind:
            raise DataError(f"{source}: column {name!r} should be {kind}, found {found}. The index is damaged; {REBUILD}")
    if file.num_row_groups != len(shards) or not shards:
        raise DataError(f"{source}: {file.num_row_groups} row groups for {len(shards)} shards; expected one each. {REBUILD.capitalize()}")
    for shard in shards:
        if "://" not in shard["name"] and not safe_name(shard["name"]):
            raise DataError(
                f"{source}: unsafe shard name {shard['name']!r}: expected one inside the index's folder, or a URL. {REBUILD.capitalize()}"
            )
    return {"format": FORMAT, "build": str(meta.get("build", "")), "shards": shards}


def _check_rows(table: pa.Table, shard: dict[str, Any], start: int, source: str) -> None:
    where, count = f"{source}: shard {shard['name']}", table.num_rows
    if count != shard["samples"] or count == 0:
        raise DataError(f"{where}: {count} rows, {shard['samples']} recorded. The index is damaged; {REBUILD}")
    if any(column.null_count for column in table.columns):
        raise DataError(f"{where}: empty cells. The index is damaged; {REBUILD}")
    if not np.array_equal(table["sample"].to_numpy(), np.arange(start, start + count)):
        raise DataError(f"{where}: sample ids should run from {start} to {start + count - 1} in order. The index is damaged; {REBUILD}")
    cells = table["shard"].chunk(0)  # the only one, of rows that were combined
    # not Arrow's unique(), nor its cast(): the first use of either imports pyarrow.compute, most of the time of a first opening
    names = [cells.dictionary[place].as_py() for place in sorted(set(cells.indices.to_numpy().tolist()))]
    if names != [shard["name"]]:
        raise DataError(f"{where}: its row group names {names[:3]}; expected this shard alone. The index is damaged; {REBUILD}")
    for name in table.column_names:
        if not name.endswith(".size"):
            continue
        size, offset = table[name].to_numpy(), table[name.removesuffix(".size") + ".offset"].to_numpy()
        bad = (size < -1) | ((size >= 0) & ((offset < 0) | (offset > shard["bytes"] - size)))
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"{where}: member {name.removesuffix('.size')!r} of sample {start + row} at {offset[row]}+{size[row]} lies outside "
                f"the shard's {shard['bytes']} bytes. The index is damaged; {REBUILD}"
            )
