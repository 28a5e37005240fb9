"""The automatic warm-up: what it takes for the peak, that all ranks and a resumed run decide alike, and that a run ends it."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from pipeline.distributed.comm import LocalComm
from pipeline.selection import blend, dissect
from pipeline.selection.warmup import FILE, Watch, past_peak, shape, visits_of
from pipeline.types import Batch

# standard deviation of the scores by visit, icons with 40 % of the captions swapped, ViT: the gap of the means is largest at visits 6 and 7
ICONS = [2.49, 6.94, 9.17, 12.17, 14.22, 14.94, 15.90, 15.85, 15.04, 14.50, 13.65, 12.45]


def test_the_peak_is_told_by_a_clear_drop_or_by_two_small_ones() -> None:
    ends = [visit for visit in range(1, len(ICONS)) if past_peak(ICONS[: visit + 1], 2964)]
    assert ends[0] == 8
    assert not past_peak([10.0], 100) and not past_peak([10.0, 9.99], 100)
    assert past_peak([10.0, 9.99, 9.98], 100) and not past_peak([10.0, 9.99, 10.01], 100)
    assert past_peak([10.0, 9.99], 1_000_000)  # of a million scores that is no chance


def watch(folder: Path, latest: int = 100, comm: object = None) -> Watch:
    selector = dissect.Config(warmup_visits="auto").build(num_samples=8, warmup_steps=latest)
    return Watch(selector, comm or LocalComm(), lambda visits: 2 * visits, folder)


def scores(spread: float) -> torch.Tensor:
    """Cosines whose scores have this standard deviation."""
    return 0.3 + spread / 100 * torch.tensor([-1.0, 1.0, -1.0, 1.0])


def batch(valid: torch.Tensor) -> Batch:
    slot = torch.arange(len(valid))
    return Batch(slot, slot, torch.zeros_like(slot), valid, {})


def follow(one: Watch, first: int, steps: int) -> None:
    for step in range(first, steps):
        valid = torch.tensor([True, True, True, True, False])
        one.step(torch.cat([scores([5.0, 9.0, 6.0, 3.0][step // 2]), torch.tensor([0.9])]), batch(valid), step + 1)


def test_warm_up_ends_at_the_end_of_a_visit_and_the_folder_says_so(tmp_path: Path) -> None:
    one = watch(tmp_path)
    follow(one, 0, 5)
    assert one.active and one.needs(5) == {"cosine"} and one.selector.in_warmup(99)
    follow(one, 5, 8)
    assert one.spread == pytest.approx([5.0, 9.0, 6.0], abs=1e-4) and not one.active
    assert one.selector.warmup_steps == 6 and not one.needs(6) and one.selector.in_warmup(5) and not one.selector.in_warmup(6)
    assert json.loads((tmp_path / FILE).read_text())["visits"] == 3 and visits_of(tmp_path, "auto") == 3
    assert visits_of(tmp_path / "none", "auto") is None and visits_of(tmp_path, 5) == 5


def test_it_ends_with_half_of_the_run_at_the_latest(tmp_path: Path) -> None:
    one = watch(tmp_path, latest=3)
    follow(one, 0, 3)
    assert not one.active and one.selector.warmup_steps == 3


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_resumed_run_decides_as_if_it_had_not_stopped(tmp_path: Path, stop: int) -> None:
    whole, first, second = (watch(tmp_path) for _ in range(3))
    follow(whole, 0, 8)
    follow(first, 0, stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), torch.device("cpu"))
    follow(second, stop, 8)
    assert second.spread == pytest.approx(whole.spread) and second.selector.warmup_steps == whole.selector.warmup_steps == 6


class Beside(LocalComm):
    """One rank of two, each in a thread of this process."""

    size = 2

    def __init__(self, rank: int, said: dict[int, torch.Tensor], both: Barrier) -> None:
        self.rank, self.said, self.both = rank, said, both

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.said[self.rank] = x
        self.both.wait(10)
        total = self.said[0] + self.said[1]
        self.both.wait(10)
        return total


def test_ranks_decide_by_the_scores_of_all(tmp_path: Path) -> None:
    # the spread of the first rank's scores falls at once, that of the second's grows: together they peak at visit 1
    spreads = {0: [9.0, 6.0, 1.0, 1.0], 1: [1.0, 10.0, 10.5, 11.0]}
    histories = {0: torch.tensor([30.0, 31.0, 32.0, 20.0]), 1: torch.tensor([10.0, 31.0, 11.0, 12.0])}

    def decide(one: Watch, *ranks: int) -> Watch:
        one.selector.scores.score[: 4 * len(ranks)] = torch.cat([histories[rank] for rank in ranks])
        for step in range(8):
            rows = torch.cat([scores(spreads[rank][step // 2]) for rank in ranks])
            one.step(rows, batch(torch.ones(len(rows), dtype=torch.bool)), step + 1)
        return one

    whole, alone = decide(watch(tmp_path), 0, 1), [decide(watch(tmp_path), rank) for rank in (0, 1)]
    said, both = {}, Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: decide(watch(tmp_path, comm=Beside(rank, said, both)), rank), (0, 1)))
    assert whole.selector.warmup_steps == 8 and [one.selector.warmup_steps for one in alone] == [4, 100]
    for one in found:
        assert one.spread == pytest.approx(whole.spread) and one.selector.warmup_steps == 8
        assert one.shape == pytest.approx(whole.shape) and one.shape != pytest.approx(alone[0].shape)


def test_history_is_written_until_warm_up_ends_and_then_frozen() -> None:
    from pipeline.types import Candidates

    selector = dissect.Config(warmup_visits="auto").build(num_samples=4, warmup_steps=100)
    for step, cosine in enumerate((0.1, 0.2, 0.3, 0.4)):
        if step == 3:
            selector.warmup_steps = 3
        selector.select(Candidates(torch.arange(4), torch.full((4,), cosine), 2, step=step))
    assert selector.scores.score.tolist() == pytest.approx([30.0] * 4)


def test_a_selector_that_judges_is_told_the_shape_of_all_histories_and_told_again_after_a_resume(tmp_path: Path) -> None:
    def judging(warmup: int | str, latest: int) -> Watch:
        selector = blend.Config(warmup_visits=warmup).build(num_samples=8, warmup_steps=latest)
        selector.scores.score[:] = torch.tensor([30.0, 31.0, 32.0, 20.0, 99.0, 0, 0, 0])
        return Watch(selector, LocalComm(), lambda visits: 2 * visits, tmp_path)

    one, after = judging(2, 4), judging(2, 4)
    follow(one, 0, 4)
    assert not one.active and one.selector.warmup_steps == 4 and len(one.spread) == 2  # as long as it was told, peak or not
    values = np.array([30.0, 31.0, 32.0, 20.0])  # of the row that is not valid nothing
    z = (values - values.mean()) / values.std()
    assert one.shape == pytest.approx((np.mean(z**3), np.mean(z**4)))
    assert not one.selector.one_class and "two classes" in json.loads((tmp_path / FILE).read_text())["judged"]
    one.shape = (-1.0, 5.0)
    after.load_state_dict(json.loads(json.dumps(one.state_dict())), torch.device("cpu"))
    assert after.selector.one_class and not after.active
    assert not judging(0, 0).active and shape(3, [3.0, 3.0, 3.0, 3.0]) == (0.0, 3.0)
    assert not Watch(blend.Config(classes="two", warmup_visits=2).build(8, 4), LocalComm(), lambda visits: visits, tmp_path).active
