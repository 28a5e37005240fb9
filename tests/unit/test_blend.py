"""`blend`: whether there is a second class, where it cuts, what it takes for clean, and that among the clean the change decides."""

import itertools

import numpy as np
import pytest
import torch

from pipeline import kernels
from pipeline.selection.blend import Config, log_clean, split
from pipeline.selection.random import Config as RandomConfig
from pipeline.selection.warmup import shape
from pipeline.types import Candidates


def otsu(values: np.ndarray) -> float:
    """Tries every cut."""
    best, cut = -1.0, values.min()
    for value, above in itertools.pairwise(np.unique(values)):
        low, high = values[values <= value], values[values > value]
        between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, cut = between, (value + above) / 2
    return cut


def test_the_cut_is_the_one_that_trying_all_of_them_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 17, 64, 500):
        value = torch.cat(
            [torch.randn(size // 2, generator=generator) * 3 + 40, torch.randn(size - size // 2, generator=generator) * 8 + 20]
        )
        counted = torch.rand(size, generator=generator) < 0.8
        counted[:2] = True
        assert split(value.double(), counted).item() == pytest.approx(otsu(value[counted].double().numpy()))


def test_equal_values_and_rows_that_do_not_count_make_no_class_of_their_own() -> None:
    everything = torch.ones(8, dtype=torch.bool)
    assert len(log_clean(torch.full((8,), 5.0), everything).unique()) == 1
    value = torch.tensor([1.0, 2.0, 1.5, 9.0, 9.5, float("nan"), 1e6, -1e6])
    counted = torch.tensor([True] * 5 + [False] * 3)
    assert split(value, counted).item() == 5.5
    assert log_clean(value, counted)[:5].sort().indices.tolist() == [0, 2, 1, 3, 4]
    assert log_clean(value.nan_to_num(0), torch.zeros(8, dtype=torch.bool)).isfinite().all()  # nothing known


def after_warmup(*visits: list[float], keep: int, **settings: float) -> list[int]:
    """Rows chosen at the last of some visits of one group, all earlier ones being warm-up."""
    selector = Config(warmup_visits=len(visits) - 1, **settings).build(num_samples=len(visits[0]), warmup_steps=len(visits) - 1)
    slot = torch.arange(len(visits[0]))
    for step, scores in enumerate(visits):
        chosen = selector.select(Candidates(slot, torch.tensor(scores) / 100, keep, step=step))
    return chosen.rows.tolist()


def test_among_the_clean_the_forgotten_go_first_and_a_noisy_one_that_rises_stays_out() -> None:
    before, now = [50.0, 52.0, 48.0, 51.0, 20.0, 22.0, 18.0, 21.0], [56.0, 45.0, 40.0, 50.0, 30.0, 12.0, 19.0, 22.0]
    assert after_warmup(before, now, keep=2) == [1, 2]  # they sank the most; row 5 sank more, from a noisy level
    assert after_warmup(before, now, keep=4) == [0, 1, 2, 3]


def test_where_fewer_are_clean_than_are_kept_the_next_by_level_fill_up() -> None:
    before, now = [60.0, 20.0, 26.0, 22.0, 24.0, 18.0], [60.0, 10.0, 26.0, 22.0, 24.0, 18.0]
    assert after_warmup(before, now, keep=3) == [0, 2, 4]


def test_without_weight_of_the_change_it_is_the_level_alone() -> None:
    before, now = [50.0, 52.0, 48.0, 51.0, 20.0, 22.0, 18.0, 21.0], [56.0, 45.0, 40.0, 50.0, 30.0, 12.0, 19.0, 22.0]
    assert after_warmup(before, now, keep=2, change=0.0) == [0, 3]


def mixture(noisy: float, generator: torch.Generator, count: int = 4000) -> torch.Tensor:
    """Scores of two classes of one width, 2.5 of their standard deviations apart."""
    return torch.where(torch.rand(count, generator=generator) < noisy, 20.0, 35.0) + 6 * torch.randn(count, generator=generator)


def judged(scores: torch.Tensor) -> bool:
    powers = [(scores.double() ** power).sum().item() for power in range(1, 5)]
    selector = Config(warmup_visits=1).build(num_samples=8, warmup_steps=1)
    selector.judge(*shape(len(scores), powers))
    return selector.one_class


def test_two_classes_are_told_from_one_with_a_tail_of_hard_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not any(judged(mixture(share, generator)) for share in (0.25, 0.4, 0.5, 0.6, 0.75, 0.9))
    hard = 40 + 6 * torch.rand(4000, generator=generator).log()  # an exponential tail below a ceiling
    assert judged(hard) and judged(mixture(0.05, generator))  # a few noisy pairs are a tail as well
    assert not judged(torch.full((100,), 20.0))  # nothing is known


def test_one_class_is_chosen_from_by_lot_without_scores() -> None:
    selector, random = Config(warmup_visits=1).build(8, warmup_steps=1, seed=3), RandomConfig().build(8, seed=3)
    assert selector.judges and not Config(classes="two").build(8).judges
    assert "one class" in selector.judge(-0.6, 4.0)
    assert selector.needs(0) == {"cosine"} and not selector.needs(1)
    rows = [(one.select(Candidates(torch.arange(8), None, 4, step=step)).rows.tolist()) for one in (selector, random) for step in (1, 2, 3)]
    assert rows[:3] == rows[3:] and len(set(map(tuple, rows))) > 1


def test_a_wrong_caption_that_many_pairs_share_has_high_cosines_and_little_confidence() -> None:
    """Half of the pairs have one caption, learnt as the centre of their images; the others each their own, not as near."""
    shared, image, others = torch.arange(16) < 8, *torch.eye(32).split(16)
    centre = image[shared].sum(0)
    text = torch.where(shared[:, None], centre, image + 4 * others)
    cosine, loss = kernels.cosine(image, text), kernels.clip_loss(image, text, torch.tensor(20.0)).per_sample
    assert cosine[shared].min() > cosine[~shared].max()
    chosen = {}
    for level in ("cosine", "confidence"):
        selector = Config(warmup_visits=1, level=level).build(16, warmup_steps=1)
        assert selector.needs(0) == selector.needs(1) == {"cosine" if level == "cosine" else "loss"}
        for step in (0, 1):
            found = selector.select(Candidates(torch.arange(16), cosine, 8, loss=loss, step=step)).rows
        chosen[level] = shared[found].tolist()
        expected = cosine if level == "cosine" else (-loss).exp()
        assert selector.scores.score.tolist() == pytest.approx((100 * expected).tolist(), rel=1e-5)
    assert all(chosen["cosine"]) and not any(chosen["confidence"])
