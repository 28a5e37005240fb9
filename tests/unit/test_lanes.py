"""Lanes: every sample once per visit, in an order that ranks do not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError
from pipeline.data.lanes import RankLanes, SourceShape, layout


def shape(sizes, weight=1.0):
    return SourceShape(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), weight)


def stream(plan, world_size, steps):
    """The global batches, put together from the ranks' parts."""
    ranks = [RankLanes(plan, rank, world_size) for rank in range(world_size)]
    return [np.concatenate([r.rows(step).sample for r in ranks]) for step in range(steps)]


@st.composite
def plans(draw):
    world_size = draw(st.sampled_from([1, 2, 4]))
    lanes = world_size * draw(st.integers(1, 4))
    groups = world_size * draw(st.integers(1, 2))
    per_lane = draw(st.integers(1, 6))
    batch = lanes * per_lane
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))
    window = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**40))
    return world_size, lanes, groups, batch, sizes, window, seed


@settings(max_examples=150, deadline=None)
@given(plans())
def test_every_sample_exactly_once_per_visit(drawn):
    world_size, lanes, groups, batch, sizes, window, seed = drawn
    try:
        plan = layout([shape(sizes)], batch, lanes, groups, window, seed)
    except ConfigError:
        assert sum(sizes) < batch or batch % groups or batch // groups < 8
        return
    assert plan.size.max() - plan.size.min() <= 1
    seen: dict[tuple[int, int], int] = {}
    steps = plan.steps_for(3)
    for rank in range(world_size):
        reader = RankLanes(plan, rank, world_size)
        for step in range(steps):
            rows = reader.rows(step)
            assert (reader.ids[rows.slot] == rows.sample).all()
            for key in zip(rows.visit.tolist(), rows.sample.tolist()):
                seen[key] = seen.get(key, 0) + 1
    assert set(seen.values()) == {1}
    for visit in range(3):
        assert {s for v, s in seen if v == visit} == set(range(sum(sizes)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60), st.integers(1, 3))
def test_any_step_at_once_and_any_world_size_give_the_same_order(seed, step, window):
    plan = layout([shape([50, 7, 31, 90])], 32, 8, 4, window, seed)
    expected = stream(plan, 1, step + 1)[step]
    for world_size in (1, 2, 4):
        parts = [RankLanes(plan, rank, world_size).rows(step).sample for rank in range(world_size)]  # a fresh reader jumps to the step
        assert (np.concatenate(parts) == expected).all()


def test_order_changes_with_seed_and_visit():
    plan = layout([shape([64, 64])], 16, 2, 2, 2, 0)
    first, second = stream(plan, 1, 16)[:8], stream(plan, 1, 16)[8:]
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second))
    assert not (np.concatenate(first) == np.concatenate(second)).all()
    other = layout([shape([64, 64])], 16, 2, 2, 2, 1)
    assert not (np.concatenate(stream(other, 1, 8)) == np.concatenate(first)).all()


def test_a_window_of_one_reads_one_shard_at_a_time():
    plan = layout([shape([40, 40, 40])], 8, 1, 1, 1, 3)
    ids = np.concatenate(stream(plan, 1, 15))
    shards = ids // 40
    assert (np.diff(shards) != 0).sum() == 2
    assert not (np.diff(ids[:40]) == 1).all()


def test_sources_are_mixed_by_weight():
    plan = layout([shape([300], 3.0), shape([50, 50], 1.0)], 16, 8, 2, 4, 0)
    assert plan.mix() == [0.75, 0.25]
    for batch in stream(plan, 2, 40):
        halves = (batch >= 300).reshape(2, 8).sum(1)
        assert halves.tolist() == [2, 2]
    seen = np.concatenate(stream(plan, 1, 25))
    assert sorted(seen[seen >= 300]) == list(range(300, 400))  # 25 steps x 4 rows = one visit of the small source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 30}, "not a multiple of data.lanes"),
        ({"lanes": 200, "batch": 200, "groups": 4}, "lower data.lanes to 100"),
        ({"groups": 3}, "not a multiple of data.groups"),
        ({"groups": 8}, "at least 8"),
        ({"batch": 128, "groups": 8}, "come twice in one batch"),
    ],
)
def test_impossible_combinations_say_what_to_change(change, words):
    settings_ = {"batch": 32, "lanes": 8, "groups": 4, "window": 2, "seed": 0} | change
    with pytest.raises(ConfigError, match=words):
        layout([shape([60, 40])], **settings_)


def test_a_world_size_that_does_not_divide_names_those_that_do():
    plan = layout([shape([400])], 96, 12, 12, 2, 0)
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 12"):
        RankLanes(plan, 0, 5)


def test_more_sources_than_lanes_is_refused():
    with pytest.raises(ConfigError, match="at least as many lanes"):
        layout([shape([40])] * 3, 16, 2, 2, 1, 0)


def test_phases_are_steps():
    plan = layout([shape([101])], 16, 4, 2, 1, 0)
    assert plan.steps_for(0) == 0
    assert plan.steps_for(2) == 13  # the largest lane holds 26, a batch takes 4: 52 / 4
    assert plan.keep(0.5) == 4
    with pytest.raises(ConfigError, match="keeps no row"):
        plan.keep(0.05)
