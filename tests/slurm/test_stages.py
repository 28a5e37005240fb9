"""More than one run: a second stage, a sweep; and the same job without Slurm."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import read_yaml
from slurm.notes import committed_step
from tests.runs import DEBUG, PATIENCE, ROOT, Launcher, assert_same_end, free_environment, free_port, losses, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import FILE, LOCAL, Launch, follow, reached, run, settings, settled, train

pytestmark = pytest.mark.slurm


def test_a_second_stage_starts_after_the_first_and_never_after_a_failed_one(
    cluster: Cluster, launch: Launch, launcher: Launcher, icons_small: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "run", tmp_path / "second"
    follows = follow(first, tmp_path / "then.yaml")
    changes = [f"out={second}", *settings(icons_small)]
    then = ["--then", str(follows), *(word for change in changes for word in ("--then-set", change))]

    failing = launch(f"data.sources=[{{url: {tmp_path / 'nothing'}}}]", *then)
    after = json.loads((second / "launch.json").read_text())
    assert after["after"] == failing
    said = run("slurm.status", str(second)).stdout
    assert f"waiting: it waits for another job to be complete (Dependency): job {failing}" in said or "cancelled" in said, said
    assert settled(cluster, failing) == "FAILED"
    wait_for(lambda: cluster.state(after["job"]) == "CANCELLED", "the second stage to go", every=0.2)
    assert not (second / "metrics.jsonl").exists()
    assert "nothing" in run("slurm.status", str(first)).stdout

    job = launch(*then)
    after = json.loads((second / "launch.json").read_text())
    assert settled(cluster, after["job"]) == "COMPLETED" and cluster.state(job) == "COMPLETED"
    started = [json.loads((folder / "starts.jsonl").read_text().splitlines()[-2])["time"] for folder in (first, second)]
    ended = json.loads((first / "starts.jsonl").read_text().splitlines()[-1])["time"]
    assert started[1] > ended
    assert losses(second)[0][1] < losses(first)[0][1], "it starts from what the first one has learnt"
    alone = tmp_path / "alone"
    for child in launcher.ranks(2, ["train", str(follows), f"out={alone}", *settings(icons_small)], free_port()):
        child.finish()
    assert_same_end(alone, second)


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    sweep = ["--sweep", "selector.name=dissect,random", "--sweep", "optimizer.lr=0.01,0.02", "--resource", "nodes=1"]
    job = launch("visits=6", *sweep)
    folders = [tmp_path / "run" / f"selector.name={name}+optimizer.lr={lr}" for name in ("dissect", "random") for lr in (0.01, 0.02)]
    assert job == json.loads((folders[0] / "launch.json").read_text())["job"] and job.endswith("_0")
    for place, folder in enumerate(folders):
        assert settled(cluster, f"{job[:-2]}_{place}") == "COMPLETED", (tmp_path / "run" / "launch").glob("*.out")
        config = read_yaml((folder / "resolved.yaml").read_text())
        assert folder.name == f"selector.name={config['selector']['name']}+optimizer.lr={config['optimizer']['lr']}"
        assert json.loads((folder / "result.json").read_text())["complete"]
    assert len({tuple(losses(folder)) for folder in folders}) == 4
    told = [json.loads(line) for line in run("slurm.status", *map(str, folders), "--json").stdout.splitlines()]
    assert [(one["state"], one["job"]) for one in told] == [("complete", f"{job[:-2]}_{place}") for place in range(4)]
    assert FILE.is_file()


def test_shards_are_made_by_an_array_and_equal_those_of_one_process(cluster: Cluster, icons_small: Path, tmp_path: Path) -> None:
    out, logs = tmp_path / "train", tmp_path / "logs"
    options = ["--limit", "200", "--size", "32", "--noise", "0.4", "--shard-size", "50"]  # those of icons_small
    done = run("slurm.shards", "--cluster", str(FILE), "--folder", str(logs), "--tasks", "3", "--", "icons", str(out), *options)
    assert done.returncode == 0, done.stderr
    told = json.loads((logs / "launch" / "shards.json").read_text())
    try:
        assert settled(cluster, told["index"]) == "COMPLETED"
        assert {cluster.state(f"{told['array']}_{task}") for task in range(3)} == {"COMPLETED"}
        assert len(list(out.glob("*.tar"))) == 4
        for path in icons_small.glob("*.*"):
            if path.suffix in (".tar", ".parquet"):
                assert (out / path.name).read_bytes() == path.read_bytes(), path.name
        assert "(0 made now)" in next((logs / "launch").glob(f"{told['index']}_0_log.out")).read_text()
    finally:
        cluster.clear()


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_the_same_job_runs_without_slurm(launcher: Launcher, icons_small: Path, tmp_path: Path, executor: str) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    if executor == "local":
        for child in launcher.ranks(2, train(whole, icons_small), free_port()):
            child.finish()
    else:
        launcher.run(train(whole, icons_small))
    arguments = [str(DEBUG), "--cluster", str(LOCAL), f"out={folder}", *settings(icons_small), "--executor", executor]
    done = run("slurm.launch", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(whole, folder)
    told = json.loads(run("slurm.status", str(folder), "--json").stdout)
    assert told["state"] == "complete" and (executor == "debug" or told["log"])


def test_ctrl_c_saves_the_step_that_the_ranks_are_in(icons_small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    endless = ["visits=100000", "checkpoint.every=1000000"]  # nothing is saved but at a stop
    arguments = [str(DEBUG), "--cluster", str(LOCAL), f"out={folder}", *settings(icons_small), "--executor", "local", *endless]
    command = [sys.executable, "-m", "slurm.launch", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=free_environment(), start_new_session=True, stdout=subprocess.DEVNULL) as child:
        wait_for(lambda: reached(folder, 5) or child.poll() is not None, "step 5")
        assert json.loads(run("slurm.status", str(folder), "--json").stdout)["state"] == "running"
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(PATIENCE) == 1
    assert committed_step(folder) == losses(folder)[-1][0] >= 5
    assert json.loads(run("slurm.status", str(folder), "--json").stdout)["state"] == "stopped"
