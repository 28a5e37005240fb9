"""The uni-modal ensemble, and the choice between it and distillation."""

import numpy as np
import pytest

from pipeline.evaluation.guide import choose, probe, ume

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 1000)


def probabilities(models: int = 3, rows: int = 9) -> np.ndarray:
    p = np.random.default_rng(1).random((models, rows, 4))
    return p / p.sum(2, keepdims=True)


def answers(accuracy: float, labels: np.ndarray = LABELS, seed: int = 0) -> np.ndarray:
    """Predictions of which exactly that share is right."""
    right = np.random.default_rng(seed).permutation(len(labels)) < round(accuracy * len(labels))
    return np.where(right, labels, (labels + 1) % (labels.max() + 1))


def test_the_ensemble_is_a_mean_that_sums_to_one_in_any_order() -> None:
    p = probabilities()
    assert np.allclose(ume(p), p.mean(0)) and np.allclose(ume(p).sum(1), 1)
    assert np.allclose(ume(p[[2, 0, 1]]), ume(p)) and np.allclose(ume(p[:1]), p[0])
    assert np.allclose(ume(p, logits=True).sum(1), 1) and np.allclose(ume(p[:1], logits=True), p[0])
    product = p.prod(0) ** (1 / 3)
    assert np.allclose(ume(p, logits=True), product / product.sum(1, keepdims=True))
    assert np.allclose(ume(p, weights=(0.5, 0.5, 0)), p[:2].mean(0))


@pytest.mark.parametrize("logits", [False, True])
def test_a_missing_modality_is_left_out_of_its_rows(logits: bool) -> None:
    p, present = probabilities(), np.ones((3, 9), dtype=bool)
    present[1, 4] = present[0, 5] = present[2, 5] = False
    p[1, 4] = 0  # what was never computed
    found = ume(p, present, logits=logits)
    assert np.allclose(found[4], ume(p[[0, 2]], logits=logits)[4]) and np.allclose(found[5], p[1, 5])
    assert np.allclose(found[0], ume(p, logits=logits)[0])
    present[1, 5] = False
    with pytest.raises(ValueError, match="1 of 9 rows have no modality"):
        ume(p, present, logits=logits)


def decided(rule: str, probe: float, ume: float, umt: float | None = None, alone: tuple[float, ...] = (0.6, 0.7), **more: object):
    unimodal = [answers(accuracy, seed=place + 5) for place, accuracy in enumerate(alone)]
    trained = None if umt is None else answers(umt, seed=3)
    return choose(rule, LABELS, probe=answers(probe, seed=1), ume=answers(ume, seed=2), unimodal=unimodal, umt=trained, **more)


def test_the_probe_chooses_by_its_gap() -> None:
    better, worse = decided("probe", 0.9, 0.8), decided("probe", 0.8, 0.9)
    assert (better.method, worse.method) == ("umt", "ume") and better.gap == pytest.approx(0.1) == -worse.gap
    assert "probe is at 90.0%" in better.reason and better.unimodal == (0.6, 0.7)
    assert decided("probe", 0.8, 0.8).method == "ume"  # a tie: the ensemble is there already
    assert decided("probe", 0.81, 0.8).method == "umt"
    assert decided("probe", 0.81, 0.8, delta="error").method == "ume"  # within one standard error
    assert decided("probe", 0.85, 0.8, delta=0.06).method == "ume"


def test_validation_chooses_the_better_and_the_ensemble_where_they_tie() -> None:
    assert decided("val", 0.8, 0.8, umt=0.9).method == "umt"
    assert decided("val", 0.9, 0.8, umt=0.8).method == "ume"
    both = decided("both", 0.9, 0.8, umt=0.7)
    assert both.method == "ume" and "disagree, validation decides" in both.reason
    assert "agree" in decided("both", 0.9, 0.8, umt=0.85).reason


def test_models_at_chance_overrule_the_probe() -> None:
    """B-P10: labels that are an XOR of two modalities; each alone knows nothing, and neither does a linear probe."""
    label = RNG.integers(0, 2, 1000)
    blind = [RNG.integers(0, 2, 1000) for _ in range(4)]
    settled = {"probe": blind[0], "ume": blind[1], "unimodal": blind[2:]}
    found = choose("probe", label, **settled, umt=answers(0.95, label))
    assert found.method == "umt" and "the probe is not trusted" in found.reason
    with pytest.raises(ValueError, match="train the distilled model too"):
        choose("probe", label, **settled)
    with pytest.raises(ValueError, match="rule val; train the distilled model too"):
        decided("val", 0.9, 0.8)
    assert decided("probe", 0.9, 0.8, umt=0.7, alone=(0.26, 0.9)).method == "ume"  # one of them is enough


def test_the_probe_sees_what_only_two_modalities_together_tell_in_a_line() -> None:
    """The sign of a difference: each side alone is a weak hint."""
    x, y = (np.random.default_rng(seed).normal(size=(2000, 3)) for seed in (1, 2))
    label = (x[:, 0] > y[:, 0]).astype(int)
    found = probe([x[:1000], y[:1000]], label[:1000], [x[1000:], y[1000:]])
    assert (found == label[1000:]).mean() > 0.95
