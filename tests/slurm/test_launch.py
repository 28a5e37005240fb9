"""The launcher without a cluster: what it refuses, what it prints, and what the arithmetic says at a billion samples."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError, load
from pipeline.data.lanes import RankLanes
from pipeline.run import RunConfig
from slurm import plan
from slurm.array import one_rank, parameters
from slurm.cluster import ClusterConfig
from slurm.job import PORTS, free_port
from slurm.launch import main, points
from slurm.queue import Queued
from slurm.status import duration, read
from tests.runs import DEBUG, ROOT
from tests.slurm.conftest import follow

FILES = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
BIG = ROOT / "configs" / "pretrain" / "vitb16_cc12m_dissect.yaml"
CPU, H100 = (ROOT / "configs" / "cluster" / name for name in ("cpu.yaml", "h100.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cluster_file_gives_parameters_that_submitit_knows(path: Path, tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    script = _make_sbatch_string(command="true", folder=tmp_path, **load(ClusterConfig, path).slurm("run", tmp_path / "launch"))
    for word in ("--kill-on-invalid-dep=yes", "--requeue", "--kill-on-bad-exit=1", "--signal=USR2@", "slurm.job"):
        assert word in script


def test_an_array_asks_for_a_ranks_share_of_all_that_the_cluster_file_asks_for(tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    asked = one_rank(load(ClusterConfig, H100, ["mem_gb=32", "extra={nice: 10}", "exclude=n1", "gpus_per_node=8", "tasks_per_node=8"]))
    script = _make_sbatch_string(command="true", folder=tmp_path, **parameters(asked, tmp_path / "grid" / "submissions"))
    for word in ("--mem=4096M", "--nice=10", "--exclude=n1", "--gpus-per-node=1", "--job-name=grid"):
        assert word in script
    assert "slurm.job" not in script  # which starts a training run that was killed again


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["selector.nmae=random"], "selector.nmae"),
        (["--resource", "nodes=3"], "cannot be dealt to 3 ranks; world sizes that work here: 1, 2."),
        (["--resource", "nods=3"], "Did you mean 'nodes'?"),
        (["--then", "configs/pretrain/none.yaml"], "configs/pretrain/none.yaml: no such config file"),
        (["--then", str(DEBUG), "--then-set", "optimizer.lr=x"], "optimizer.lr"),
        (["--then", str(DEBUG), "--then-set", "out={out}"], "both runs would train in"),
        (["--sweep", "seed"], "--sweep seed: is written"),
        (["--sweep", "seed=1,1"], "comes twice"),
        (["--sweep", "seed=1,2", "--executor", "local"], "one job array on Slurm"),
        (["data.skip={share: 0.999}", "--dry-run", "--samples", "2000"], "data.skip: share 0.999 leaves"),
        (["out=s3://bucket/run"], "on a file system that all nodes see"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    arguments = [argument.format(out=out) if argument.startswith("out={") else argument for argument in arguments]
    assert main([str(DEBUG), "--cluster", str(CPU), f"out={out}", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_slurm_the_way_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([str(DEBUG), "--cluster", str(CPU), f"out={tmp_path / 'run'}"]) == 2
    assert "--executor local" in capsys.readouterr().err


def test_a_folder_with_a_checkpoint_of_another_configuration_is_left_alone(trained: Path) -> None:
    from slurm.folder import check_free

    config = load(RunConfig, trained / "resolved.yaml")
    check_free(config)
    with pytest.raises(ConfigError, match="optimizer.lr was 0.01, now 0.5"):
        check_free(load(RunConfig, trained / "resolved.yaml", ["optimizer.lr=0.5"]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("init_from.towers.student=pupil", "init_from.towers.student: {first}: unknown tower 'pupil'. Known: student"),
        ("teachers.old.tower=pupil", "teachers: live: {first}: unknown tower 'pupil'. Known: student"),
        ("objectives.kd.teacher=old.imag", "objectives.kd reads ['old.imag'], but the towers give"),
        ("objectives.kd.projector=linear", "projector: linear needs student_width and teacher_width"),
        ("init_from.run=/nowhere", "init_from.towers.student: /nowhere: is no run folder"),
    ],
)
def test_a_second_stage_is_checked_against_the_first_which_is_not_there_yet(
    wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    then = ["--then", str(follow(first, tmp_path / "then.yaml")), "--then-set", f"out={second}"]
    command = [str(DEBUG), "--cluster", str(CPU), f"out={first}", *then, "--dry-run", "--samples", "1000"]
    assert main([*command, "--then-set", wrong]) == 2
    assert said.format(first=first) in capsys.readouterr().err
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["then.yaml"]


def test_points_of_a_sweep_multiply() -> None:
    found = points(["seed=1"], ["selector.name=dissect,random", "data.sources=[{url: a}]"])
    assert list(found) == ["selector.name=dissect+data.sources=url-a", "selector.name=random+data.sources=url-a"]
    assert found["selector.name=random+data.sources=url-a"] == ["seed=1", 'selector.name="random"', 'data.sources=[{"url": "a"}]']
    assert points([], []) == {"": []}


def test_a_dry_run_for_256_ranks_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    arguments = [str(BIG), f"out={out}", "data.groups=256", "--cluster", str(H100), "--samples", "10_000_000", "--dry-run"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for words in (
        "#SBATCH --nodes=32",
        "256 = 32 nodes x 8",
        "10,000,000 (given)",
        "10,240 candidates, 40 a rank; 256 groups of 40, 1 a rank",
        "5,120 of them, 20 a rank",
        "149.6 M parameters, 41.09 GFLOP",
        "assuming   989 TFLOP/s a device at 35%; 1.00 forwards to score a candidate",
        "(1.00 in warm-up, by scoring.* in FLOP",
    ):
        assert words in said
    assert not out.exists()


def test_the_forecast_knows_what_is_scored() -> None:
    def cost(*overrides: str, warmup: bool = False) -> tuple[float, int]:
        config = load(RunConfig, BIG, list(overrides))
        return plan.step_cost(config, plan.Model(1, 100.0, 40.0, 300.0), 64, 32, warmup)

    assert cost() == (0.4, 32) and cost(warmup=True) == (0.4, 64)
    assert cost("scoring.every=4") == (0.1, 32) and cost("scoring.every=4", warmup=True) == (0.4, 64)
    assert cost("scoring.reuse=true", warmup=True) == (0.0, 64) and cost("scoring.reuse=true") == (0.4, 32)
    assert cost("selector={name: random, rate: 0.5}") == (0.0, 32)
    assert cost("selector={name: random, rate: 0.5, warmup_visits: auto}", warmup=True) == (0.4, 64)
    assert cost("selector={name: random, rate: 0.5}", "objectives.clip.negatives=all") == (0.4, 32)


def test_the_forecast_trains_the_average_of_a_rate_that_changes() -> None:
    def rows(rate: object, steps: int) -> float:
        config = load(RunConfig, BIG, [f"selector.rate={rate}", "selector.warmup_visits=0"])
        found = plan.plan(config, 8, 1_024_000)  # 100 steps a visit
        return plan.trained_rows(config, found, steps) / found.batch

    falling = "{start: 1.0, end: 0.2, visits: 10}"
    assert rows(0.5, 7000) == 0.5 and rows(falling, 0) == 1.0
    assert rows(falling, 1000) == pytest.approx(0.6, abs=0.02) and rows(falling, 4000) == pytest.approx(0.3, abs=0.02)


def test_a_selector_that_trains_all_is_planned_so_whatever_its_rate(capsys: pytest.CaptureFixture) -> None:
    config = load(RunConfig, BIG, ["selector={name: keep_all, rate: 0.5}"])
    found = plan.plan(config, 8, 1_024_000)
    assert plan.trained_rows(config, found, 7000) == found.batch
    assert main([str(BIG), "--cluster", str(H100), "selector={name: keep_all}", "--samples", "10_000_000", "--dry-run"]) == 0
    assert "10,240 of them, " in (said := capsys.readouterr().out) and "(keep_all, rate 1.0)" in said


def test_the_forecast_counts_the_scoring_passes_own_view() -> None:
    plain, small = (plan.measure(load(RunConfig, BIG, given)) for given in ([], ["scoring.image_size=112", "scoring.patches=0.5"]))
    assert plain.scoring == plain.flops == small.flops and 0.1 < small.scoring / small.flops < 0.4


def test_the_forecast_counts_the_rows_that_a_smaller_piece_embeds_twice() -> None:
    def row(pieces: int) -> str:
        config, cluster = load(RunConfig, BIG, [f"engine.micro_batch={pieces}"]), load(ClusterConfig, H100)
        said = "\n".join(plan.forecast(config, plan.Model(1, 100.0, 40.0, 300.0), cluster, 10240, 5120, (0, 10)))
        return said.split(" to train a row")[0].split(" ")[-1]

    each = 5120 // load(ClusterConfig, H100).world
    assert (row(each), row(each - 1)) == ("3.00", "4.00")


def test_a_tower_of_timm_is_counted() -> None:
    found = plan.measure(load(RunConfig, ROOT / "configs" / "distill" / "icons_umt.yaml"))
    assert found.parameters > 1e5 and 2.9 < found.training / found.flops < 3.0


def test_what_is_frozen_costs_no_backward() -> None:
    first, second = (plan.measure(load(RunConfig, path)) for path in sorted((ROOT / "configs").rglob("sfa_vivit_tiny_stage*.yaml")))
    assert not first.frozen and 2.9 < first.training / first.flops < 3.0  # the pixels need no gradient
    assert second.frozen > second.parameters and 1.1 < second.training / second.flops < 1.5


def test_zero_divides_what_it_says() -> None:
    stages = {stage: sum(parts.values()) for stage, parts in plan.zero_bytes(1_000_000, 4).items()}
    assert stages == {0: 16e6, 1: 10e6, 2: 7e6, 3: 4e6}


def test_a_billion_samples_on_1024_ranks_stay_within_bounds() -> None:
    config = load(RunConfig, BIG, ["data.batch=65536", "data.groups=1024"])
    found = plan.plan(config, 1024, 1_000_000_000)
    assert int(found.size.sum()) == 1_000_000_000 and found.size.max() - found.size.min() <= 1
    device, host = plan.table_bytes(found, 1024)
    assert device <= 5e6 and host <= 24e6
    for rank in (0, 511, 1023):
        lanes = RankLanes(found, rank, 1024)
        rows = lanes.rows(12_345)
        assert len(rows.sample) == 64 and len(np.unique(rows.sample)) == 64 and rows.sample.max() < 1_000_000_000
    assert plan.built_bytes(found, 1024) <= 24.1e6


def test_a_port_in_use_is_passed_over() -> None:
    first = free_port("4711")
    assert first in PORTS
    with socket.socket() as taken:
        taken.bind(("", first))
        assert free_port("4711") == first + 1
    assert free_port("4711") == first


def test_reasons_are_in_words() -> None:
    job = Queued("7", "PENDING", "Resources", "", "2026-11-22T10:00:00")
    assert job.in_words() == "it is the next one, and waits for free nodes (Resources); expected to start at 2026-11-22T10:00:00"
    assert "limit of the account" in job._replace(reason="QOSGrpCpuLimit").in_words()
    assert job._replace(reason="Sunspots", start="N/A").in_words() == "Slurm's reason: Sunspots"
    assert job._replace(state="RUNNING").in_words() == ""


def test_a_folder_tells_its_state_without_squeue(trained: Path, tmp_path: Path) -> None:
    assert read(trained, None, 5).state == "complete"
    (tmp_path / "launch.json").write_text(json.dumps({"job": "7", "executor": "slurm", "logs": str(tmp_path)}))
    assert read(tmp_path, None, 5).state == "unknown" and read(tmp_path, {}, 5).state == "stopped"
    events = [{"event": "start", "job": "7", "step": 0}, {"event": "end", "job": "7", "code": 2, "step": 0}]
    (tmp_path / "starts.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n{")
    (tmp_path / "7_0_log.out").write_text("error: what went wrong\n\rrun: 10%\rrun: 20%\n")
    found = read(tmp_path, None, 5)
    assert (found.state, found.why) == ("ended", "exit code 2 after the checkpoint of step 0; its log says why")
    assert found.log == ["error: what went wrong", "run: 20%"]
    (tmp_path / "7_1_log.out").write_text("error: what only rank 1 knows\n")
    events.insert(1, {"event": "refused", "job": "7", "start": 0, "rank": 1})
    (tmp_path / "starts.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert read(tmp_path, None, 5).log == ["error: what only rank 1 knows"]
    waiting = read(tmp_path, {"7": Queued("7", "PENDING", "Priority", "", "N/A")}, 5)
    assert (waiting.state, waiting.why) == ("waiting", "jobs of a higher priority are before it (Priority)")


def test_durations_read_well() -> None:
    assert [duration(seconds) for seconds in (20, 75, 9000, 864_000)] == ["20 s", "1 min", "2.5 h", "10.0 d"]
