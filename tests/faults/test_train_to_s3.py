"""A run whose folder is in an object store: killed, its machine lost, the store away; it ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.distributed import claim, remote
from pipeline.distributed.store import Store
from pipeline.weights import InitFrom
from tests.faults.stores import Door
from tests.runs import SAVES, Child, Launcher, arguments, assert_same_end, free_port, last_checkpoint, losses, selection_log, wait_for


class Machine:
    """A cache folder of its own, and processes that use it."""

    def __init__(self, launcher: Launcher, cache: Path) -> None:
        self.launcher, self.cache = launcher, cache

    def start(self, command: list[str], **environment: str) -> Child:
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return self.launcher.start(command, XDG_CACHE_HOME=str(self.cache), **aws, **environment)

    def folder(self) -> Path:
        """Where the run works on this machine."""
        return next(self.cache.glob("dissect-pipeline/runs/*/run"))

    def lose(self) -> None:
        """Its disk is gone."""
        shutil.rmtree(self.cache)


def command(data: Path, url: str, *more: str) -> list[str]:
    return arguments(data, Path("unused"), *SAVES, "data.workers=0", "checkpoint.every=6", *more, f"out={url}")


def copy_of(url: str, to: Path) -> Path:
    """Every object of a run, as any tool would copy it: that is a run folder."""
    for name in Store(url).listing():
        Store(url).get(name, to / name)
    return to


def saved(url: str) -> list[int]:
    return remote.committed(Store(url))


def kill(children: list[Child], chance: random.Random, seconds: float) -> None:
    time.sleep(chance.uniform(0, seconds))
    for child in children:
        child.kill(signal.SIGKILL)
    for child in children:
        child.wait()


def test_killed_on_a_machine_that_is_lost_a_run_goes_on_elsewhere_and_is_read_by_its_url(
    launcher: Launcher,
    icons_small: Path,
    uninterrupted: Path,
    moto_s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    url, chance = f"{moto_s3}/runs/run", random.Random(4)
    first, second = Machine(launcher, tmp_path / "first"), Machine(launcher, tmp_path / "second")
    child = first.start(command(icons_small, url), SLURM_JOB_ID="7", HOLD="20")
    wait_for(lambda: child.poll() is not None or Store(url).exists("resolved.yaml"), "what describes the run", every=0.05)
    wait_for(lambda: child.poll() is not None or saved(url), "a checkpoint in the store", every=0.05)
    kill([child], chance, 0.5)
    before = saved(url)
    assert before and before[-1] < 37, child.output()
    first.lose()
    said = second.start(command(icons_small, url), SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1").finish()  # Slurm tells that the first is gone
    assert f"{url}: this start is number 2; it works in {second.folder()}" in said
    assert losses(second.folder())[0][0] == 1 and len(losses(second.folder())) == 37
    assert_same_end(copy_of(url, tmp_path / "copy"), uninterrupted)
    assert json.loads((tmp_path / "copy" / "result.json").read_text())["complete"] and len(saved(url)) == 2
    second.lose()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader"))
    read_by_url(url, uninterrupted, tmp_path, capsys)


def read_by_url(url: str, same: Path, out: Path, capsys: pytest.CaptureFixture) -> None:
    """evaluate, report, tools.export and slurm.status, on a machine that has nothing of the run."""
    from pipeline.__main__ import main
    from pipeline.run import TrainedRun
    from slurm.status import main as status
    from tools.export import main as export

    assert main(["evaluate", url, "--quiet"]) == 0
    assert json.loads(Store(url).read("result.json"))["selection"]["rows"] == selection_log(same).num_rows
    assert main(["report", url, "--out", str(out / "report.html")]) == 0 and "run" in (out / "report.html").read_text()
    assert export([url, str(out / "student.safetensors")]) == 0
    expected = load_file(last_checkpoint(same) / "model.safetensors")
    exported = load_file(out / "student.safetensors")
    assert exported and all(expected[f"towers.student.{name}"].equal(value) for name, value in exported.items())
    towers = TrainedRun(url).task.towers
    for weight in towers.parameters():
        weight.detach().zero_()
    InitFrom(run=url, towers={"student": "student"}).load(towers)
    assert all(expected[f"towers.{name}"].equal(value) for name, value in towers.state_dict().items())
    assert not list((out / "reader").rglob("optimizer-*"))  # nobody needs these to read a run
    capsys.readouterr()
    assert status([url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["saved"]) == ("complete", 37, 37)
    assert main(["evaluate", f"{url}-typo"]) == 2 and "there is no run" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_ten_times_with_and_without_its_disk(
    launcher: Launcher, icons_small: Path, uninterrupted: Path, moto_s3: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    url, chance, machine = f"{moto_s3}/runs/run", random.Random(6), Machine(launcher, tmp_path / "machine")
    words, told, resumed, lost = command(icons_small, url, "checkpoint.every=2", "data.workers=1"), [], 0, 0
    for start in range(10):
        seen = saved(url)
        child = machine.start(words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(start))
        wait_for(lambda: child.poll() is not None or "steps of" in child.output(), "a start", every=0.01)  # noqa: B023
        if start in (2, 5):  # on a slow machine the others may all be killed before anything is saved
            wait_for(lambda: child.poll() is not None or saved(url) != seen, "a checkpoint", every=0.05)  # noqa: B023
        kill([child], chance, 2.5)
        told.append(child.output())
        resumed += bool(saved(url))
        if chance.random() < 0.5 and machine.cache.exists():
            machine.lose()
            lost += 1
    said = machine.start(words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="10").finish()
    completed = sum("is uploaded" in text for text in [*told, said])
    with capsys.disabled():
        print(f"\n10 kills, {resumed} with a checkpoint in the store, {lost} disks lost, {completed} uploads completed by the next start")
    assert resumed >= 5 and lost >= 3
    assert_same_end(copy_of(url, tmp_path / "copy"), uninterrupted)


def start_two(machines: list[Machine], words: list[str], **environment: str) -> list[Child]:
    """Two ranks on two machines."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [machine.start(words, RANK=str(rank), **world, **environment) for rank, machine in enumerate(machines)]


