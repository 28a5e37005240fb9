"""DISSect as published: the checks of its specification, and the choices where it is silent."""

import pytest
import torch

from pipeline.selection import dissect, random
from pipeline.selection.base import Candidates


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(size: int = 100, warmup_steps: int = 0, seed: int = 0, **settings: object) -> dissect.Dissect:
    return dissect.Config(**settings).build(num_samples=size, warmup_steps=warmup_steps, seed=seed)


def with_history(history: torch.Tensor, **settings: object) -> dissect.Dissect:
    selector = build(len(history), **settings)
    selector.scores.score.copy_(history)
    selector.scores.visits.fill_(1)
    return selector


def rows(selector: dissect.Dissect, cosine: torch.Tensor, keep: int, slot: torch.Tensor | None = None, **fields: object) -> list[int]:
    slot = torch.arange(len(cosine)) if slot is None else slot
    return selector.select(Candidates(slot=slot, cosine=cosine, keep=keep, **fields)).rows.tolist()


@pytest.mark.parametrize("variant", ["warmup", "momentum"])
@pytest.mark.parametrize("seed", range(8))
def test_the_set_is_topk_of_history_minus_clamped_score(variant: str, seed: int) -> None:
    history, cosine = 60 * torch.rand(512, generator=seeded(seed)), 1.6 * torch.rand(256, generator=seeded(seed + 50)) - 0.6
    slot = torch.randperm(512, generator=seeded(seed + 99))[:256]
    differential = history[slot] - torch.clamp(100 * cosine, min=0)
    found = with_history(history, variant=variant)
    assert set(rows(found, cosine, 77, slot)) == set(torch.topk(differential, 77).indices.tolist())


def test_centring_or_a_constant_changes_nothing() -> None:
    history, cosine = 30 + 20 * torch.rand(64, generator=seeded(0)), 0.2 + 0.3 * torch.rand(64, generator=seeded(1))
    expected = rows(with_history(history), cosine, 20)
    assert rows(with_history(history + 7), cosine, 20) == expected == rows(with_history(history), cosine + 0.05, 20)


def test_sign_of_the_differential() -> None:
    assert rows(with_history(torch.tensor([10.0, 40.0])), torch.tensor([0.3, 0.3]), 1) == [1]
    assert rows(with_history(torch.tensor([40.0, 40.0])), torch.tensor([0.5, 0.3]), 1) == [1]


def test_unchanged_scores_tie_exactly_and_go_by_lot() -> None:
    cosine = torch.rand(64, generator=seeded(3))
    selector = build(64)
    rows(selector, cosine, 16)
    first = selector.select(Candidates(slot=torch.arange(64), cosine=cosine, keep=16))
    assert first.ranked_by.abs().max() == 0
    other = build(64, seed=1)
    rows(other, cosine, 16)
    assert rows(other, cosine, 16) != first.rows.tolist() != list(range(16))


class TestWarmup:
    def test_history_is_the_last_warmup_score_of_every_sample_then_frozen(self) -> None:
        selector = build(8, warmup_steps=3, warmup_visits=3)
        for step, level in enumerate((0.1, 0.2, 0.3)):
            assert len(rows(selector, torch.full((8,), level), 2, step=step)) == 8
        torch.testing.assert_close(selector.scores.score, torch.full((8,), 30.0))
        frozen = selector.scores.score.clone()
        for step in range(3, 8):
            rows(selector, torch.rand(8, generator=seeded(step)), 2, step=step)
        assert torch.equal(selector.scores.score, frozen) and selector.scores.visits.tolist() == [8] * 8

    def test_subset_warmup_still_writes_every_score(self) -> None:
        selector = build(8, warmup_steps=1, warmup_visits=1, warmup_data="subset")
        assert len(rows(selector, torch.linspace(0.1, 0.8, 8), 2, step=0)) == 2
        torch.testing.assert_close(selector.scores.score, torch.linspace(10, 80, 8))

    def test_a_sample_freezes_at_its_own_last_warmup_visit_though_the_phase_goes_on(self) -> None:
        selector = build(2, warmup_steps=100, warmup_visits=2)
        for step, slot in enumerate((0, 0, 0, 1)):
            rows(selector, torch.tensor([0.1 * (step + 1)]), 1, torch.tensor([slot]), step=step)
        assert selector.scores.score.tolist() == pytest.approx([20, 40]) and selector.scores.visits.tolist() == [3, 1]

    def test_a_sample_twice_in_the_batch_where_its_warmup_ends(self) -> None:
        """The end of its last warm-up visit and the start of the next: the first of the two rows is its history."""
        selector = build(1, warmup_steps=100, warmup_visits=2)
        rows(selector, torch.tensor([0.1]), 1, torch.tensor([0]))
        rows(selector, torch.tensor([0.2, 0.3]), 1, torch.tensor([0, 0]))
        assert selector.scores.score.tolist() == pytest.approx([20]) and selector.scores.visits.tolist() == [3]

    def test_running_mean_is_there_when_asked_for(self) -> None:
        selector = build(1, warmup_steps=3, warmup_visits=3, history="mean")
        for step, level in enumerate((0.1, 0.2, 0.6, 0.9)):
            rows(selector, torch.tensor([level]), 1, step=step)
        assert selector.scores.score.item() == pytest.approx(30)

    def test_a_sample_first_seen_after_warmup_is_neutral_and_gets_its_history_then(self) -> None:
        history = torch.tensor([50.0, 40, 30, 20, 10])
        selector = with_history(history)
        selector.scores.visits[2] = 0
        chosen = selector.select(Candidates(slot=torch.arange(5), cosine=torch.full((5,), 0.2), keep=2))
        assert chosen.rows.tolist() == [0, 1] and chosen.ranked_by.tolist() == pytest.approx([30, 20, 0, 0, -10])
        rows(selector, torch.full((5,), 0.9), 2)
        assert selector.scores.score.tolist() == pytest.approx([50, 40, 20, 20, 10])
        assert selector.scores.visits.tolist() == [3, 3, 2, 3, 3]


