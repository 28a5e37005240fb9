"""Checkpoints and run folders that must not be used, cannot be written, or belong to somebody else."""

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.__main__ import main
from pipeline.distributed import checkpoint
from tests.runs import Launcher, arguments, assert_same_end, commit_again, last_checkpoint, losses, put_back, wait_for
from tools.export import main as export
from tools.make_shards import main as make_shards

KEPT = ["step-00000010", "step-00000018"]  # of a debug run: every 10 steps and the last one, two stay
OPTIMIZER = "optimizer-00000-of-00001.safetensors"
FILES = ["COMMIT", "lanes-00000-00003.parquet", "model.safetensors", OPTIMIZER, "run.json"]

Train = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What a run sets for its whole process is put back."""
    with put_back():
        yield


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def train(icons_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Train:
    """Starts the debug run's command in this process; gives its exit code and what it said on stderr."""

    def start(*overrides: str, data: Path = icons_small) -> tuple[int, str]:
        code = main(arguments(data, tmp_path / "run", *overrides))
        return code, capsys.readouterr().err

    return start


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.find(b"progress") if path.name == "run.json" else len(data) // 2] ^= 1  # a changed configuration is another error
    path.write_bytes(bytes(data))


def test_a_folder_without_commit_is_passed_over_and_later_removed(run: Path, trained: Path, train: Train) -> None:
    assert folders(run) == KEPT and sorted(path.name for path in (run / "checkpoints" / KEPT[1]).iterdir()) == FILES
    (run / "checkpoints" / KEPT[1] / "COMMIT").unlink()
    flip(run / "checkpoints" / KEPT[1] / "model.safetensors")
    shutil.copytree(run / "checkpoints" / KEPT[1], run / "checkpoints" / "step-00000013")  # cut off at a step that does not come again
    shutil.copy(run / "selection" / "step-00000018-rank0000.parquet", run / "selection" / "step-00000013-rank0000.parquet")
    assert checkpoint.newest(run)[0].name == KEPT[0]
    assert train()[0] == 0
    assert_same_end(run, trained)
    assert folders(run) == KEPT