@pytest.mark.slow
def test_two_machines_without_a_common_disk(launcher: Launcher, icons_small: Path, moto_s3: str, tmp_path: Path) -> None:
    for child in launcher.ranks(2, arguments(icons_small, tmp_path / "expected", *SAVES, "data.workers=0"), free_port()):
        child.finish()
    url, chance = f"{moto_s3}/runs/run", random.Random(5)
    machines = [Machine(launcher, tmp_path / name) for name in ("a", "b")]
    for start in range(3):
        children = start_two(machines, command(icons_small, url), SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(start))
        seen = saved(url)
        wait_for(lambda: any(c.poll() is not None for c in children) or saved(url) != seen, "a checkpoint", every=0.05)  # noqa: B023
        kill(children, chance, 2)
        machines[start % 2].lose()
    for child in start_two(machines, command(icons_small, url), SLURM_JOB_ID="7", SLURM_RESTART_COUNT="3"):
        child.finish()
    assert_same_end(copy_of(url, tmp_path / "copy"), tmp_path / "expected")


@pytest.mark.slow
def test_only_what_a_machine_reads_is_fetched(launcher: Launcher, icons_small: Path, moto_s3: str, tmp_path: Path) -> None:
    url = f"{moto_s3}/runs/run"
    machines = [Machine(launcher, tmp_path / name) for name in ("a", "b")]
    for child in start_two(machines, command(icons_small, url, "steps=6", "visits=")):
        child.finish()
    machines[1].lose()
    for child in start_two(machines, command(icons_small, url, "steps=6", "visits=")):
        child.finish()
    fetched = {path.name for path in last_checkpoint(machines[1].folder()).iterdir() if not path.name.startswith(".")}
    assert fetched == {"COMMIT", "run.json", "model.safetensors", "lanes-00002-00003.parquet"} | {
        f"optimizer-0000{rank}-of-00002.safetensors" for rank in range(2)
    }