class TestMomentum:
    def test_recursion_with_the_history_before_the_update(self) -> None:
        selector = build(32, variant="momentum")
        cosine = torch.rand(5, 32, generator=seeded(0))
        rows(selector, cosine[0], 8)
        history = 100 * cosine[0]
        torch.testing.assert_close(selector.scores.score, history)
        for current in cosine[1:]:
            expected = set(torch.topk(history - 100 * current, 8).indices.tolist())
            assert set(rows(selector, current, 8)) == expected
            history = 0.9 * history + 0.1 * 100 * current
            torch.testing.assert_close(selector.scores.score, history)

    def test_closed_form_after_constant_visits(self) -> None:
        selector = build(1, variant="momentum", momentum=0.8)
        for level in (0.7, *[0.2] * 6):
            rows(selector, torch.tensor([level]), 1)
        assert selector.scores.score.item() == pytest.approx(20 + 0.8**6 * 50)

    def test_warmup_updates_too_and_momentum_0_is_the_last_score(self) -> None:
        selector = build(1, warmup_steps=5, warmup_visits=1, variant="momentum", momentum=0.0)
        for step in range(4):
            rows(selector, torch.tensor([0.1 * step]), 1, step=step)
        assert selector.scores.score.item() == pytest.approx(30)

    def test_first_epoch_does_not_pick_the_lowest_similarities(self) -> None:
        """With a history of 0 the differential would be -s and the first epoch would train the worst pairs."""
        cosine = torch.rand(1024, generator=seeded(0))
        chosen = torch.tensor(rows(build(1024, variant="momentum"), cosine, 256))
        assert len(set(chosen.tolist()) & set((-cosine).topk(256).indices.tolist())) < 90  # 64 by chance
        assert abs(cosine[chosen].mean() - 0.5) < 0.06


def test_world_size_does_not_matter() -> None:
    """Four groups on one rank, or two on each of two with their own part of the table: the same rows, the same table."""
    whole, parts = build(64, seed=5), [build(32, seed=5) for _ in range(2)]
    for step in range(4):
        cosine = torch.rand(64, generator=seeded(step))
        for g in range(4):
            own, there = torch.arange(16) + 16 * g, torch.arange(16) + 16 * (g % 2)
            here = rows(whole, cosine[own], 4, own, sample=own, step=step)
            assert rows(parts[g // 2], cosine[own], 4, there, sample=own, step=step) == here
    assert torch.equal(torch.cat([part.scores.score for part in parts]), whole.scores.score)
    assert torch.equal(torch.cat([part.scores.visits for part in parts]), whole.scores.visits)


@pytest.mark.parametrize(("rate", "expected"), [(0.3, 0.85), (0.5, 0.75), (0.7, 0.65)])
def test_oracle_drift(rate: float, expected: float) -> None:
    """Scores of clean pairs sink by 1.7 and of noisy ones rise by 2.2, each score with a jitter of sd 2: the precision that the upper
    tail of the two shifted normals gives, whatever the level of a pair's score is (sd 8)."""
    size, group = 20_000, 500
    clean = torch.rand(size, generator=seeded(0)) < 0.5
    level = 40 + 8 * torch.randn(size, generator=seeded(1))
    drift = torch.where(clean, -1.7, 2.2)
    jitter = 2 * torch.randn(2, size, generator=seeded(2))
    selector = with_history(level + jitter[0])
    kept = []
    for slot in torch.randperm(size, generator=seeded(3)).split(group):
        chosen = rows(selector, (level + drift + jitter[1])[slot] / 100, round(rate * group), slot)
        kept.append(clean[slot[torch.tensor(chosen)]])
    assert torch.cat(kept).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_scores_that_do_not_move_carry_no_information() -> None:
    clean = torch.rand(4000, generator=seeded(0)) < 0.6
    cosine = torch.where(clean, 0.5, 0.3) + 0.05 * torch.randn(4000, generator=seeded(1))
    selector = build(4000)
    rows(selector, cosine, 2000)
    assert clean[torch.tensor(rows(selector, cosine, 2000))].float().mean().item() == pytest.approx(0.6, abs=0.03)


def test_momentum_must_be_under_one() -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="momentum"):
            dissect.Config(momentum=wrong)


def test_random_covers_all_samples_evenly() -> None:
    """Over many steps every sample is chosen at the rate, and a run repeats itself."""
    selector = random.Config(rate=0.25).build(num_samples=64)
    steps = [selector.select(Candidates(slot=torch.arange(64), cosine=None, keep=16, step=step)).rows for step in range(400)]
    counts = torch.bincount(torch.cat(steps), minlength=64)
    assert counts.min() > 60 and counts.max() < 140
