"""What other starts have left, in an object store and on this machine, is neither taken for this run's nor written over what is newer."""

import gc
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.__main__ import main
from pipeline.data.errors import DataError, StorageError
from pipeline.distributed import checkpoint, claim, remote
from pipeline.distributed.claim import Claim
from pipeline.distributed.comm import LocalComm
from pipeline.distributed.home import Home, open_home
from pipeline.distributed.store import Patience, Store
from pipeline.distributed.views import View
from slurm.notes import committed_step
from tests.faults.test_remote import checkpoint_in, fall_silent, upload


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run folder in a store in memory; copies of it are under tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"/{uuid.uuid4().hex}"
    yield f"memory:/{name}/x"
    MemoryFileSystem().rm(name, recursive=True)


def start(url: str, cache: Path) -> Home:
    return open_home(url, cache, LocalComm(), upload_timeout=10.0)


def end(home: Home, well: bool = True) -> None:
    home.close(well)
    home.lock._file.close()


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("of another attempt")
    return path


def test_a_claim_that_cannot_be_read_now_is_no_damaged_one(url: str) -> None:
    class Away(Store):
        def read(self, name: str) -> bytes:
            raise StorageError(f"{name}: does not answer")

    Store(url).write(claim.name_of(1), b"not a claim")
    with pytest.raises(ValueError, match="is no claim; find out who wrote it"):
        claim.newest(Store(url))
    with pytest.raises(StorageError, match="does not answer"):
        claim.newest(Away(url))


def test_what_somebody_has_put_beside_claims_and_checkpoints_is_passed_over(url: str, tmp_path: Path) -> None:
    upload(url, tmp_path / "run", 10)
    Store(url).write(claim.name_of(3), Store(url).read("checkpoints/step-00000010/run.json"))
    for name in ("owners/readme.json", "checkpoints/step-the-best/COMMIT", "checkpoints/step-bestever/COMMIT", "checkpoints/old/step-00000020/COMMIT"):
        Store(url).write(name, b"")
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(DataError, match="000003.json: is no claim"):
        claim.newest(Store(url))
    upload(url, tmp_path / "run", 20)
    before = Store(url).listing()
    remote.Uploads(Store(url), 3, Patience(url, 1.0), None).retire(keep=1)
    assert remote.committed(Store(url)) == [20]
    assert {name for name in before if name not in Store(url).listing()} == {name for name in before if "/step-00000010/" in name}
    checkpoint.commit(checkpoint.folder_of(tmp_path / "run", 10), {})
    assert committed_step(tmp_path / "run") == 10 and [path.name for path in checkpoint.committed(tmp_path / "run")] == ["step-00000010"]


def test_of_another_attempt_at_the_same_step_nothing_is_read(url: str, tmp_path: Path) -> None:
    first = start(url, tmp_path)
    upload(url, first.folder, 10)
    end(first)
    stray = write(checkpoint.folder_of(first.folder, 10) / "optimizer-00000-of-00001.safetensors")
    before = write(first.folder / "selection" / "step-00000010-rank0001.parquet")
    after = write(first.folder / "selection" / "step-00000020-rank0001.parquet")
    second = start(url, tmp_path)
    assert second.step == 10 and not stray.exists() and before.exists() and not after.exists()
    assert (checkpoint.folder_of(first.folder, 10) / "optimizer-00000-of-00002.safetensors").exists()
    end(second)


def test_a_checkpoint_that_was_dropped_is_not_finished_by_a_later_start(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = start(url, tmp_path)
    for rank, files in checkpoint_in(here.folder, 30).items():  # whole on this disk, but another machine goes on before it is brought away
        checkpoint.write_durably(checkpoint.folder_of(here.folder, 30) / f"done-{rank:05d}-of-00002.json", json.dumps(files))
    end(here)
    end(start(url, tmp_path / "elsewhere"))

    def away(store: Store) -> list[int]:
        raise StorageError("does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "committed", away)
        with pytest.raises(StorageError):
            start(url, tmp_path)  # this machine has the newest claim from here on
    gc.collect()  # the lock of a start that failed goes with its process, which is this one here
    end(last := start(url, tmp_path))
    assert last.step == 0 and remote.committed(Store(url)) == []


def test_a_process_that_was_replaced_leaves_the_record_of_the_newer_one_alone(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    older = start(url, tmp_path)
    newer = Claim(Store(url), gone=older.claim.token, beat=60.0)
    Store(url).write("metrics.jsonl", b"of the newer start")
    write(older.folder / "metrics.jsonl")
    end(older)
    fall_silent(newer)
    assert Store(url).read("metrics.jsonl") == b"of the newer start"
    assert "has taken over this run" in capfd.readouterr().out


def test_a_view_has_the_newest_checkpoint_of_the_store_and_what_was_asked_for(url: str, tmp_path: Path) -> None:
    for step in (10, 20):
        upload(url, tmp_path / "run", step)
    view = View(url)
    view.weights("newest")
    assert checkpoint.newest(view.folder)[1]["step"] == 20
    store = Store(url)
    store.remove(store.listing("checkpoints/step-00000020"))
    view.weights("newest", ("run.json", "lanes-*"))
    folder, state = checkpoint.newest(view.folder)
    assert state["step"] == 10
    assert {path.name for path in folder.glob("[!.]*")} == {"COMMIT", "run.json", "lanes-00000-00001.parquet", "lanes-00002-00003.parquet"}


def test_a_store_that_is_away_for_tidying_up_fails_no_checkpoint(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(store: Store, prefix: str = "") -> dict:
        raise StorageError(f"{prefix}: does not answer")

    for step in (10, 20):
        upload(url, tmp_path / "run", step)
    uploads = remote.Uploads(Store(url), 1, Patience(url, 0.0), None)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "listing", away)
        uploads.retire(1)
    assert remote.committed(Store(url)) == [10, 20]
    uploads.retire(1)
    assert remote.committed(Store(url)) == [20]


def test_what_waiting_does_not_mend_is_said_at_once(url: str, tmp_path: Path) -> None:
    listed, folder = checkpoint_in(tmp_path / "run", 10, ranks=1)[0], checkpoint.folder_of(tmp_path / "run", 10)
    uploads = remote.Uploads(Store(url), 1, Patience(url, 0.2), None)
    uploads.send(folder, listed, 0, 1)
    Store(url).write("checkpoints/step-00000010/../../escaped", b"not of this run")
    with pytest.raises(remote.UploadError, match="an object whose name leads out of this folder.* this one is whole in") as found:
        uploads.commit(folder)
    assert not isinstance(found.value, StorageError)  # exit code 75 would have it started again
    Store(url).remove(["checkpoints/step-00000010/../../escaped"])
    assert uploads.commit(folder) == listed


def test_a_store_that_refuses_for_good_ends_a_run_with_the_code_that_nobody_starts_again(
    url: str, icons_small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    put = Store.put

    def refuse(store: Store, name: str, *rest: object, **more: object) -> None:
        if "step-" in name:
            raise DataError(f"{name}: permission was taken away")
        put(store, name, *rest, **more)

    monkeypatch.setattr(Store, "put", refuse)
    where = [f"out={url}", f"data.sources.0.url={icons_small}", "data.workers=0", "steps=4", "visits=", "checkpoint.every=2"]
    assert main(["train", "configs/pretrain/debug.yaml", *where]) == 2
    assert "permission was taken away" in capsys.readouterr().err