@pytest.mark.slow
def test_without_slurm_another_machine_looks_for_a_sign_of_life(
    launcher: Launcher, icons_small: Path, moto_s3: str, tmp_path: Path
) -> None:
    url = f"{moto_s3}/runs/run"
    first, second = Machine(launcher, tmp_path / "first"), Machine(launcher, tmp_path / "second")
    child = first.start(command(icons_small, url, "visits=100000"))
    wait_for(lambda: child.poll() is not None or saved(url), "a checkpoint in the store", every=0.05)
    refused = second.start(command(icons_small, url, "visits=100000"))
    assert refused.wait() == 2 and f"process {child.pid} on " in refused.output() and "is training in this run" in refused.output()
    child.kill(signal.SIGKILL)
    child.wait()
    done = saved(url)[-1]
    on_this = first.start(command(icons_small, url, "visits=100000"))
    wait_for(lambda: on_this.poll() is not None or saved(url)[-1] > done, "a later checkpoint", every=0.05)
    assert "looking for" not in on_this.output()  # the folder's lock was free, so nobody can live
    on_this.kill(signal.SIGKILL)
    on_this.wait()
    began = time.monotonic()
    other = second.start(command(icons_small, url, "visits=100000"))
    wait_for(lambda: other.poll() is not None or "this start is number 3" in other.output(), "the other machine's start", every=0.05)
    assert other.poll() is None and time.monotonic() - began >= claim.DEAD_AFTER
    other.kill(signal.SIGKILL)
    other.wait()


def shut_in_the_second_upload(machine: Machine, words: list[str], door: Door, same: Path) -> Child:
    """Starts a run, and waits until the door has shut after so many bytes as one checkpoint has and a half."""
    door.shut_after = 1.5 * sum(path.stat().st_size for path in last_checkpoint(same).iterdir())
    child = machine.start(words)
    wait_for(lambda: child.poll() is not None or not door.is_open, "the middle of the second upload", every=0.01)
    return child


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [60])
def test_the_store_is_away_in_the_middle_of_an_upload(
    launcher: Launcher, icons_small: Path, uninterrupted: Path, door: Door, moto_s3: str, tmp_path: Path, seconds: int
) -> None:
    url, machine = f"{moto_s3}/runs/run", Machine(launcher, tmp_path / "first")
    child = shut_in_the_second_upload(machine, command(icons_small, url), door, uninterrupted)
    time.sleep(seconds)
    assert child.poll() is None and len(losses(machine.folder())) > 12  # training went on, up to the next save
    door.open()
    assert saved(url) == [6]
    said = child.finish()
    assert said.count("cannot be reached") == 1 and said.count("answers again after") == 1
    assert_same_end(copy_of(url, tmp_path / "copy"), uninterrupted)


@pytest.mark.slow
def test_a_store_that_stays_away_stops_the_run_and_the_same_command_completes_the_upload(
    launcher: Launcher, icons_small: Path, uninterrupted: Path, door: Door, moto_s3: str, tmp_path: Path
) -> None:
    url, machine = f"{moto_s3}/runs/run", Machine(launcher, tmp_path / "first")
    child = shut_in_the_second_upload(machine, command(icons_small, url, "checkpoint.upload_timeout=3.0"), door, uninterrupted)
    assert child.wait() == os.EX_TEMPFAIL, child.output()
    assert f"{url}: the checkpoint step-" in child.output() and "the same command on this machine" in child.output()
    door.open()
    assert saved(url) == [6] and max(path.name for path in (machine.folder() / "checkpoints").iterdir()) == "step-00000012"
    said = machine.start(command(icons_small, url)).finish()
    assert f"step-00000012, which was only in {machine.folder()}, is uploaded" in said
    assert_same_end(copy_of(url, tmp_path / "copy"), uninterrupted)
