"""Skip before decode: who is passed over, and that the order is that of a loader which decodes everything and applies the same rule."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError, load, parse
from pipeline.data.decode import ImageDecoder, Resize
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Layout, RankLanes, Rows, SourceShape, layout
from pipeline.data.loader import DataModule
from pipeline.data.skip import SkipConfig, passed_over
from pipeline.data.sources import DataConfig, Sources
from pipeline.data.walk import Walk
from pipeline.hashing import hash_ids
from pipeline.run import RunConfig
from pipeline.types import Batch, Selection
from tests.runs import DEBUG
from tests.unit.test_loader import equal

GROUP = 8


def test_only_what_was_rejected_often_enough_is_passed_over_and_not_for_ever() -> None:
    config = SkipConfig(share=0.9, after_visits=3, rescore_visits=5)
    sample, rejected = np.arange(100) * 7, np.arange(100).astype(np.uint8) % 5
    skips = [passed_over(config, 1, sample, rejected, visit) for visit in range(10)]
    for visit in range(6):
        offered = ~np.array(skips[visit : visit + 5])
        assert offered[:, rejected < 3].all() and (offered[:, rejected >= 3].sum(0) == 1).all()
    few = passed_over(SkipConfig(share=0.15, after_visits=3, rescore_visits=5), 1, sample, rejected, 0)
    assert few.sum() == 15 and (few <= skips[0]).all() and (rejected[few] == 4).all()  # the worst of those that may be skipped


class DecodesEverything:
    """The rule restated, one sample after the other: reads each one of each visit, then passes over some of them."""

    def __init__(self, plan: Layout, config: SkipConfig, read: Callable[[Rows], Any] | None = None) -> None:
        self.lanes, self.config, self.read = RankLanes(plan, 0, 1), config, read
        self.seed, self.per_lane = plan.seed, plan.per_lane
        self.after = [np.zeros(plan.num_samples, np.uint8)]  # rejections by slot, after each step
        self.walks = [self._lane(i) for i in range(plan.lanes)]
        self.skips: dict[tuple[int, int], bool] = {}  # by visit and sample
        self.step = 0

    def _lane(self, i: int) -> Iterator[tuple[int, int, Any]]:
        at = slice(self.lanes.start[i], self.lanes.start[i + 1])
        for visit in range(10**6):
            rejected = self.after[max(0, self.step - self.config.lookahead)][at]
            skip = passed_over(self.config, self.seed, self.lanes.ids[at], rejected, visit)
            for place in self.lanes.visit_order(i, visit):
                slot = int(at.start + place)
                sample = int(self.lanes.ids[slot])
                read = self.read(Rows(np.array([sample]), np.array([slot]), np.array([visit]))) if self.read else None
                self.skips[visit, sample] = bool(skip[place])
                if not skip[place]:
                    yield slot, visit, read

    def rows(self) -> list[tuple[int, int, Any]]:
        return [next(walk) for walk in self.walks for _ in range(self.per_lane)]

    def note(self, slots: list[int], chosen: list[bool]) -> None:
        now = self.after[-1].copy()
        for slot in set(slots):
            kept = any(c for s, c in zip(slots, chosen) if s == slot)
            now[slot] = 0 if kept else min(255, now[slot] + 1)
        self.after.append(now)
        self.step += 1


def choose(value: np.ndarray) -> np.ndarray:
    """The larger half of every group, ascending rows."""
    parts = [first + np.argsort(-value[first : first + GROUP], kind="stable")[: GROUP // 2] for first in range(0, len(value), GROUP)]
    return np.sort(np.concatenate(parts))


def liked(sample: np.ndarray, step: int) -> np.ndarray:
    """A liking that lasts, with some whim."""
    return hash_ids(3, sample) / 2**63 + 0.2 * hash_ids(4, sample, step) / 2**63


def bare(rows: Rows) -> Batch:
    columns = (torch.from_numpy(column) for column in (rows.sample, rows.slot, rows.visit))
    return Batch(*columns, torch.ones(len(rows.slot), dtype=torch.bool), {}, skipped=rows.skipped)


@st.composite
def cases(draw: Any) -> tuple[Layout, SkipConfig]:
    sizes = np.array(draw(st.lists(st.integers(10, 50), min_size=9, max_size=12)))
    plan = layout([SourceShape(np.concatenate([[0], np.cumsum(sizes)]), 1.0)], 32, 4, 4, draw(st.integers(1, 3)), draw(st.integers(0, 999)))
    share, after, again = draw(st.floats(0.1, 0.6)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
    return plan, SkipConfig(share=share, after_visits=after, rescore_visits=again, lookahead=draw(st.integers(1, 7)))


@settings(max_examples=20, deadline=None)
@given(cases(), st.sampled_from([1, 2, 4]))
def test_the_walk_is_that_of_a_loader_that_decodes_everything_on_any_number_of_ranks(case: tuple[Layout, SkipConfig], ranks: int) -> None:
    plan, config = case
    lanes, cpu = [RankLanes(plan, rank, ranks) for rank in range(ranks)], torch.device("cpu")
    walks = [Walk(mine, config.rule(mine, cpu), cpu) for mine in lanes]
    assert sum(walk.begin(0) for walk in walks) == 0
    plain, skipped = DecodesEverything(plan, config), 0
    for step in range(plan.steps_for(config.after_visits + config.rescore_visits)):
        parts, expected = [bare(walk.next()) for walk in walks], plain.rows()
        sample, visit = (torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("sample", "visit"))
        assert [(plain.lanes.ids[slot], visit) for slot, visit, _ in expected] == list(zip(sample, visit))
        kept = np.zeros(len(sample), bool)
        kept[choose(liked(sample, step))] = True
        for walk, part, mine in zip(walks, parts, np.split(kept, ranks)):
            walk.advance(step)
            walk.rule.note(part, Selection(torch.from_numpy(np.flatnonzero(mine))))
        plain.note([slot for slot, _, _ in expected], kept.tolist())
        skipped += sum(part.skipped for part in parts)
    assert skipped
    seen: dict[int, list[bool]] = {}  # by sample, in the order of the visits
    for (_, sample), skip in sorted(plain.skips.items()):
        seen.setdefault(sample, []).append(skip)
    n = config.rescore_visits
    assert len(seen) == plan.num_samples and min(map(len, seen.values())) > n
    assert not any(all(skips[first : first + n]) for skips in seen.values() for first in range(len(skips) - n + 1))  # the floor


SKIP = {"share": 0.5, "after_visits": 1, "rescore_visits": 4, "lookahead": 4}


@pytest.fixture
def module(icons_small: Path) -> Callable[..., DataModule]:
    """Makes data modules that skip; a lane has 50 samples."""

    def make(world: tuple[int, int] = (0, 1), **data: Any) -> DataModule:
        given = {"sources": [{"url": str(icons_small)}], "batch": 32, "lanes": 4, "groups": 4, "workers": 0, "prefetch": 1, "skip": SKIP}
        config = parse(DataConfig, given | data, "here")
        sources = Sources.open(config)
        plan = layout(sources.shapes, config.batch, config.lanes, config.groups, config.window, 5)
        fetch = Fetch(sources, {"image": ImageDecoder(16, Resize(16))}, 5)
        return DataModule(config, plan, *world, fetch, 200, torch.device("cpu"))

    return make


def step(data: DataModule) -> tuple[Batch, np.ndarray]:
    """One step of training: whose picture is dark is chosen."""
    batch = data.next()
    rows = choose(-batch.fields["image"].float().mean((1, 2, 3)).numpy())
    data.note(batch, Selection(torch.from_numpy(rows)))
    return batch, batch.sample.numpy()[rows]


def test_what_is_trained_is_what_a_loader_that_decodes_everything_trains(module: Callable[..., DataModule]) -> None:
    data = module()
    plain = DecodesEverything(data.lanes.layout, data.config.skip, lambda rows: data.fetch[rows])
    skipped = 0
    for _ in range(50):
        batch, trained = step(data)
        rows = plain.rows()
        image = torch.cat([read.fields["image"] for _, _, read in rows])
        kept = choose(-image.float().mean((1, 2, 3)).numpy())
        assert batch.slot.tolist() == [slot for slot, _, _ in rows] and torch.equal(batch.fields["image"], image)
        assert trained.tolist() == plain.lanes.ids[[rows[row][0] for row in kept]].tolist()
        plain.note([slot for slot, _, _ in rows], np.isin(np.arange(len(rows)), kept).tolist())
        skipped += batch.skipped
    assert skipped > 0.25 * len(plain.skips) and data.visit == (50 * 32 + skipped) / 200


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (23, 2), (40, 0)])
def test_a_resume_goes_on_identically(module: Callable[..., DataModule], stop: int, workers: int) -> None:
    through = module()
    for _ in range(stop):
        step(through)
    state, columns = through.state_dict(), {name: value.clone() for name, value in through.columns().items()}
    resumed = module(workers=workers)
    resumed.next()  # what was begun before is forgotten
    resumed.load_state_dict(state, columns | {"score": torch.zeros(200)})
    for _ in range(12):
        (one, trained), (other, again) = step(through), step(resumed)
        assert equal(one, other) and one.skipped == other.skipped and (trained == again).all()
    assert resumed.visit == through.visit and resumed.state_dict() == through.state_dict()


def test_two_ranks_go_on_as_one(module: Callable[..., DataModule]) -> None:
    alone, ranks = module(), [module((rank, 2)) for rank in range(2)]
    for _ in range(25):
        _, whole = step(alone)
        assert np.concatenate([step(rank)[1] for rank in ranks]).tolist() == whole.tolist()
    states, columns = [rank.state_dict() for rank in ranks], [rank.columns() for rank in ranks]
    one = module()
    one.load_state_dict(
        states[0] | {"walk": states[0]["walk"] + states[1]["walk"]}, {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    )
    for _ in range(12):
        assert equal(step(one)[0], step(alone)[0])


def test_what_cannot_be_is_refused_with_a_way_out(module: Callable[..., DataModule]) -> None:
    with pytest.raises(ConfigError, match=r"data.skip.lookahead: 4, but 2 workers x 2 batches are asked for 5 steps ahead"):
        load(RunConfig, DEBUG, ["data.skip={lookahead: 4}", "data.workers=2", "data.prefetch=2"])
    with pytest.raises(ConfigError, match=r"share 0.9 leaves 5 samples of the smallest lane for a visit; a batch takes 8"):
        module(skip=SKIP | {"share": 0.9})
    with pytest.raises(ConfigError, match=r"in lookahead 40 steps a lane may pass 7 visits"):
        module(skip=SKIP | {"lookahead": 40})
    with pytest.raises(ConfigError, match=r"scoring.every"):
        load(RunConfig, DEBUG, ["data.skip={}", "scoring.every=2"])
    with pytest.raises(ConfigError, match=r"selector.name: blend ranks by the mean .* Set data.skip to null"):
        load(RunConfig, DEBUG, ["data.skip={}", "selector.name=blend"])