def test_whoever_the_umask_lets_reads_every_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    assert export([str(trained), str(tmp_path / "student.safetensors")]) == 0
    files = [path for path in (*trained.rglob("*"), tmp_path / "student.safetensors") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_after_commit_is_an_error_that_names_it(run: Path, train: Train, name: str) -> None:
    path = run / "checkpoints" / KEPT[1] / name
    if name == "COMMIT":
        path.write_text(path.read_text()[:-20])
    else:
        flip(path)
    code, said = train()
    assert code == 2 and str(path) in said
    assert "is damaged" in said if name == "COMMIT" else "was changed after it was committed (COMMIT says" in said
    assert f"delete {'the folder ' if name != 'COMMIT' else ''}{path.parent}" in said
    assert folders(run) == KEPT


def test_a_file_that_is_missing_or_cut_off_is_an_error_too(run: Path, train: Train) -> None:
    path = run / "checkpoints" / KEPT[1] / OPTIMIZER
    path.write_bytes(path.read_bytes()[:100])
    assert "'size': 100" in train()[1]
    path.unlink()
    code, said = train()
    assert code == 2 and str(path) in said and "found nothing" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=3", "seed was 0, now 3"),
        ("optimizer.lr=0.02", "optimizer.lr was 0.01, now 0.02"),
        ("selector.rate=0.25", "selector.rate was 0.5, now 0.25"),
        ("selector={name: random}", "selector.name was 'dissect', now 'random'"),
        ("towers.student.width=16", "towers.student.width was 32, now 16"),
        ("visits=9", "visits was 6.0, now 9.0"),
        ("engine.precision=bf16", "engine.precision was 'fp32', now 'bf16'"),
        ("data.window=2", "data.window was 4, now 2"),
        ("data.lanes=8", "data.lanes differs (checkpoint 4, now 8)"),
        ("data.groups=4", "data.groups differs (checkpoint 2, now 4)"),
        ("data.sources.0.weight=2.0", "data.weights was [None], now [2.0]"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_what_differs(run: Path, train: Train, change: str, said: str) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    code, message = train(change)
    assert code == 2 and said in message and "out=" in message and "step-00000018" in message
    assert {path: path.read_bytes() for path in before} == before  # the run that is there is left as it was


def test_what_changes_neither_samples_nor_weights_may_change(
    run: Path, trained: Path, icons_small: Path, tmp_path: Path, train: Train
) -> None:
    shutil.rmtree(run / "checkpoints" / KEPT[1])
    moved = shutil.copytree(icons_small, tmp_path / "moved")
    changes = [
        "data.workers=0",
        "data.prefetch=1",
        "checkpoint.every=4",
        "checkpoint.keep=3",
        "record.trackers=[]",
        "data.max_bad_fraction=0.5",
    ]
    assert train(*changes, data=moved)[0] == 0
    assert_same_end(run, trained)
    assert folders(run) == ["step-00000012", "step-00000016", "step-00000018"]


def test_a_checkpoint_of_another_index_is_refused(run: Path, tmp_path: Path, train: Train) -> None:
    assert make_shards(["icons", str(tmp_path / "other"), "--limit", "200", "--size", "32", "--seed", "1", "--workers", "1"]) == 0
    code, said = train(data=tmp_path / "other")
    assert code == 2 and "data.sources hold other samples" in said and "Restore what it was" in said


@pytest.mark.parametrize("number", [1, checkpoint.FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused(run: Path, train: Train, number: int) -> None:
    for name in ("COMMIT", "run.json"):
        path = run / "checkpoints" / KEPT[1] / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    code, said = train()
    assert code == 2 and f"has format {number}, this version reads format {checkpoint.FORMAT}" in said and "out=" in said


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_stay(tmp_path: Path, train: Train, keep: int) -> None:
    assert train("checkpoint.every=4", f"checkpoint.keep={keep}")[0] == 0
    assert folders(tmp_path / "run") == [f"step-{step:08d}" for step in (4, 8, 12, 16, 18)[-keep:]]
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        assert checkpoint.verify(folder)["step"] == int(folder.name[5:])


@pytest.fixture
def small_disk(tmp_path: Path, trained: Path) -> Iterator[Callable[[int], None]]:
    """A file system with room for two checkpoints and a half under the run folder; gives the function that sets its size in kB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    folder = tmp_path / "run"
    folder.mkdir()
    one = sum(path.stat().st_size for path in (trained / "checkpoints" / KEPT[1]).iterdir())
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={one * 5 // 2048}k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no mount in this container: {made.stderr}")
    yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_room_lets_it_go_on(
    small_disk, tmp_path: Path, trained: Path, train: Train
) -> None:
    run = tmp_path / "run"
    code, said = train("checkpoint.every=3")
    assert code == 2 and "could not be written" in said and "make room" in said and "Earlier checkpoints stay" in said
    good = last_checkpoint(run)
    step = checkpoint.verify(good)["step"]
    assert 3 <= step < 18 and checkpoint.newest(run)[0] == good
    assert train("checkpoint.every=3")[0] == 2  # it is still full
    assert checkpoint.newest(run)[0] == good and checkpoint.verify(good)["step"] == step
    small_disk(20_000)
    assert train("checkpoint.every=3")[0] == 0
    assert_same_end(run, trained)


def test_a_file_that_cannot_grow_is_told_like_a_full_disk(run: Path, trained: Path, train: Train) -> None:
    shutil.rmtree(run / "checkpoints" / KEPT[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # the weights have 400 kB
        code, said = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "could not be written" in said and "make room" in said
    assert folders(run) == KEPT[:1]
    assert train()[0] == 0
    assert_same_end(run, trained)


def test_a_second_process_on_the_folder_is_refused_and_the_first_goes_on(
    launcher: Launcher, icons_small: Path, tmp_path: Path, train: Train
) -> None:
    first = launcher.start(arguments(icons_small, tmp_path / "run", "visits=100000", "data.workers=2"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: first.poll() is not None or metrics.exists(), "the first step")
    code, said = train("visits=100000")
    assert code == 2 and f"process {first.pid} on {socket.gethostname()} is training in this folder" in said and "out=" in said
    steps = len(losses(tmp_path / "run"))
    wait_for(lambda: first.poll() is not None or len(losses(tmp_path / "run")) > steps + 2, "more steps")
    first.kill(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    again = launcher.start(arguments(icons_small, tmp_path / "run", "visits=100000"))  # while the workers of the dead one still live
    started = wait_for(lambda: again.poll() is not None or "/" in again.output().partition("|")[2], "the second start")
    assert started and "is training in this folder" not in again.output()
    again.kill(signal.SIGTERM)
    assert again.wait() in (0, -signal.SIGTERM)


class Trace:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["model.safetensors", OPTIMIZER])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "by torch.save"])
def test_a_pickle_in_a_checkpoint_is_never_run(run: Path, trained: Path, tmp_path: Path, train: Train, name: str, wrapped: bool) -> None:
    shutil.rmtree(run / "checkpoints" / KEPT[1])
    path, trace = run / "checkpoints" / KEPT[0] / name, tmp_path / "trace"
    if wrapped:
        torch.save({"state": Trace(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Trace(trace), protocol=2))
    code, said = train()
    assert code == 2 and f"{path}: was changed after it was committed" in said and not trace.exists()
    commit_again(path.parent)  # by somebody who can forge the COMMIT too
    code, said = train()
    assert not trace.exists()
    assert code == 2 and "no safetensors file" in said and str(path.parent) in said and "weights_only" not in said


def test_an_optimizer_file_that_is_missing_is_named_by_what_it_held(run: Path, train: Train) -> None:
    shutil.rmtree(run / "checkpoints" / KEPT[1])
    folder = run / "checkpoints" / KEPT[0]
    from safetensors.torch import load_file, save_file

    values = load_file(folder / OPTIMIZER)
    values.pop("exp_avg|towers.student.image.bias|0")
    names = {key.split("|")[1]: 10 for key in values}
    save_file(values, folder / OPTIMIZER, {"steps": json.dumps(names)})
    commit_again(folder)
    code, said = train()
    assert code == 2 and "hold 0 of 32 elements of exp_avg of towers.student.image.bias" in said


def test_a_run_folder_that_cannot_be_one_is_refused(tmp_path: Path, icons_small: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(arguments(icons_small, out)) == 2
        assert f"out: {out}: cannot be the run folder" in capsys.readouterr().err
