"""Shards that are damaged, hostile, or not those of their index: what the reader, the indexer and the checker say."""

import gzip
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.cache import ShardCache
from pipeline.data.errors import BadSample, DataError
from pipeline.data.index import Index
from pipeline.data.read import Reader
from tools.check_shards import check
from tools.check_shards import main as check_main
from tools.make_shards import build, parser
from tools.sources.base import png


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def black(side: int = 4) -> bytes:
    return png(Image.new("L", (side, side)))


def tar_of(path: Path, members: list[tuple[str, bytes]], change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def index_tars(shards: Path, out: Path) -> Index:
    build(parser().parse_args(["tars", str(out), "--shards", str(shards), "--workers", "1"]))
    return Index.open(out)


GOOD = [("a.png", black()), ("a.txt", b"one"), ("b.png", black(5)), ("b.txt", b"two")]


@pytest.fixture
def copy(icons_small: Path, tmp_path: Path) -> Path:
    """A data set that may be damaged."""
    return shutil.copytree(icons_small, tmp_path / "set")


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


# what a run sees


def test_flipped_bit_costs_one_sample(copy: Path) -> None:
    index = Index.open(copy)
    whole = [Reader(index, ShardCache(None)).read(row, ("png", "txt")) for row in range(200)]
    offset, size = index.members(60)["txt"]
    change_byte(copy / "000001.tar", offset + size - 1)
    reader = Reader(index, ShardCache(None))
    with pytest.raises(BadSample, match="checksum") as caught:
        reader.read(60, ["png"])  # the caption is covered although only the image is asked for
    assert caught.value.cause == "checksum" and "sample 60 in" in str(caught.value)
    for row in set(range(200)) - {60}:
        assert reader.read(row, ("png", "txt")) == whole[row]


def test_truncated_missing_and_exchanged_shards(copy: Path) -> None:
    index = Index.open(copy)
    with open(copy / "000001.tar", "r+b") as file:
        file.truncate(index.members(70)["png"][0] + 5)
    (copy / "000002.tar").unlink()
    reader = Reader(index, ShardCache(None, backoff_s=0.01))
    assert reader.read(69, ["txt"])
    with pytest.raises(DataError, match=r"000001\.tar: ends at byte \d+.*does not match its shard.*restore"):
        reader.read(70, ["png"])
    with pytest.raises(DataError, match=r"000002\.tar: no such shard"):
        reader.read(100, ["png"])
    shutil.copy(copy / "000000.tar", copy / "000003.tar")
    with pytest.raises(BadSample, match="checksum"):
        [reader.read(row, ["png"]) for row in range(150, 200)]
    with pytest.raises(DataError, match=r"000001\.tar: has(.|\n)*000002\.tar: missing"):
        index.check_shards()


def test_io_error_is_retried_then_ends_the_run(copy: Path) -> None:
    reader = Reader(Index.open(copy), ShardCache(None, attempts=2, backoff_s=0.01))
    good = reader.read(0, ["png"])
    os.close(reader._open[0])  # the descriptor has gone stale, as on a network disk
    assert reader.read(0, ["png"]) == good
    (copy / "000000.tar").unlink()
    (copy / "000000.tar").mkdir()  # every read of a folder is an I/O error
    reader.close()
    with pytest.raises(DataError, match=r"000000\.tar"):
        reader.read(0, ["png"])


def test_missing_member_costs_one_sample(tmp_path: Path) -> None:
    tar_of(tmp_path / "s/0.tar", [*GOOD, ("c.txt", b"no image"), ("d.png", black())])
    reader = Reader(index_tars(tmp_path / "s/0.tar", tmp_path / "i"), ShardCache(None))
    assert reader.read(0, ("png", "txt")) == {"png": black(), "txt": b"one"}
    for row, asked in ((2, "png"), (3, "txt")):
        with pytest.raises(BadSample) as caught:
            reader.read(row, (asked,))
        assert caught.value.cause == "missing_member"
    assert reader.read(2, ["txt"]) == {"txt": b"no image"}


# what can be indexed


def test_foreign_tars_with_long_names_and_folders_are_read(tmp_path: Path) -> None:
    deep = "/".join(["a folder with a long name"] * 12)
    members = [
        ("part/", b""),
        (f"{deep}/x.Seg.PNG", black()),
        (f"{deep}/x.txt", b"deep"),
        ("./y.txt", b""),
        (".hidden", b"left out"),
        ("z", b""),
    ]

    def folder(info: tarfile.TarInfo) -> None:
        if info.name.endswith("/"):
            info.type = tarfile.DIRTYPE

    index = index_tars(tar_of(tmp_path / "s/0.tar", members, folder), tmp_path / "i")
    assert index.keys(range(index.num_samples)) == [f"{deep}/x", "./y"]
    reader = Reader(index, ShardCache(None))
    assert reader.read(0, ("seg.png", "txt")) == {"seg.png": black(), "txt": b"deep"} and reader.read(1, ["txt"]) == {"txt": b""}


def _symlink(info: tarfile.TarInfo) -> None:
    if info.name == "b.png":
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


HOSTILE = {
    "parent": ([("../../x.png", b"1"), *GOOD], None, r"unsafe member name '\.\./\.\./x\.png' at byte 512"),
    "inside": ([("a/../../x.png", b"1")], None, "unsafe member name"),
    "absolute": ([*GOOD, ("/etc/x.png", b"1")], None, r"unsafe member name '/etc/x\.png'"),
    "link": (GOOD, _symlink, r"member 'b\.png' at byte \d+ is a link"),
    "same key later": ([*GOOD, ("a.png", b"1")], None, "key 'a' comes back at byte 4608 after sample 0"),
    "same member": ([("a.png", b"1"), ("a.png", b"2")], None, r"member 'a\.png' is there twice, again at byte 1536"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused(name: str, tmp_path: Path) -> None:
    members, change, message = HOSTILE[name]
    shard = tar_of(tmp_path / "s/0.tar", members, *([change] if change else []))
    with pytest.raises(DataError, match=rf"s/0\.tar: {message}"):
        index_tars(shard, tmp_path / "i")
    assert not (tmp_path / "i/index.parquet").exists()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0.tar"], "something was unpacked"


def test_broken_tars_are_refused_with_the_place(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "s/0.tar", GOOD).read_bytes()

    def refused(data: bytes, message: str) -> None:
        (tmp_path / "s/0.tar").write_bytes(data)
        with pytest.raises(DataError, match=message):
            index_tars(tmp_path / "s/0.tar", tmp_path / "i")

    refused(whole[: 512 * 3 + 1], r"0\.tar: .*(cut off|end of data|truncated).*")
    refused(whole[: 512 * 4], r"0\.tar: ends at byte 2048 without the end mark, probably cut off")
    refused(whole[:2100], r"0\.tar: cut off at byte 2100 inside a header")
    refused(whole[:2148] + b"\xff" + whole[2149:], r"0\.tar: damaged header at byte 2048")
    refused(gzip.compress(whole), r"0\.tar: no readable tar.*Unpack the compression")
    refused(b"", r"0\.tar: no readable tar")
    refused(b"hello" * 1000, r"0\.tar: no readable tar")
    (tmp_path / "s/0.tar").unlink()
    with pytest.raises(DataError, match=r"0\.tar: no such shard"):
        index_tars(tmp_path / "s/0.tar", tmp_path / "i")


# what check_shards says


def said(url: Path, decode: bool = False) -> str:
    return "\n".join(map(str, check(str(url), decode)[1]))


def test_check_finds_what_is_damaged(copy: Path, capsys: pytest.CaptureFixture) -> None:
    index = Index.open(copy)
    assert check_main([str(copy), "--decode"]) == 0
    assert "200 samples in 4 shards, no problems" in capsys.readouterr().out
    change_byte(copy / "000000.tar", index.members(3)["png"][0] + 30)
    with open(copy / "000001.tar", "r+b") as file:
        file.truncate(30_000)
    change_byte(copy / "000002.tar", index.members(110)["png"][0] - 400)
    (copy / "000003.tar").unlink()
    assert check_main([str(copy), "--decode"]) == 1
    out = capsys.readouterr().out
    for expected in (
        "000000.tar: sha256",
        "000000.tar: sample 3, key '000000003': crc",
        "000000.tar: 000000003.png at byte",
        f"000001.tar: has 30000 bytes; expected {index.shard_bytes[1]}",
        "000001.tar: cut off at byte 30000 inside a header",
        "000002.tar: damaged header at byte",
        "000002.tar: holds 10 samples; expected 50 by the index",
        f"000003.tar: missing; expected {index.shard_bytes[3]} bytes",
    ):
        assert expected in out, out


def test_check_finds_bad_contents(tmp_path: Path) -> None:
    members = [
        *GOOD,
        ("c.png", b"no image"),
        ("c.txt", b"\xff\xfe"),
        ("d.png", black()),
        ("d.txt", b" "),
        ("e.png", black(13_500)),
        ("e.txt", b"x" * 2**21),
    ]
    index_tars(tar_of(tmp_path / "s/0.tar", [*members, ("f.png", black())]), tmp_path / "i")
    told = said(tmp_path / "i", decode=True)
    for expected in (
        "c.png at byte 4608 does not decode",
        "c.txt at byte 5632 is not UTF-8",
        "d.txt at byte 7680 is empty",
        "e.png at byte 8704 is too large",
    ):
        assert expected in told, told
    assert "e.txt at byte" in told and "2097152 bytes" in told
    assert "1 samples have no member 'txt', the first is 'f'" in told
    assert told.count("\n") == 5 and "c.png" not in said(tmp_path / "i")


def test_pickles_are_reported_and_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "loaded"
    index = index_tars(tar_of(tmp_path / "s/0.tar", [*GOOD, ("b.pkl", pickle.dumps(Bomb(str(trace))))]), tmp_path / "i")
    assert "pickle 'b.pkl' at byte 4608; expected data, not code" in said(tmp_path / "i", decode=True)
    assert isinstance(Reader(index, ShardCache(None)).read(1, ["pkl"])["pkl"], bytes)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(str(trace))))
    assert trace.exists(), "the trap does not work, so the test shows nothing"


def test_duplicate_keys_across_shards(tmp_path: Path) -> None:
    tar_of(tmp_path / "s/0.tar", GOOD)
    tar_of(tmp_path / "s/1.tar", [("c.txt", b"3"), ("b.txt", b"4")])
    index_tars(tmp_path / "s/*.tar", tmp_path / "i")
    assert "key" not in said(tmp_path / "i")  # shards of others only promise it within a shard
    import json

    import pyarrow.parquet as pq

    from pipeline.data.index_format import META, ShardInfo, write_index

    table = pq.read_table(tmp_path / "i/index.parquet")
    shards = json.loads(table.schema.metadata[META])["shards"]
    infos = [ShardInfo(f"{n}.tar", s["bytes"], s["sha256"], s["samples"], ("png", "txt")) for n, s in enumerate(shards)]
    rows = table.drop_columns(["sample", "shard"])
    write_index(str(tmp_path / "s/index.parquet"), infos, [rows.slice(0, 2), rows.slice(2, 2)], "x")
    told = said(tmp_path / "s")
    assert "0.tar and" in told and "key 'b' is that of samples 1 and 3" in told and told.count("key 'b'") == 1
