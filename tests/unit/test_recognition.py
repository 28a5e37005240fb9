"""Linear probe: finds what is linear, finds nothing in noise, keeps its halves apart, and says what it used."""

import pytest
import torch

from pipeline.evaluation.recognition import linear_probe


def clusters(classes: int, each: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.randn(classes, 16, generator=generator)
    return centres[labels] + spread * torch.randn(len(labels), 16, generator=generator), labels


def test_separable_classes_are_found():
    result = linear_probe(*clusters(10, 20, 0.1))
    assert result["top1"] == 1.0
    assert result["converged"]
    assert {k: result[k] for k in ("classes", "images", "train_images", "test_images", "classes_available")} == {
        "classes": 10,
        "images": 200,
        "train_images": 100,
        "test_images": 100,
        "classes_available": 10,
    }
    assert result["chance"] == result["majority"] == pytest.approx(0.1)


def test_noise_and_collapse_score_chance():
    features, labels = clusters(10, 40, 0.1)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    assert linear_probe(noise, labels)["top1"] < 0.2  # a probe that saw its test half would score near 1
    assert linear_probe(torch.ones_like(features), labels)["top1"] == pytest.approx(0.1)


def test_features_are_standardised():
    features, labels = clusters(6, 20, 1.0)
    scaled = features * torch.logspace(-4, 4, 16) + 100 * torch.arange(16)
    assert linear_probe(scaled, labels)["top1"] == pytest.approx(linear_probe(features, labels)["top1"], abs=0.05)


def test_small_classes_are_left_out_and_large_ones_capped():
    features, labels = clusters(8, 10, 0.1)
    few = torch.cat([torch.arange(70), torch.tensor([70, 71, 72])])  # class 7 keeps three images
    result = linear_probe(features[few], labels[few], max_classes=5, max_images=6)
    assert (result["classes_available"], result["classes"], result["images"]) == (7, 5, 30)
    assert linear_probe(features[few], labels[few])["images"] == 70


def test_the_largest_classes_are_used():
    features, labels = clusters(4, 12, 0.1)
    rows = torch.cat([torch.arange(0, 5), torch.arange(12, 24), torch.arange(24, 29), torch.arange(36, 48)])
    assert linear_probe(features[rows], labels[rows], max_classes=2)["images"] == 24


def test_same_seed_same_figures():
    data = clusters(12, 9, 1.5)
    assert linear_probe(*data, seed=4) == linear_probe(*data, seed=4)
    assert len({linear_probe(*data, seed=seed)["top1"] for seed in range(6)}) > 1  # the seed does decide the halves


def test_too_little_to_probe_gives_none():
    features, labels = clusters(5, 3, 0.1)
    assert linear_probe(features, labels) is None
    assert linear_probe(features[:0], labels[:0]) is None
    one, same = clusters(1, 30, 0.1)
    assert linear_probe(one, same) is None


def test_broken_features_are_refused():
    features, labels = clusters(5, 6, 0.1)
    features[3, 2] = torch.inf
    with pytest.raises(ValueError, match="1 of 30 feature rows are not finite"):
        linear_probe(features, labels)
