"""One, two and four ranks: the same choices, the same training, and errors that say how many would work."""

import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import load
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.sources import Sources
from pipeline.distributed.comm import LocalComm
from pipeline.distributed.home import open_home
from pipeline.run import RunConfig
from pipeline.selection import big_loss, dissect, random
from pipeline.selection.groups import GroupSelector
from pipeline.types import Batch
from tests.runs import (
    DEBUG,
    PRUNES,
    SKIPS,
    Launcher,
    arguments,
    columns,
    command_line,
    free_port,
    last_checkpoint,
    losses,
    selection_log,
    skipped,
    wait_for,
)


def assert_same_choices(one: Path, other: Path) -> None:
    """Every step offered the same samples and trained the same ones; scores and losses differ by rounding only."""
    here, there = columns(selection_log(one)), columns(selection_log(other))
    for name in ("step", "visit", "sample", "kept"):
        assert np.array_equal(here[name], there[name]), name
    assert np.allclose(here["score"], there["score"], rtol=1e-4, atol=1e-3, equal_nan=True)
    a, b = np.array(losses(one)), np.array(losses(other))
    assert a.shape == b.shape and np.abs(a - b).max() < 1e-4


SELECTORS = [dissect.Config(rate=0.25, warmup_visits=1), big_loss.Config(rate=0.25), random.Config(rate=0.25)]


@pytest.mark.parametrize("config", SELECTORS, ids=lambda config: config.name)
def test_one_two_and_four_ranks_choose_the_same_rows_of_given_features(icons_small: Path, config) -> None:
    data = load(RunConfig, DEBUG, [f"data.sources.0.url={icons_small}"]).data
    plan = layout(Sources.open(data).shapes, 64, 8, 4, 2, 0)
    make = torch.Generator().manual_seed(1)
    steps = plan.steps_for(4)
    features = torch.randn(steps, 2, 200, 16, generator=make)  # of every sample at every step
    chosen: dict[int, list[list[int]]] = {}
    tables = {}
    for size in (1, 2, 4):
        ranks = [RankLanes(plan, rank, size) for rank in range(size)]
        selectors = [GroupSelector(config.build(lanes.num_samples, plan.steps_for(1), seed=3), 16, plan.keep(0.25)) for lanes in ranks]
        chosen[size] = []
        for step in range(steps):
            kept = []
            for lanes, selector in zip(ranks, selectors):
                rows = lanes.rows(step)
                batch = Batch(*map(torch.from_numpy, rows[:3]), valid=torch.ones(len(rows.sample), dtype=torch.bool), fields={})
                image, text = (torch.nn.functional.normalize(features[step, side][batch.sample]) for side in (0, 1))
                found, _ = selector.select(batch, {"image": image, "text": text, "scale": torch.tensor([14.0])}, step)
                kept += batch.sample[found.rows].tolist()
            chosen[size].append(kept)
        scores = [(lanes.ids, s.selector.scores.score, s.selector.scores.visits) for lanes, s in zip(ranks, selectors)]
        tables[size] = {i: (s, v) for ids, score, visits in scores for i, s, v in zip(ids.tolist(), score.tolist(), visits.tolist())}
    assert [len(kept) for kept in chosen[1]] == [64] * plan.steps_for(1) + [16] * (steps - plan.steps_for(1))
    assert chosen[1] == chosen[2] == chosen[4]
    assert tables[1] == tables[2] == tables[4] and len(tables[1]) == 200


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_objective_gives_the_ranks_the_gradient_of_the_whole_batch(launcher: Launcher, ranks: int) -> None:
    """float64; the ranks' gradients are averaged as DDP does, see pipeline/objectives/base.py. Some ranks have fewer rows than others."""
    said = [child.finish() for child in launcher.ranks(ranks, ["tests.ranks.objectives"], free_port())]
    assert all(word in said[0] for word in ("objective clip, blocked", "objective siglip, blocked", "bfloat16 agrees"))
    assert all("agrees" in line for line in said[0].splitlines() if line.startswith("objective "))


