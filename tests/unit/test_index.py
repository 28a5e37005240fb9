"""The index against the tars it describes, and every way in which it can be unusable."""

import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.cache import ShardCache
from pipeline.data.errors import BadSample, DataError
from pipeline.data.index import Index
from pipeline.data.index_format import META, ShardInfo, write_index
from pipeline.data.read import Reader
from tools.make_shards import main


def truth_of(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample, by Python's own tar reader."""
    samples: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                key, extension = member.name.split(".", 1)
                samples.setdefault(key, {})[extension] = file.extractfile(member).read()
    return list(samples.items())


def copied(folder: Path, to: Path, change) -> Path:
    """A data set's index with its table or metadata changed; the shards stay where they were."""
    table = pq.read_table(folder / "index.parquet")
    meta = json.loads(table.schema.metadata[META])
    table, meta = change(table, meta)
    to.mkdir()
    schema = table.schema.with_metadata({META: json.dumps(meta).encode()})
    with pq.ParquetWriter(to / "index.parquet", schema) as writer:
        start = 0
        for shard in meta["shards"]:
            writer.write_table(table.slice(start, shard["samples"]).cast(schema), row_group_size=max(1, shard["samples"]))
            start += shard["samples"]
    return to


def test_index_and_reader_give_what_the_tars_hold(icons_small: Path) -> None:
    index, samples = Index.open(icons_small), truth_of(icons_small)
    assert (index.num_samples, index.extensions) == (200, ("png", "txt"))
    assert index.shard_start.tolist() == [0, 50, 100, 150, 200] and index.shard_start.dtype == np.int64
    assert index.shard_bytes.tolist() == [Path(shard).stat().st_size for shard in index.shards]
    assert index.keys(range(200)) == [key for key, _ in samples]
    assert index.keys([199, 0, 50]) == [samples[i][0] for i in (199, 0, 50)]
    assert [index.shard_of(row) for row in (0, 49, 50, 199)] == [0, 0, 1, 3]
    reader = Reader(index, ShardCache(None), max_open=2)  # fewer descriptors than shards
    for row in np.random.default_rng(0).permutation(200).tolist():
        assert reader.read(row, ("png", "txt")) == samples[row][1]
    assert reader.read(3, ["txt"]) == {"txt": samples[3][1]["txt"]}
    with pytest.raises(BadSample, match="missing_member"):
        reader.read(3, ["jpg"])
    with pytest.raises(IndexError, match=r"0\.\.199"):
        index.shard_of(200)
    index.check_shards()


def test_views_are_zero_copy(icons_small: Path) -> None:
    view = Index.open(icons_small).view(1)
    _, offset, size = view.members[0]
    assert view.start == 50 and len(view.crc) == 50 and view.crc.dtype == np.uint32 and offset.dtype == size.dtype == np.int64
    assert not any(array.flags.owndata or array.flags.writeable for array in (view.crc, offset, size))


def _read_in_worker(reader: Reader) -> tuple[list[str], bytes]:
    return reader.index.keys([7, 150]), reader.read(150, ["png"])["png"]


def test_pickles_small_and_works_in_a_spawned_process(icons_small: Path) -> None:
    reader = Reader(Index.open(icons_small), ShardCache(None))
    reader.read(0, ["png"])  # an open descriptor must not travel
    assert len(pickle.dumps(reader)) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_in_worker, (reader,)) == _read_in_worker(reader)


def test_mapped_copy_is_used_again_and_rebuilt_when_damaged(icons_small: Path, tmp_path: Path) -> None:
    first = Index.open(icons_small, tmp_path)
    (mapped,) = tmp_path.iterdir()
    before = mapped.stat().st_mtime_ns
    assert Index.open(icons_small / "index.parquet", tmp_path).digest == first.digest
    assert mapped.stat().st_mtime_ns == before
    half = mapped.read_bytes()[:100]
    mapped.unlink()  # first is still mapped from it: cutting it in place would be a bus error
    mapped.write_bytes(half)
    assert Index.open(icons_small, tmp_path).keys([5]) == first.keys([5])


