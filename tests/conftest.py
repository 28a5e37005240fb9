"""Fixtures that several rooms share: a small real data set, and an object store on loopback."""

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import pytest

from tests.runs import Launcher, arguments, command_line, put_back

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

    from pipeline.trainer import Trainer


@pytest.fixture(scope="session")
def icons_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 icons of 32 px in 4 shards, 80 of them with the caption of another name."""
    from tools.make_shards import main

    out = tmp_path_factory.mktemp("icons") / "train"
    options = ["--limit", "200", "--size", "32", "--noise", "0.4", "--shard-size", "50", "--workers", "1"]
    assert main(["icons", str(out), *options]) == 0
    return out


@pytest.fixture
def moto_server() -> Iterator["ThreadedMotoServer"]:
    """A real S3 server on loopback. It can be stopped, and started again at the same port with what it held."""
    from moto.server import ThreadedMotoServer

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def moto_s3(moto_server: "ThreadedMotoServer") -> Iterator[str]:
    """The URL of an empty bucket of that server; AWS_* point every client of this process at it."""
    import boto3
    from s3fs import S3FileSystem

    host, port = moto_server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"))  # servers of one process share what they hold
        boto3.client("s3").create_bucket(Bucket="shards")
        yield "s3://shards"
        S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts training runs as processes of their own; see tests/runs.py."""
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


@pytest.fixture
def start(icons_small: Path, tmp_path: Path) -> Iterator[Callable[..., "Trainer"]]:
    """Builds the trainer of the debug config with overrides, in this process."""
    from pipeline.config import load
    from pipeline.run import RunConfig, build

    def make(*overrides: str, out: str = "run") -> "Trainer":
        _, config, *given = arguments(icons_small, tmp_path / out, "data.workers=0", *overrides)
        trainer, trainer.lock = build(load(RunConfig, config, given))
        return trainer

    with put_back():
        yield make


@pytest.fixture(scope="session")
def trained(icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished debug run, started as a user starts it. Read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    done = command_line([sys.executable, "-m", "pipeline", *arguments(icons_small, out)])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 digits, noisy and clean."""
    from tools.make_shards import main

    out = tmp_path_factory.mktemp("digits") / "train"
    assert main(["digits", str(out), "--num-train", "150", "--shard-size", "64", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def colour(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose student reads the clean digits: what other runs have for a teacher. Read only."""
    from tests.distill import CLEAN, config, train

    out = tmp_path_factory.mktemp("colour") / "run"
    train(config(digits, out, CLEAN))
    return out
