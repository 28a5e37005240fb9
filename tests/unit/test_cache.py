"""The shard cache against a real HTTP server on loopback that counts what it is asked for."""

import fcntl
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from pipeline.data.cache import ShardCache
from pipeline.data.errors import DataError
from pipeline.data.index import Index
from pipeline.data.read import Reader

SIZE = 300_000


class Server(ThreadingHTTPServer):
    """Serves `/<n>` as SIZE bytes of n; cuts the first `cuts` answers in the middle; waits `delay_s` in the middle of each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.cuts, self.delay_s = 0, 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.asked[name] += 1
        if not name.isdigit():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()
        self.wfile.write(body(int(name))[: SIZE // 2])
        time.sleep(self.server.delay_s)
        if self.server.cuts > 0:
            self.server.cuts -= 1
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body(int(name))[SIZE // 2 :])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def body(number: int) -> bytes:
    return bytes([number % 256]) * SIZE


def held(folder: Path) -> int:
    """Bytes on disk, downloads in flight with what they have so far; under the cache's lock, so that no name changes meanwhile."""
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name != ".lock")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_one_get_per_shard_then_local(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    for _ in range(3):
        assert read_all(cache.open(f"{server.url}/7", SIZE)) == body(7)
    assert Path(cache.path(f"{server.url}/7", SIZE)).read_bytes() == body(7)
    assert server.asked == {"7": 1}
    cache.path(f"{server.url}/7", SIZE, "another version")
    assert server.asked == {"7": 2}


def test_evicts_the_least_recently_used_under_the_cap(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 3 * SIZE + 10)
    for number in (1, 2, 3, 1, 4):  # 2 is the oldest when 4 comes
        cache.path(f"{server.url}/{number}", SIZE)
        assert held(tmp_path) <= 3 * SIZE + 10
    cache.path(f"{server.url}/1", SIZE)
    cache.path(f"{server.url}/3", SIZE)
    assert server.asked == {"1": 1, "2": 1, "3": 1, "4": 1}
    cache.path(f"{server.url}/2", SIZE)
    assert server.asked["2"] == 2


def test_what_is_open_goes_last_and_stays_readable(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 2 * SIZE)
    first = cache.open(f"{server.url}/1", SIZE)
    cache.path(f"{server.url}/2", SIZE)
    second = cache.open(f"{server.url}/3", SIZE)  # evicts 2, which nobody reads, although 1 is older
    cache.path(f"{server.url}/1", SIZE)
    assert server.asked == {"1": 1, "2": 1, "3": 1}
    cache.path(f"{server.url}/4", SIZE)  # all are open: the oldest goes all the same, the cap is the cap
    assert held(tmp_path) <= 2 * SIZE
    assert read_all(first) == body(1) and read_all(second) == body(3)


def test_larger_than_the_cap_names_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"has {SIZE} bytes.*may hold 1000\. Raise its cap"):
        ShardCache(str(tmp_path), 1000).open("http://127.0.0.1:9/1", SIZE)


def test_cut_connection_is_retried(server: Server, tmp_path: Path) -> None:
    server.cuts = 2
    cache = ShardCache(str(tmp_path), 10 * SIZE, backoff_s=0.01)
    assert read_all(cache.open(f"{server.url}/5", SIZE)) == body(5)
    assert server.asked["5"] == 3


def test_gives_up_after_the_attempts_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.cuts = 99
    with pytest.raises(DataError, match=f"{server.url}/5: 3 attempts failed, the last with"):
        ShardCache(str(tmp_path), 10 * SIZE, attempts=3, backoff_s=0.01).open(f"{server.url}/5", SIZE)
    assert server.asked["5"] == 3 and held(tmp_path) == 0


