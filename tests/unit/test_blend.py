"""The gate of `blend`: where it cuts, what it lets pass, and that what passes is ordered by change."""

import numpy as np
import torch

from pipeline.selection.blend import Config, split
from pipeline.types import Candidates


def otsu(values: np.ndarray) -> float:
    """Tries every cut."""
    best, cut = -1.0, values.min()
    for value in np.unique(values)[:-1]:
        low, high = values[values <= value], values[values > value]
        between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, cut = between, value
    return cut


def test_the_cut_is_the_one_that_trying_all_of_them_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 17, 64, 500):
        value = torch.cat(
            [torch.randn(size // 2, generator=generator) * 3 + 40, torch.randn(size - size // 2, generator=generator) * 8 + 20]
        )
        counted = torch.rand(size, generator=generator) < 0.8
        counted[:2] = True
        assert split(value, counted).item() == np.float32(otsu(value[counted].numpy()))


def test_equal_values_and_rows_that_do_not_count_make_no_class_of_their_own() -> None:
    everything = torch.ones(8, dtype=torch.bool)
    assert not (torch.full((8,), 5.0) > split(torch.full((8,), 5.0), everything)).any()
    value = torch.tensor([1.0, 2.0, 1.5, 9.0, 9.5, float("nan"), 1e6, -1e6])
    counted = torch.tensor([True] * 5 + [False] * 3)
    assert split(value, counted).item() == 2.0
    assert split(value, torch.zeros(8, dtype=torch.bool)).isfinite()  # nothing known: some cut


def after_warmup(*visits: list[float], keep: int) -> list[int]:
    """Rows chosen at the last of some visits of one group, all earlier ones being warm-up."""
    selector = Config(warmup_visits=len(visits) - 1).build(num_samples=len(visits[0]), warmup_steps=len(visits) - 1)
    slot = torch.arange(len(visits[0]))
    for step, scores in enumerate(visits):
        chosen = selector.select(Candidates(slot, torch.tensor(scores) / 100, keep, step=step))
    return chosen.rows.tolist()


def test_among_the_clean_the_forgotten_go_first_and_a_noisy_one_that_rises_stays_out() -> None:
    before, now = [50.0, 52.0, 48.0, 51.0, 20.0, 22.0, 18.0, 21.0], [56.0, 45.0, 40.0, 50.0, 30.0, 12.0, 19.0, 22.0]
    assert after_warmup(before, now, keep=2) == [1, 2]  # they sank the most; row 5 sank more, from a noisy level
    assert after_warmup(before, now, keep=4) == [0, 1, 2, 3]


def test_where_fewer_pass_than_are_kept_the_next_by_level_fill_up() -> None:
    before, now = [60.0, 20.0, 26.0, 22.0, 24.0, 18.0], [60.0, 10.0, 26.0, 22.0, 24.0, 18.0]
    assert after_warmup(before, now, keep=3) == [0, 2, 4]
