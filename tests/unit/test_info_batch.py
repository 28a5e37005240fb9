"""InfoBatch: who is passed over, what stands for them, that the losses of training decide, and that a resume and more ranks change nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import kernels
from pipeline.config import ConfigError, load
from pipeline.data.lanes import Layout, RankLanes, SourceShape, layout
from pipeline.data.walk import Walk
from pipeline.evaluation.curate import judge
from pipeline.hashing import hash_ids
from pipeline.record.runs import load_run
from pipeline.record.tables import facts
from pipeline.run import RunConfig
from pipeline.selection import info_batch
from pipeline.selection.groups import GroupSelector
from pipeline.trainer import Trainer
from pipeline.types import Batch
from tests.runs import DEBUG, PRUNES, assert_same_end, skipped

CPU = torch.device("cpu")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 80), st.floats(0.05, 0.95), st.integers(0, 99))
def test_a_share_of_the_easy_ones_is_passed_over_and_the_rest_counts_for_all(count: int, share: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    loss, known = draw.gamma(2, 1, count).astype(np.float32), draw.random(count) < 0.8
    easy = known & (loss < loss[known].mean()) if known.any() else known
    skip, stand = info_batch.pruned(loss, known, hash_ids(seed, np.arange(count)), share)
    assert (easy == skip | stand).all() and not (skip & stand).any() and skip.sum() == int(share * easy.sum())


def test_over_the_lots_the_weighted_sum_is_that_of_all() -> None:
    draw = np.random.default_rng(0)
    loss, gradient, known = draw.gamma(2, 1, 40).astype(np.float32), draw.normal(3, 1, 40), np.ones(40, bool)
    sums = []
    for visit in range(4000):
        skip, stand = info_batch.pruned(loss, known, hash_ids(0, np.arange(40), visit), 0.3)
        weight = np.where(skip, 0, np.where(stand, (skip | stand).sum() / stand.sum(), 1))
        assert weight.sum() == pytest.approx(40)
        sums.append((weight * gradient).sum())
    assert np.mean(sums) == pytest.approx(gradient.sum(), rel=5e-3) and np.std(sums) > 1


def plan() -> Layout:
    """Four lanes of 62 or 63 samples, of which a batch takes eight each."""
    return layout([SourceShape(np.arange(0, 251, 25), 1.0)], 32, 4, 4, 2, 5)


def batch_of(walk: Walk) -> Batch:
    rows = walk.next()
    columns = (torch.from_numpy(column) for column in (rows.sample, rows.slot, rows.visit))
    return Batch(*columns, torch.ones(32 // 4 * len(walk.lanes.lanes), dtype=torch.bool), {}, weight=torch.from_numpy(rows.weight))


def walks(ranks: int, steps: int = 100, **config: float) -> list[tuple[info_batch.InfoBatch, Walk]]:
    """A selector and a walk that follows it for each rank; warm-up ends with the first visit."""
    found = []
    for rank in range(ranks):
        lanes = RankLanes(plan(), rank, ranks)
        selector = info_batch.Config(warmup_visits=1, lookahead=3, **config).build(lanes.num_samples, 8, 5)
        found.append((selector, Walk(lanes, selector.rule(steps), CPU)))
        found[-1][1].begin(0)
    return found


def step(selector: info_batch.InfoBatch, walk: Walk, number: int) -> Batch:
    """One step of training, whose losses last, with some whim."""
    batch = batch_of(walk)
    walk.advance(number)
    sample = batch.sample.numpy()
    loss = (hash_ids(1, sample) + 0.3 * hash_ids(2, sample, number)) / 2.0**63
    selector.learn(batch, torch.from_numpy(loss))
    return batch


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_visit_counts_each_sample_once_and_reads_the_hard_ones(ranks: int) -> None:
    pairs, (alone,) = walks(ranks), walks(1)
    weights = np.zeros((20, 250))
    for number in range(108):
        parts, whole = [step(*pair, number) for pair in pairs], step(*alone, number)
        for name in ("sample", "visit", "weight"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        weights[whole.visit.numpy(), whole.sample.numpy()] = whole.weight.numpy()
    lanes = alone[1].lanes
    for i in range(4):
        mine = weights[:, lanes.ids[lanes.start[i] : lanes.start[i + 1]]]
        assert mine[0].tolist() == [1] * len(mine[0])  # warm-up
        last = int(whole.visit[8 * i]) - 1  # it is over
        assert last > 13 and mine[: last + 1].sum(1) == pytest.approx(len(mine[0]), rel=1e-6)  # 108 steps are 13.8 visits of everything
        # from step 88 on whole visits again; by then half of those below the mean were left out, about a quarter
        assert all(0.6 < (visit > 0).mean() < 0.85 for visit in mine[2:12]) and (mine[last] == 1).all()
        hard = hash_ids(1, lanes.ids[lanes.start[i] : lanes.start[i + 1]]) / 2.0**63 > 0.7  # a loss above any mean, whatever the whim
        assert (mine[: last + 1, hard] == 1).all() and (mine[2:8, ~hard] == 0).any(0).mean() > 0.5


def test_nothing_is_passed_over_that_was_never_trained() -> None:
    ((selector, walk),) = walks(1)
    selector.warmup_steps = 0
    rule = selector.rule(100)
    assert not np.any(rule.enter(slice(0, 63), walk.lanes.ids[:63], 0, 0))
    selector.scores.visits[:20], selector.scores.score[:20] = 1, torch.arange(20.0)
    skip, stand = rule.enter(slice(0, 63), walk.lanes.ids[:63], 1, 10)
    assert skip[:10].sum() == stand[:10].sum() == 5 and not (skip | stand)[10:].any()
    assert not np.any(rule.enter(slice(0, 63), walk.lanes.ids[:63], 2, 88)) and np.any(rule.enter(slice(0, 63), walk.lanes.ids[:63], 2, 87))


def test_the_losses_are_those_of_valid_rows_and_the_weights_go_to_every_objective() -> None:
    selector, ids = info_batch.Config().build(8), torch.arange(4)
    valid = torch.tensor([True, True, False, True])
    batch = Batch(ids + 10, ids, ids * 0, valid, {}, weight=torch.tensor([1.0, 2.0, 1.0, 2.0]))
    selector.learn(batch, torch.tensor([0.5, 3.0, 0.0, torch.nan]))
    assert selector.scores.score[:4].tolist() == [0.5, 3.0, 0.0, 0.0] and selector.scores.visits[:4].tolist() == [1, 1, 0, 0]
    chosen, cosine = GroupSelector(selector, size=2, keep=1).select(batch, None, 5)
    assert cosine is None and chosen.rows.tolist() == [0, 1, 2, 3]
    assert all(chosen.weight(name, valid).tolist() == [1, 2, 0, 2] for name in ("clip", "relational_kd"))


@pytest.fixture
def start(start: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """With info_batch."""
    return partial(start, *PRUNES)


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_the_table_holds_the_loss_of_the_training_forward_whole_or_in_pieces(start: Callable[..., Trainer], objective: str) -> None:
    tables = []
    for rows in ("null", "24"):
        trainer = start(f"objectives={{one: {{name: {objective}, impl: reference}}}}", f"engine.micro_batch={rows}", out=f"run{rows}")
        batch = trainer.data.fetch[trainer.data.lanes.rows(0)]
        given = trainer.engine.features(batch)
        image, text, scale = (given[name] for name in ("image", "text", "scale"))
        if objective == "clip":
            expected = kernels.clip_loss(image, text, scale).per_sample
        else:
            expected = kernels.siglip_loss(image, text, scale, trainer.engine.raw.objectives["one"].bias).per_sample
        trainer.record.start(0, trainer.progress)
        trainer.train_step()
        table = trainer.selector.selector.scores
        assert torch.allclose(table.score[batch.slot], expected, rtol=1e-4) and table.visits.sum() == len(batch)
        tables.append(table.score)
    assert torch.allclose(*tables, rtol=1e-5)


def test_a_run_goes_on_exactly_and_says_what_it_skipped(start: Callable[..., Trainer], tmp_path: Path) -> None:
    whole = start(out="whole")
    assert whole.fit()
    stopped = start(out="parts")
    stopped.stop.agreed = lambda step: step == 14
    assert not stopped.fit()
    del stopped.lock
    resumed = start("data.workers=1", "data.prefetch=1", out="parts")
    assert resumed.progress.step == 14 and resumed.fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    said = [text for _, text in facts([load_run(tmp_path / "whole", 0)])[0]]
    assert "info_batch: passes over 60 % of the easy pairs, after 1 visits of warm-up" in said
    p = whole.progress
    assert p.scored == 0 and p.trained == p.offered == 37 * 64 and p.visit > 13 and skipped(tmp_path / "whole") > 0.15
    with pytest.raises(ConfigError, match="info_batch scored no pairs"):
        judge(tmp_path / "whole", whole.data.fetch.sources)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.skip={}"], "selector.name: info_batch passes samples over by a rule of its own"),
        (["scoring.every=2"], "where selector passes samples over, they are not. Set scoring.every=1"),
        (["data.workers=4"], "selector.lookahead: 8, but 4 workers x 2 batches are asked for 9 steps ahead"),
        (
            ["objectives={kd: {name: feature_kd, teacher: one.embedding, projector: none}}"],
            r"none of the objectives tells the loss of each row \(kd\)",
        ),
        (["objectives={a: {name: clip}, b: {name: siglip}}"], r"more than one of the objectives tells the loss of each row \(a, b\)"),
    ],
)
def test_what_cannot_be_is_refused(more: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(RunConfig, DEBUG, ["selector={name: info_batch}", *more])


def test_a_lane_must_hold_a_visit() -> None:
    selector = info_batch.Config(prune=0.9).build(250)
    with pytest.raises(ConfigError, match=r"selector: prune 0.9 leaves 7 samples of the smallest lane for a visit; a batch takes 8 of it"):
        Walk(RankLanes(plan(), 0, 1), selector.rule(10), CPU)