def test_other_size_and_missing_are_not_retried(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    with pytest.raises(DataError, match=f"has {SIZE} bytes, the index expects {SIZE + 1}"):
        cache.open(f"{server.url}/5", SIZE + 1)
    with pytest.raises(DataError, match="no such shard"):
        cache.open(f"{server.url}/nowhere", SIZE)
    assert server.asked == {"5": 1, "nowhere": 1} and held(tmp_path) == 0


def test_local_shards_are_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello")
    cache = ShardCache(None)
    assert cache.path(f"file://{tmp_path}/x.tar", 5) == cache.path(f"{tmp_path}/x.tar", 5) == f"{tmp_path}/x.tar"
    with pytest.raises(DataError, match="no such shard"):
        cache.open(f"{tmp_path}/y.tar", 5)


def test_off_reads_ranges() -> None:
    fsspec.filesystem("memory").pipe_file("/ranges/x.tar", bytes(range(200)))
    cache = ShardCache(None, backoff_s=0.01)
    assert cache.ranged("memory://ranges/x.tar") and not cache.ranged("/x.tar")
    assert cache.read("memory://ranges/x.tar", 10, 5) == bytes(range(10, 15)) and cache.read("memory://ranges/x.tar", 10, 0) == b""
    with pytest.raises(DataError, match="no such shard"):
        cache.read("memory://ranges/y.tar", 0, 1)
    with pytest.raises(DataError, match=r"attempts failed.*100 bytes came for the range 100\.\.300"):
        cache.read("memory://ranges/x.tar", 100, 200)


def _reader(url: str, folder: str, cap: int, numbers: list[int], wrong: multiprocessing.Queue) -> None:
    cache = ShardCache(folder, cap)
    for number in numbers:
        descriptor = cache.open(f"{url}/{number}", SIZE)
        if os.pread(descriptor, SIZE, 0) != body(number):
            wrong.put(number)
        os.close(descriptor)
    wrong.put("done")


def _race(server: Server, folder: Path, cap: int, orders: list[list[int]]) -> list:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_reader, args=(server.url, str(folder), cap, order, queue)) for order in orders]
    for process in processes:
        process.start()
    told, most = [], 0
    while told.count("done") < len(orders):
        most = max(most, held(folder))
        while not queue.empty():
            told.append(queue.get())
        assert all(process.is_alive() or process.exitcode == 0 for process in processes), "a reader failed"
        time.sleep(0.002)
    for process in processes:
        process.join()
    assert most <= cap, f"{most} bytes were in the cache, its cap is {cap}"
    return [one for one in told if one != "done"]


def test_processes_share_one_download(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.1
    assert _race(server, tmp_path, 20 * SIZE, [[1, 2, 3], [1, 2, 3], [3, 2, 1]]) == []
    assert server.asked == {"1": 1, "2": 1, "3": 1}


def test_processes_under_a_cap_of_two_shards(server: Server, tmp_path: Path) -> None:
    orders = [[(a * 7 + b * step) % 11 for b in range(40)] for a, step in enumerate((1, 3, 5))]
    assert _race(server, tmp_path, 2 * SIZE, orders) == []


def test_download_of_a_killed_process_is_taken_over(server: Server, tmp_path: Path) -> None:
    server.delay_s = 60
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_reader, args=(server.url, str(tmp_path), 2 * SIZE, [1], queue))
    process.start()
    while not server.asked:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    server.delay_s = 0
    cache = ShardCache(str(tmp_path), 2 * SIZE)
    for number in (2, 3, 1):  # 2 and 3 need the room that the dead download holds
        assert read_all(cache.open(f"{server.url}/{number}", SIZE)) == body(number)
    assert held(tmp_path) <= 2 * SIZE and not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_a_reader_lets_go_of_what_was_evicted(icons_small: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in icons_small.glob("0*.tar"):
        memory.pipe_file(f"/evicted/{file.name}", file.read_bytes())
    memory.pipe_file("/evicted/index.parquet", (icons_small / "index.parquet").read_bytes())
    index = Index.open("memory://evicted", str(tmp_path))
    reader = Reader(index, ShardCache(str(tmp_path / "shards"), 2 * int(index.shard_bytes.max())))
    whole = Reader(Index.open(icons_small), ShardCache(None))
    for row in (0, 60, 110, 160, 0, 60):  # four shards through room for two
        assert reader.read(row, ["png"]) == whole.read(row, ["png"])
        assert held(tmp_path / "shards") <= 2 * int(index.shard_bytes.max())
        assert len(reader._open) <= 3, "evicted shards are kept open, so their disk space is not freed"