def test_remote_index(icons_small: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/far/index.parquet", (icons_small / "index.parquet").read_bytes())
    index = Index.open("memory://far", tmp_path)
    assert index.shards[1] == "memory://far/000001.tar" and index.keys([0]) == ["000000000"]
    with pytest.raises(DataError, match=r"memory://far/000000\.tar: missing"):
        index.check_shards()
    with pytest.raises(DataError, match="no such file"):
        Index.open("memory://nowhere", tmp_path)


def test_shards_with_different_members(tmp_path: Path) -> None:
    def rows(key: str, **members: int) -> pa.Table:
        columns = {"key": pa.array([key]), "crc": pa.array([0], pa.uint32())}
        for extension, size in members.items():
            columns |= {f"{extension}.offset": pa.array([512]), f"{extension}.size": pa.array([size])}
        return pa.table(columns)

    shards = [ShardInfo("a.tar", 4096, "", 1, ("png",)), ShardInfo("b.tar", 4096, "", 1, ("jpg", "txt"))]
    write_index(str(tmp_path / "index.parquet"), shards, [rows("a", png=3), rows("b", jpg=5, txt=0)], "x")
    index = Index.open(tmp_path)
    assert index.extensions == ("jpg", "png", "txt")
    assert index.members(0) == {"png": (512, 3)} and index.members(1) == {"jpg": (512, 5), "txt": (512, 0)}


def _set(table: pa.Table, column: str, row: int, value) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    at = table.column_names.index(column)
    return table.set_column(at, column, pa.array(values, type=table.schema.field(at).type))


def _rename(meta: dict, name: str) -> dict:
    meta["shards"][0]["name"] = name
    return meta


DAMAGE = {
    "newer": (lambda t, m: (t, m | {"format": 99}), "format 99.*Update the package"),
    "order": (lambda t, m: (_set(t, "sample", 3, 5), m), "ids should run from 0 to 49"),
    "twice": (lambda t, m: (_set(t, "sample", 60, 59), m), "ids should run from 50 to 99"),
    "outside": (lambda t, m: (_set(t, "png.offset", 7, 10**9), m), "'png' of sample 7 .* lies outside"),
    "negative": (lambda t, m: (_set(t, "png.size", 7, -2), m), "lies outside"),
    "column": (lambda t, m: (t.drop_columns(["png.offset"]), m), "'png.offset' should be int64, found None"),
    "absolute": (lambda t, m: (t, _rename(m, "/etc/passwd")), "unsafe shard name '/etc/passwd'"),
    "parent": (lambda t, m: (t, _rename(m, "../../x.tar")), "unsafe shard name"),
    "another": (lambda t, m: (t, _rename(m, "z.tar")), r"names \['000000.tar'\]"),
    "empty cell": (lambda t, m: (_set(t, "key", 0, None), m), "empty cells"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_unusable_index(name: str, icons_small: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    with pytest.raises(DataError, match=message):
        Index.open(copied(icons_small, tmp_path / "x", change), tmp_path)


def test_damaged_file(icons_small: Path, tmp_path: Path) -> None:
    whole = (icons_small / "index.parquet").read_bytes()
    for name, data in {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:600] + bytes([whole[600] ^ 1]) + whole[601:],
        "empty": b"",
        "other": b"hello" * 100,
    }.items():
        (tmp_path / "index.parquet").write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            Index.open(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["index.parquet"], f"{name} left something behind"
    whole_index = Index.open(icons_small)
    members = [whole_index.members(row) for row in range(200)]
    for at in range(4, len(whole), 61):  # never other offsets, never another kind of error
        (tmp_path / "index.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            index = Index.open(tmp_path)
        except DataError:
            continue
        assert [index.members(row) for row in range(200)] == members, f"byte {at}"
        next(tmp_path.glob(".index*")).unlink()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "index.parquet")
    with pytest.raises(DataError, match="no index of shards"):
        Index.open(tmp_path)
    with pytest.raises(DataError, match="no such index"):
        Index.open(tmp_path / "nowhere")


def test_check_shards_names_shard_and_both_sizes(tmp_path: Path) -> None:
    assert main(["icons", str(tmp_path / "d"), "--limit", "6", "--size", "8", "--shard-size", "2", "--workers", "1"]) == 0
    index = Index.open(tmp_path / "d")
    size = (tmp_path / "d/000001.tar").stat().st_size
    with open(tmp_path / "d/000001.tar", "ab") as file:
        file.write(b"x")
    (tmp_path / "d/000002.tar").unlink()
    with pytest.raises(DataError) as caught:
        index.check_shards()
    assert f"000001.tar: has {size + 1} bytes, the index expects {size}" in str(caught.value)
    assert f"000002.tar: missing, the index expects {index.shard_bytes[2]} bytes" in str(caught.value)
    assert "000000.tar" not in str(caught.value) and "tools.make_shards" in str(caught.value)