@pytest.fixture(scope="module")
def two_ranks(icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run started by torchrun."""
    out = tmp_path_factory.mktemp("two") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = command_line([*torchrun, "-m", "pipeline", *arguments(icons_small, out)])
    assert done.returncode == 0, done.stderr
    return out


def test_two_ranks_by_torchrun_train_like_one(trained: Path, two_ranks: Path) -> None:
    assert_same_choices(trained, two_ranks)
    assert {path.name for path in last_checkpoint(two_ranks).glob("lanes-*")} == {"lanes-00000-00001.parquet", "lanes-00002-00003.parquet"}
    whole = torch.cat([scores(two_ranks, part) for part in ("00000-00001", "00002-00003")])
    assert torch.allclose(whole, scores(trained, "00000-00003"), rtol=1e-4, atol=1e-3)


def scores(run: Path, part: str) -> torch.Tensor:
    import pyarrow.parquet as pq

    return torch.from_numpy(pq.read_table(last_checkpoint(run) / f"lanes-{part}.parquet")["score"].to_numpy().copy())


def test_a_launch_that_would_train_in_one_process_only_is_refused(icons_small: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
    done = command_line([*launch, "-m", "pipeline", *arguments(icons_small, tmp_path / "run")])
    assert done.returncode != 0
    assert "MASTER_ADDR but no RANK" in done.stderr and "torchrun --nproc_per_node N" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_the_other_way_round(
    launcher: Launcher, trained: Path, two_ranks: Path, icons_small: Path, tmp_path: Path
) -> None:
    for source, name in ((two_ranks, "one"), (trained, "two")):
        shutil.copytree(source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000018")
    pair = launcher.ranks(2, arguments(icons_small, tmp_path / "two"), free_port())
    launcher.run(arguments(icons_small, tmp_path / "one"))
    for child in pair:
        child.finish()
    for name, files in (("one", 1), ("two", 2)):
        assert_same_choices(trained, tmp_path / name)
        assert len(list(last_checkpoint(tmp_path / name).glob("lanes-*"))) == files
        assert len(selection_log(tmp_path / name)) == 18 * 64  # no step is logged twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "share", "zero"), [(SKIPS, 0.4, "null"), (PRUNES, 0.2, "null"), (PRUNES, 0.2, "{stage: 3, persist_below: 100}")]
)
def test_a_run_that_skips_is_the_same_on_two_ranks_and_goes_on_with_one(
    launcher: Launcher, icons_small: Path, tmp_path: Path, rule: tuple[str, ...], share: float, zero: str
) -> None:
    pieces = [f"engine.zero={zero}"] + ["engine.micro_batch=9"] * (zero != "null")
    launcher.run(arguments(icons_small, tmp_path / "one", *rule))
    for child in launcher.ranks(2, arguments(icons_small, tmp_path / "two", *rule, *pieces), free_port()):
        child.finish()
    assert skipped(tmp_path / "one") > share
    for source, name in (("two", "two then one"), ("one", "one then two")):
        shutil.copytree(tmp_path / source, tmp_path / name)
        shutil.rmtree(last_checkpoint(tmp_path / name))
    launcher.run(arguments(icons_small, tmp_path / "two then one", *rule))
    for child in launcher.ranks(2, arguments(icons_small, tmp_path / "one then two", *rule, *pieces), free_port()):
        child.finish()
    for name in ("two", "two then one", "one then two"):
        assert_same_choices(tmp_path / "one", tmp_path / name)


def test_a_signal_to_one_rank_stops_all_of_them_at_one_step(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pair = launcher.ranks(2, arguments(icons_small, run, "visits=100000", "stop.every=3"), free_port())
    wait_for(lambda: any(child.poll() is not None for child in pair) or (run / "metrics.jsonl").exists(), "the first step")
    assert pair[1].kill(signal.SIGUSR2)
    said = [child.finish() for child in pair]
    step = losses(run)[-1][0]
    assert step % 3 == 0 and f"stopped by another rank at step {step} of" in said[0]
    assert last_checkpoint(run).name == f"step-{step:08d}" and len(list(last_checkpoint(run).glob("lanes-*"))) == 2


def test_a_number_of_ranks_that_does_not_divide_is_refused_on_every_rank(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    for child in launcher.ranks(3, arguments(icons_small, tmp_path / "run"), free_port()):
        assert child.wait() == 2
        said = child.output()
        assert "data.lanes 4 and data.groups 2 cannot be dealt to 3 ranks; world sizes that work here: 1, 2." in said
        assert "Traceback" not in said


def test_the_lock_of_a_run_folder_is_seen_by_all_ranks(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    home = open_home(str(tmp_path / "run"), tmp_path, LocalComm(), 1.0)
    for child in launcher.ranks(2, arguments(icons_small, tmp_path / "run"), free_port()):
        assert child.wait() == 2 and "is training in this folder" in child.output()
    assert home.lock is not None
