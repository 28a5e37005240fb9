"""Shards on S3 (a real server on loopback, the real client): written, read, cut in mid-shard, and an endpoint that is dead."""

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.__main__ import main as train
from pipeline.data.cache import ShardCache
from pipeline.data.errors import DataError
from pipeline.data.index import Index
from pipeline.data.read import Reader
from tools.check_shards import check
from tools.make_shards import main

OPTIONS = ["--limit", "200", "--size", "32", "--noise", "0.4", "--shard-size", "50", "--workers", "1"]  # those of icons_small


class Proxy:
    """A TCP proxy in front of `port` that cuts a connection once `cut_after` bytes of answer have passed, `cuts` times in all."""

    def __init__(self, port: int, cut_after: int) -> None:
        self.target, self.cut_after, self.cuts, self.cut = port, cut_after, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, answer: bool) -> None:
        passed = 0
        try:
            while data := source.recv(4096):
                passed += len(data)
                if answer and self.cut < self.cuts and passed > self.cut_after:
                    self.cut += 1
                    break
                to.sendall(data)
        except OSError:
            pass
        for end in (source, to):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@pytest.fixture
def proxied(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    """An S3 data set that is read through a proxy."""
    from s3fs import S3FileSystem

    assert main(["icons", f"{moto_s3}/set", *OPTIONS]) == 0
    proxy = Proxy(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]), cut_after=40_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    S3FileSystem.clear_instance_cache()
    yield f"{moto_s3}/set", proxy
    S3FileSystem.clear_instance_cache()
    proxy.listener.close()


def test_written_to_s3_as_to_disk_and_not_written_again(
    icons_small: Path, moto_s3: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import boto3

    assert main(["icons", f"{moto_s3}/set", *OPTIONS]) == 0
    objects = {o["Key"].removeprefix("set/"): o for o in boto3.client("s3").list_objects_v2(Bucket="shards")["Contents"]}
    for file in icons_small.iterdir():
        if file.suffix in (".tar", ".parquet", ".txt"):
            stored = boto3.client("s3").get_object(Bucket="shards", Key=f"set/{file.name}")["Body"].read()
            assert stored == file.read_bytes(), file.name
    assert not [key for key in objects if "parts" in key or "tmp" in key]
    capsys.readouterr()
    assert main(["icons", f"{moto_s3}/set", *OPTIONS]) == 0
    assert "nothing to do" in capsys.readouterr().out
    boto3.client("s3").delete_object(Bucket="shards", Key="set/000002.tar")
    index = Index.open(f"{moto_s3}/set", tmp_path)
    with pytest.raises(DataError, match=r"s3://shards/set/000002\.tar: missing"):
        index.check_shards()
    assert main(["icons", f"{moto_s3}/set", *OPTIONS]) == 0
    assert "(1 made now)" in capsys.readouterr().out
    Index.open(f"{moto_s3}/set", tmp_path).check_shards()
    assert check(f"{moto_s3}/set", decode=True, cache_dir=tmp_path)[1] == []


def _read_rows(reader: Reader, rows: range) -> list[dict[str, bytes]]:
    return [reader.read(row, ("png", "txt")) for row in rows]


@pytest.mark.parametrize("cached", [True, False], ids=["whole shards", "ranged"])
def test_read_from_s3(icons_small: Path, moto_s3: str, tmp_path: Path, cached: bool) -> None:
    assert main(["icons", f"{moto_s3}/set", *OPTIONS]) == 0
    index = Index.open(f"{moto_s3}/set", tmp_path)
    assert index.digest == Index.open(icons_small, tmp_path).digest
    local = Reader(Index.open(icons_small, tmp_path), ShardCache(None))
    cache = ShardCache(str(tmp_path / "cache"), int(index.shard_bytes.max()) * 2) if cached else ShardCache(None)
    rows = range(0, 200, 9)
    assert _read_rows(Reader(index, cache), rows) == _read_rows(local, rows)
    reader = Reader(index, cache)  # whose file system has been used in this process: a fork must not inherit it
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_read_rows, (reader, rows)).get(timeout=60) == _read_rows(local, rows)


def test_cut_in_mid_shard_is_retried(icons_small: Path, proxied: tuple[str, Proxy], tmp_path: Path) -> None:
    url, proxy = proxied
    index = Index.open(url, tmp_path)
    assert index.shard_bytes.min() > proxy.cut_after
    proxy.cuts = 1
    cache = ShardCache(str(tmp_path / "cache"), int(index.shard_bytes.sum()), backoff_s=0.05)
    path = cache.path(index.shards[1], int(index.shard_bytes[1]))
    assert proxy.cut == 1, "the connection was not cut: the test shows nothing"
    assert Path(path).read_bytes() == (icons_small / "000001.tar").read_bytes()


def test_storage_that_always_cuts_ends_with_an_error(proxied: tuple[str, Proxy], tmp_path: Path) -> None:
    url, proxy = proxied
    index = Index.open(url, tmp_path)
    proxy.cuts = 10**6
    proxy.cut_after = 0
    cache = ShardCache(str(tmp_path / "cache"), int(index.shard_bytes.sum()), attempts=2, backoff_s=0.05)
    with pytest.raises(DataError, match=r"s3://shards/set/000001\.tar: 2 attempts failed, the last with"):
        cache.path(index.shards[1], int(index.shard_bytes[1]))
    assert proxy.cut <= 8  # four requests of the driver's for each attempt of ours
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_dead_endpoint_ends_with_a_clear_error(
    kind: str, moto_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    import fsspec
    from s3fs import S3FileSystem

    listener = socket.create_server(("127.0.0.1", 0), backlog=50)
    port = listener.getsockname()[1]
    if kind == "refused":
        listener.close()
    else:  # it takes the connection and never answers; the user's own, shorter timeout is what counts
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    cache = ShardCache(str(tmp_path), 10**9, attempts=2, backoff_s=0.05)
    with pytest.raises(DataError, match=r"s3://shards/set/x\.tar: 2 attempts failed, the last with .*\. Check that the storage answers"):
        cache.path("s3://shards/set/x.tar", 1000)
    took = time.monotonic() - started
    if kind == "silent":
        assert connections_to(listener) == 4  # two of the driver's for each attempt of ours; its own settings make more than fifty
        assert took < 4 * 15 / 2, f"{took:.1f} s"  # half of what the project's timeout would take
    else:
        assert took < 15, f"{took:.1f} s"  # 1 s here, and 20 of waiting with the driver's own settings
        # a run that cannot start is told from one that is wrong: it may be started again
        options = ["data.sources.0.url=s3://shards/set", f"out={tmp_path / 'run'}"]
        assert train(["train", "configs/pretrain/debug.yaml", *options]) == os.EX_TEMPFAIL
        assert "shards/set/index.parquet: 4 attempts failed" in capfd.readouterr().err
    listener.close()


def connections_to(listener: socket.socket) -> int:
    """How many wait to be taken."""
    listener.setblocking(False)
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(listener.accept()[0])
    for one in found:
        one.close()
    return len(found)


def test_errors_that_asking_again_cannot_mend(moto_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between two attempts there is always one
    with pytest.raises(DataError, match="no such file"):
        Index.open(f"{moto_s3}/nowhere", str(tmp_path))
    with pytest.raises(DataError, match=r"x\.tar: no such shard"):
        ShardCache(str(tmp_path), 10**9).path(f"{moto_s3}/nowhere/x.tar", 10)
    with pytest.raises(DataError, match=r"Protocol not known|knows"):
        Index.open("nosuch://bucket/x", str(tmp_path))
    assert not waits
