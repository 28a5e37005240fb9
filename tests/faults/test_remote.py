"""A run folder on S3 (a real server on loopback, the real client): claims, uploads, what is fetched, and a store that is away."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.distributed import checkpoint, claim, remote
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.claim import Claim
from pipeline.distributed.comm import LocalComm
from pipeline.distributed.copies import Copy
from pipeline.distributed.home import RemoteHome, open_home
from pipeline.distributed.remote import Uploads
from pipeline.distributed.store import Patience, Store
from tests.faults.stores import Door
from tests.runs import wait_for

BEAT = 1.0  # a busy machine's sign of life may be late


@pytest.fixture
def claims() -> Iterator[Callable[..., Claim]]:
    """Makes claims that end with the test."""
    made: list[Claim] = []

    def make(url: str, beat: float = 60.0, gone: str | None = None) -> Claim:
        made.append(Claim(Store(url), gone, beat))
        return made[-1]

    yield make
    for one in made:
        fall_silent(one)


def fall_silent(one: Claim) -> None:
    """From here on there is no sign of life, as after kill -9 on another machine."""
    one._ending.set()
    one._thread.join()


def checkpoint_in(run: Path, step: int, ranks: int = 2, size: int = 1000) -> dict[int, remote.Listed]:
    """Files as `ranks` ranks leave them; what each lists."""
    folder, found = checkpoint.folder_of(run, step), {}
    folder.mkdir(parents=True)
    for rank in range(ranks):
        names = [f"optimizer-{rank:05d}-of-{ranks:05d}.safetensors", f"lanes-{2 * rank:05d}-{2 * rank + 1:05d}.parquet"]
        for name in [*names, "model.safetensors", "run.json"] if rank == 0 else names:
            (folder / name).write_bytes(f"{name} of {step} ".encode() * size)
        if rank == 0:
            (folder / "run.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": step}))
        found[rank] = {
            name: checkpoint.fingerprint(folder / name) for name in ([*names, "model.safetensors", "run.json"] if rank == 0 else names)
        }
    return found


def uploads(url: str, number: int = 1, seconds: float = 60) -> Uploads:
    return Uploads(Store(url), number, Patience(url, seconds), None)


def upload(url: str, run: Path, step: int, number: int = 1, ranks: int = 2) -> None:
    """A whole checkpoint, as its ranks bring it."""
    up = uploads(url, number)
    for rank, listed in checkpoint_in(run, step, ranks).items():
        up.send(checkpoint.folder_of(run, step), listed, rank, ranks)
    assert up.commit(checkpoint.folder_of(run, step))
    up.retire(keep=2)


def test_of_starts_at_the_same_moment_one_has_the_run(moto_s3: str, claims: Callable[..., Claim]) -> None:
    made, refused = [], []

    def start() -> None:
        try:
            made.append(claims(f"{moto_s3}/x", BEAT))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.number for one in made] == [1] and len(refused) == 3 and len(Store(f"{moto_s3}/x").listing()) == 1
    made[0].leave()
    assert claim.newest(Store(f"{moto_s3}/x")).left


def test_a_live_holder_is_named_and_a_dead_one_is_replaced(moto_s3: str, claims: Callable[..., Claim]) -> None:
    store = Store(f"{moto_s3}/x")
    mine = claims(store.url, BEAT)
    with pytest.raises(ConfigError, match=rf"s3://shards/x: process {os.getpid()} on .* is training in this run\. Wait for it"):
        claims(store.url, BEAT)
    fall_silent(mine)
    began = time.monotonic()
    other = claims(store.url, BEAT)
    assert other.number == 2 and time.monotonic() - began >= 4 * BEAT
    with pytest.raises(CheckpointError, match="has taken over this run"):
        claim.check(store, mine.number)
    mine.look(store)
    assert mine.superseded() and other.superseded() is None
    other.leave()
    third = claims(store.url)  # nobody to wait for
    assert third.number == 3
    assert claims(store.url, gone=third.token).number == 4  # nor where the holder is known to be gone


def test_a_newer_start_of_the_same_job_claims_at_once(moto_s3: str, monkeypatch: pytest.MonkeyPatch, claims: Callable[..., Claim]) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    older = claims(f"{moto_s3}/x", BEAT)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert claims(f"{moto_s3}/x", BEAT).number == 2
    assert wait_for(older.superseded, "the older start to see it").startswith("start 2 of job 7 (process ")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="start 2 of job 7"):  # an older start looks for a sign of life like anybody else
        claims(f"{moto_s3}/x", BEAT)


def test_a_checkpoint_exists_when_all_ranks_have_brought_their_files(moto_s3: str, tmp_path: Path) -> None:
    url, run = f"{moto_s3}/x", tmp_path / "run"
    listed = checkpoint_in(run, 10)
    folder, up = checkpoint.folder_of(run, 10), uploads(url)
    up.send(folder, listed[0], 0, 2)
    assert up.commit(folder, give_up=lambda: True) is None and remote.committed(Store(url)) == []
    Store(url).write("checkpoints/step-00000010/optimizer-00003-of-00004.safetensors", b"of an attempt of four ranks")
    Store(url).write("checkpoints/step-00000010/lanes-00002-00003.parquet", b"of an attempt that was cut off")
    up.send(folder, listed[1], 1, 2)
    assert up.commit(folder) == listed[0] | listed[1]
    assert remote.committed(Store(url)) == [10]
    stored = {name.rsplit("/", 1)[1]: found.size for name, found in Store(url).listing("checkpoints").items()}
    assert {name: size for name, size in stored.items() if name != "COMMIT"} == {
        name: entry["size"] for name, entry in (listed[0] | listed[1]).items()
    }
    for step in (20, 30):
        upload(url, run, step)
    assert remote.committed(Store(url)) == [20, 30]
    assert not Store(url).listing("checkpoints/step-00000010")


def test_only_what_is_needed_is_fetched_and_compared_with_commit(moto_s3: str, tmp_path: Path) -> None:
    url = f"{moto_s3}/x"
    upload(url, tmp_path / "run", 10)
    store, here = Store(url), tmp_path / "here"
    files = remote.files_of(store, 10)
    remote.fetch(store, 10, files, ["run.json", "model.safetensors"], here)
    remote.commit_here(here, 10, files)
    assert checkpoint.newest(here)[1]["step"] == 10
    folder = checkpoint.folder_of(here, 10)
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"COMMIT", "run.json", "model.safetensors"}
    before = (folder / "model.safetensors").stat()
    (folder / "run.json").write_text("damaged here")
    remote.fetch(store, 10, files, ["run.json", "model.safetensors"], here)
    assert checkpoint.verify(folder)["step"] == 10
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns  # was not fetched again
    name = "lanes-00000-00001.parquet"
    store.write(f"checkpoints/step-00000010/{name}", b"X" * files[name]["size"])
    with pytest.raises(CheckpointError, match=rf"step-00000010/{name}: was changed after it was committed"):
        remote.fetch(store, 10, files, [name], here)
    assert not (folder / name).exists()
    store.remove([f"checkpoints/step-00000010/{name}"])
    with pytest.raises(CheckpointError, match=rf"{name}: has no bytes, COMMIT says"):
        remote.files_of(store, 10)


@pytest.mark.parametrize("name", ["../../escaped.txt", "/escaped.txt"])
def test_a_name_that_leads_out_of_the_folder_is_refused_and_written_nowhere(moto_s3: str, tmp_path: Path, name: str) -> None:
    url = f"{moto_s3}/x"
    Store(url).write("resolved.yaml", b"seed: 1")
    Store(url).write(name, b"not of this run")
    with pytest.raises(DataError, match=r"s3://shards/x: holds an object whose name leads out of this folder, .*escaped"):
        Copy(Store(url), tmp_path / "a" / "b").pull(lambda name: True)
    assert not list(tmp_path.rglob("escaped.txt")) and not Path("/escaped.txt").exists()
    with pytest.raises(CheckpointError, match="COMMIT: is damaged"):
        checkpoint.listed(checkpoint.commit_text({name: {"size": 15, "sha256": ""}}).encode(), "here")


def test_an_older_start_writes_nothing_more(moto_s3: str, tmp_path: Path, claims: Callable[..., Claim]) -> None:
    url, run = f"{moto_s3}/x", tmp_path / "run"
    older = claims(url)
    assert claims(url, gone=older.token).number == older.number + 1
    listed = checkpoint_in(run, 10)
    with pytest.raises(CheckpointError, match=r"has taken over this run, and this process writes nothing more to it"):
        uploads(url, older.number).send(checkpoint.folder_of(run, 10), listed[0], 0, 2)
    assert not Store(url).listing("checkpoints")


def test_a_store_that_goes_away_in_the_middle_of_an_upload(door: Door, moto_s3: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    url, run = f"{moto_s3}/x", tmp_path / "run"
    listed = checkpoint_in(run, 10, size=20_000)[0] | {}
    folder, up = checkpoint.folder_of(run, 10), uploads(url, seconds=60)
    door.shut_after = 400_000

    def mend() -> None:
        wait_for(lambda: not door.is_open, "the middle of the upload")
        time.sleep(3)
        door.open()

    back = threading.Thread(target=mend)
    back.start()
    up.send(folder, listed, 0, 1)
    back.join(1)
    assert not back.is_alive(), "the store was not away: the test shows nothing"
    assert up.commit(folder) == listed
    said = capfd.readouterr().out
    assert said.count("cannot be reached") == 1 and said.count("answers again after") == 1


def test_an_upload_that_failed_is_completed_by_the_next_start(
    door: Door, moto_s3: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    url, comm = f"{moto_s3}/runs/x", LocalComm()
    first = open_home(url, tmp_path, comm, upload_timeout=1.0)
    assert isinstance(first, RemoteHome) and first.folder.is_relative_to(tmp_path) and first.folder.name == "x"
    (first.folder / "resolved.yaml").write_text("seed: 1")
    (first.folder / "metrics.jsonl").write_text('{"step": 10}\n')
    listed = checkpoint_in(first.folder, 10)
    folder = checkpoint.folder_of(first.folder, 10)
    door.shut()
    with pytest.raises(
        CheckpointError, match=r"s3://shards/runs/x: the checkpoint step-00000010 could not be uploaded within .*same command"
    ):
        first.uploads.send(folder, listed[0], 0, 2)
    with pytest.raises(CheckpointError):
        first.uploads.send(folder, listed[1], 1, 2)
    first.close(well=False)
    first.lock._file.close()
    door.open()
    second = open_home(url, tmp_path, comm, upload_timeout=60.0)
    assert second.claim.number == 2 and second.step == 10 and remote.committed(Store(url)) == [10]
    assert "step-00000010, which was only in" in capfd.readouterr().out
    assert set(Store(url).listing()) >= {"resolved.yaml", "metrics.jsonl"}
    checkpoint_in(second.folder, 20)  # whole on this disk, but before it is brought away another machine goes on
    for rank, files in checkpoint_in(second.folder, 30).items():
        checkpoint.write_durably(checkpoint.folder_of(second.folder, 30) / f"done-{rank:05d}-of-00002.json", json.dumps(files))
    second.close(well=True)
    second.lock._file.close()
    elsewhere = open_home(url, tmp_path / "elsewhere", comm, upload_timeout=60.0)
    assert elsewhere.step == 10 and (elsewhere.folder / "metrics.jsonl").read_text() == '{"step": 10}\n'
    elsewhere.close(well=True)
    fourth = open_home(url, tmp_path, comm, upload_timeout=60.0)
    assert fourth.step == 10 and [path.name for path in (fourth.folder / "checkpoints").iterdir()] == ["step-00000010"]
    assert remote.committed(Store(url)) == [10]
    fourth.close(well=True)


def test_what_is_wrong_at_the_start_is_said_before_training(moto_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    with pytest.raises(ConfigError, match=r"out: s3://nowhere/x: .*no such bucket"):
        open_home("s3://nowhere/x", tmp_path, LocalComm(), 1.0)
    auth = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    plain = {"Content-Type": "text/plain"}
    urlopen(Request(auth, data=b"0", headers=plain))  # from here on the server looks at the keys
    try:
        with pytest.raises(ConfigError, match=r"out: s3://shards/x.*PermissionError.*Check the permissions"):
            open_home(f"{moto_s3}/x", tmp_path, LocalComm(), 1.0)
    finally:
        urlopen(Request(auth, data=b"inf", headers=plain))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match=r"out: s3://shards/x.*Set AWS_ACCESS_KEY_ID"):
        open_home(f"{moto_s3}/x", tmp_path, LocalComm(), 1.0)
