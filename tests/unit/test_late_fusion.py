"""Late fusion: the properties of specification D.6, the synthetic three-model task, and decisions by rules."""

import numpy as np
import pytest
from sklearn.metrics import recall_score

from pipeline.evaluation.late_fusion import (
    COMPOUNDS,
    EMOTIONS,
    Fusion,
    align,
    class_weights,
    compound,
    compound_scores,
    decide,
    masked,
    model_weights,
    rule_weights,
)

SIX = range(1, 7)  # without neutral


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def three_models(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Models that complement each other: each knows a third of the classes well and the others hardly, and calls too much by one name."""
    place = np.arange(7)
    reliability = np.stack([np.where(place % 3 == model, 2.6, 0.6) for model in range(3)])
    bias = np.stack([np.where(place == favourite, 1.2, 0.0) for favourite in (1, 3, 5)])
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 7, rows)
    logits = draw.normal(0, 1, (3, rows, 7)) + bias[:, None]
    for model in range(3):
        logits[model, np.arange(rows), labels] += reliability[model, labels]
    return softmax(logits), labels


def random_probabilities(models: int = 3, rows: int = 20, seed: int = 0) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(0, 2, (models, rows, 7)))


def mean_recall(predicted: np.ndarray, labels: np.ndarray, classes: range) -> float:
    """scikit-learn's, over the classes that occur."""
    return recall_score(labels, predicted, labels=[c for c in classes if c in labels], average="macro")


def test_columns_sum_to_one_and_a_fused_probability_lies_between_the_models() -> None:
    p, labels = three_models(200, 1)
    fitted = class_weights(p, labels, draws=50)
    assert np.allclose(fitted.classes.sum(0), 1) and fitted.classes.min() >= 0 and fitted.models.tolist() == [1, 1, 1]
    fused = fitted.fuse(p)
    assert (fused >= p.min(0) - 1e-12).all() and (fused <= p.max(0) + 1e-12).all()


def test_equal_models_and_a_single_one_are_reproduced() -> None:
    p, labels = three_models(100, 1)
    same = np.repeat(p[:1], 3, 0)
    assert np.allclose(class_weights(same, labels, draws=30).fuse(same), p[0])
    alone = class_weights(p[:1], labels, draws=30)
    assert np.allclose(alone.classes, 1) and np.array_equal(alone.fuse(p[:1]), p[0])


def test_the_search_is_seeded_includes_the_mean_and_never_falls_with_more_draws() -> None:
    p, labels = three_models(150, 1)
    scores = [class_weights(p, labels, draws=draws, classes=SIX).score for draws in (1, 2, 10, 63, 64, 65, 130, 300)]
    assert scores == sorted(scores) and scores[-1] > scores[0]
    assert scores[0] == pytest.approx(mean_recall(p.mean(0).argmax(1), labels, SIX))
    one, two, other = (class_weights(p, labels, draws=130, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.classes, two.classes) and not np.array_equal(one.classes, other.classes)
    assert one.score == pytest.approx(mean_recall(one.fuse(p).argmax(1), labels, range(7)))


@pytest.mark.parametrize("seed", range(5))
def test_class_weights_beat_the_mean_by_three_points_on_rows_they_have_not_seen(seed: int) -> None:
    (p, labels), (test, truth) = three_models(1500, 100 + seed), three_models(4000, 200 + seed)
    fitted = class_weights(p, labels, classes=SIX, draws=1500, seed=seed)
    recall, mean = (mean_recall(f.argmax(1), truth, SIX) for f in (fitted.fuse(test), test.mean(0)))
    assert recall >= mean + 0.03


def test_a_second_level_is_never_worse_where_it_was_fitted_and_knows_its_limit() -> None:
    p, labels = three_models(150, 1)
    first = class_weights(p, labels, draws=50)
    second = model_weights(p, labels, first, grid=(0.01, 0.16, 0.36))
    assert second.score >= first.score and np.array_equal(second.classes, first.classes)
    assert second.score == pytest.approx(mean_recall(second.fuse(p).argmax(1), labels, range(7)))
    assert np.allclose(second.fuse(p), (p * first.classes[:, None] * second.models[:, None, None]).sum(0))
    with pytest.raises(ValueError, match="10000000 combinations"):
        model_weights(np.repeat(p[:1], 7, 0), labels, class_weights(np.repeat(p[:1], 7, 0), labels, draws=1))


def test_the_order_of_models_and_of_classes_is_a_matter_of_names() -> None:
    p, labels = three_models(80, 1)
    fitted = class_weights(p, labels, draws=40)
    models, classes = np.array([2, 0, 1]), np.random.default_rng(0).permutation(7)
    turned = Fusion(fitted.classes[models], fitted.models[models], fitted.score)
    assert np.allclose(turned.fuse(p[models]), fitted.fuse(p))
    renamed = Fusion(fitted.classes[:, classes], fitted.models, fitted.score)
    assert np.allclose(renamed.fuse(p[:, :, classes]), fitted.fuse(p)[:, classes])
    place = np.argsort(classes)
    pairs = [(int(place[a]), int(place[b])) for a, b in COMPOUNDS]
    for rules in ((), ("mask",), ("weights",), ("mask", "weights")):
        assert np.array_equal(compound(fitted.fuse(p), rules=rules), compound(renamed.fuse(p[:, :, classes]), pairs, rules=rules))


def test_rule_1_can_be_applied_twice_and_its_ties_are_decided() -> None:
    fused = random_probabilities().mean(0)
    assert np.array_equal(masked(masked(fused)), masked(fused)) and not np.array_equal(masked(fused), fused)
    low = fused * 0.9 / fused.max() / 7
    scores, plain = compound_scores(low, mask=True), compound_scores(low)
    assert not scores.any()
    assert np.array_equal(decide(scores, plain), plain.argmax(1))  # and not class 0 everywhere
    frames = np.concatenate([fused[:3], low[3:6], fused[6:]])
    found = compound(frames, rules=("mask",), ties="previous")
    assert found[3] == found[4] == found[5] == found[2]
    assert compound(low, rules=("mask",), ties="previous")[0] == plain[0].argmax()  # there is no frame before the first


def test_rule_2_is_seven_minus_the_number_of_pairs_and_of_equal_weights_the_plain_rule() -> None:
    weights = dict(zip(EMOTIONS, rule_weights(COMPOUNDS, 7)))
    published = {"anger": 5, "disgust": 6, "fear": 5, "happiness": 6, "sadness": 4, "surprise": 2}
    assert {name: weights[name] for name in published} == published
    fused = random_probabilities().mean(0)
    assert np.allclose(compound_scores(fused, weights=np.full(7, 3.0)), compound_scores(fused) / 2)
    scores = compound_scores(fused, weights=rule_weights(COMPOUNDS, 7))
    assert np.allclose(scores[:, 0], (5 * fused[:, 3] + 2 * fused[:, 6]) / 7)


def test_a_model_that_ended_early_repeats_its_last_row() -> None:
    rows = random_probabilities(1, 3)[0]
    assert np.array_equal(align(rows, 5), rows[[0, 1, 2, 2, 2]]) and np.array_equal(align(rows, 2), rows[:2])
    with pytest.raises(ValueError, match="without a single row"):
        align(rows[:0], 5)


def test_recall_of_six_ignores_neutral_rows_but_not_neutral_answers() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])

    def score(named: list[int], classes: range | None) -> float:
        return class_weights(np.eye(7)[named][None], labels, classes=classes, draws=1).score

    assert score([3, 3, 1, 0, 2, 2], SIX) == score([0, 0, 1, 0, 2, 2], SIX) == pytest.approx((0.5 + 1) / 2)
    assert score([3, 3, 1, 0, 2, 2], None) == pytest.approx((0 + 0.5 + 1) / 3)


@pytest.mark.parametrize(
    ("p", "labels", "said"),
    [
        (np.ones((3, 7)), [0] * 3, r"\[models, rows, classes\], found \(3, 7\)"),
        (np.full((1, 2, 3), -1.0), [0, 0], "give softmax outputs, not logits"),
        (np.full((1, 2, 3), np.nan), [0, 0], "must be finite"),
        (np.ones((1, 2, 3)), [0, 3], r"labels in \[0, 3\)"),
        (np.ones((1, 2, 3)), [0], "expected 2 labels"),
    ],
)
def test_what_does_not_fit_is_refused(p: np.ndarray, labels: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        class_weights(p, np.array(labels), draws=2)
    with pytest.raises(ValueError, match="the weights are for"):
        Fusion(np.ones((2, 3)), np.ones(2), 0.0).fuse(np.ones((1, 4, 3)))
