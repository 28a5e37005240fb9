"""Disks and object stores that fail under a job: it waits where that helps, else it ends with a message, and goes on once they are mended."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from slurm.notes import committed_step, notes
from tests.runs import Launcher, assert_same_end, free_port, losses, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SHORT, Launch, Say, cannot, reached, settled, status, train
from tools.make_shards import main as make_shards

pytestmark = pytest.mark.slurm


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB under the run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        cannot(f"no mount here: {made.stderr}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, room: int) -> Path:
    """Leaves so many bytes free; the file that takes the rest."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:  # the job writes too: the last bytes may be gone already
        file.write(bytes(shutil.disk_usage(folder).free - room))
        while not room:
            file.write(b"0")
    return ballast


def test_a_full_disk_ends_the_job_and_room_lets_it_go_on(cluster: Cluster, launch: Launch, short: Path, disk: Path, say: Say) -> None:
    job = launch(*SHORT)
    wait_for(lambda: reached(disk, 50), "step 50")
    fill(disk, 300_000)  # a checkpoint has 1.2 MB
    assert settled(cluster, job) == "FAILED" and cluster.restarts(job) == 0, "to start it again would not help"
    told, step = status(disk), losses(disk)[-1][0]
    assert told["why"] == f"exit code 2 after the checkpoint of step {committed_step(disk)}; its log says why" and told["saved"] >= 40
    assert "could not be written" in str(told["log"]) and "make room, or lower checkpoint.keep" in str(told["log"])
    ballast = fill(disk, 0)
    assert "Make room, then launch again" in launch(*SHORT, code=2)
    ballast.unlink()
    began, other = time.monotonic(), launch(*SHORT)
    wait_for(lambda: reached(disk, step + 1), "the next step", every=0.05)
    taken = time.monotonic() - began
    assert settled(cluster, other) == "COMPLETED"
    assert [event["step"] for event in notes(disk) if event["event"] == "start"] == [0, told["saved"]]
    assert_same_end(short, disk)
    say(f"disk full: ended after step {step}, resumed at {told['saved']}, {taken:.0f} s from the launch to the next step")


@pytest.fixture
def stored(moto_s3: str, tmp_path: Path) -> tuple[Path, str]:
    """200 icons in 20 shards, on disk and in a bucket."""
    options = ["--limit", "200", "--size", "32", "--noise", "0.4", "--shard-size", "10", "--workers", "1"]
    assert make_shards(["icons", str(tmp_path / "icons"), *options]) == 0
    for file in (tmp_path / "icons").iterdir():
        boto3.client("s3").upload_file(str(file), "shards", f"icons/{file.name}")
    return tmp_path / "icons", f"{moto_s3}/icons"


def test_an_object_store_that_is_down_for_a_minute_is_waited_for(
    cluster: Cluster,
    launch: Launch,
    launcher: Launcher,
    stored: tuple[Path, str],
    moto_server: ThreadedMotoServer,
    tmp_path: Path,
    say: Say,
) -> None:
    (local, url), folder, options = stored, tmp_path / "run", [*SHORT, "data.window=1"]
    for child in launcher.ranks(2, train(tmp_path / "whole", local, *options), free_port()):
        child.finish()
    largest = max(file.stat().st_size for file in local.glob("*.tar"))
    cache = [f"data.cache={tmp_path / 'cache'}", f"data.cache_gb={8 * largest / 1e9}"]  # cold, and room for 8 shards of 20
    job = launch(*options, f"data.sources=[{{url: {url}}}]", *cache)
    wait_for(lambda: reached(folder, 50), "step 50")
    moto_server.stop()
    time.sleep(60)
    step, began = losses(folder)[-1][0], time.monotonic()
    moto_server.start()
    wait_for(lambda: reached(folder, step + 1), "the next step", every=0.05)
    taken = time.monotonic() - began
    assert settled(cluster, job) == "COMPLETED" and cluster.restarts(job) == 0
    assert "Asked again for up to 120 s" in next(folder.glob("launch/*_0_log.out")).read_text()
    assert_same_end(tmp_path / "whole", folder)
    say(f"object store down for 60 s at step {step}: no restart, {taken:.0f} s from its return to the next step")


def test_a_deleted_shard_ends_the_next_start_which_names_it(
    cluster: Cluster, launch: Launch, short: Path, icons_small: Path, tmp_path: Path, say: Say
) -> None:
    folder, data = tmp_path / "run", shutil.copytree(icons_small, tmp_path / "data")
    job = launch(*SHORT, f"data.sources=[{{url: {data}}}]")
    wait_for(lambda: reached(folder, 50), "step 50")
    (data / "000002.tar").unlink()
    step = losses(folder)[-1][0]
    wait_for(lambda: reached(folder, step + 10), "more steps: a file that is open can be read")
    cluster.ask("scancel", "--signal=USR2", job)
    assert settled(cluster, job) == "FAILED" and cluster.restarts(job) == 1
    told = status(folder)
    assert f"{data}/000002.tar: missing" in str(told["log"]), told
    shutil.copy(icons_small / "000002.tar", data)
    began, other = time.monotonic(), launch(*SHORT, f"data.sources=[{{url: {data}}}]")
    wait_for(lambda: reached(folder, told["saved"] + 1), "the next step", every=0.05)
    taken = time.monotonic() - began
    assert settled(cluster, other) == "COMPLETED"
    assert_same_end(short, folder)
    say(f"shard deleted at step {step}: stopped at {told['saved']}, {taken:.0f} s from the launch to the next step")
