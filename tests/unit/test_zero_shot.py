"""Zero-shot: hand-computed accuracy, templates, invariance, collapse, and an error bar that knows that classes repeat."""

import pytest
import torch

from pipeline.evaluation.zero_shot import class_features, prompts, zero_shot


def test_hand_computed_accuracy():
    classes = torch.eye(6)
    images = torch.tensor([[9, 1, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1.0], [6, 5, 4, 3, 2, 1.0], [0, 0, 0, 0, 1, 2.0]])
    result = zero_shot(images, classes, torch.tensor([0, 4, 5, 5]))
    assert (result["top1"], result["top5"]) == (0.5, 0.75)  # right: 0 and 3; row 1 has its class fifth, row 2 sixth
    assert result["chance"] == pytest.approx(1 / 6) and result["chance_top5"] == pytest.approx(5 / 6)
    assert result["majority"] == 0.5
    assert (result["classes"], result["classes_present"], result["images"]) == (6, 3, 4)


def test_collapsed_features_score_nothing():
    for width in (5, 64):
        images, classes = torch.ones(60, width) / 7, torch.ones(30, width) * 3
        result = zero_shot(images, classes, torch.arange(60) % 30)
        assert result["top1"] == 0 and result["top5"] == 0
    zeros = zero_shot(torch.zeros(4, 3), torch.zeros(8, 3), torch.arange(4))
    assert zeros["top1"] == 0


def test_images_collapsed_to_one_class_score_the_share_of_that_class():
    classes = torch.eye(10)
    labels = torch.tensor([3] * 4 + [1, 2, 5, 6, 7, 8])
    assert zero_shot(classes[3].expand(10, -1), classes, labels)["top1"] == 0.4
    assert zero_shot(classes[3].expand(10, -1), classes, labels)["majority"] == 0.4


def test_random_features_score_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 50
    result = zero_shot(torch.randn(4000, 24, generator=generator), torch.randn(50, 24, generator=generator), labels)
    assert abs(result["top1"] - result["chance"]) < 4 * result["top1_error"]
    assert abs(result["top5"] - result["chance_top5"]) < 4 * result["top5_error"]


def test_order_norms_and_renamed_classes_change_nothing():
    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(20, 12, generator=generator)
    labels = torch.randint(20, (300,), generator=generator)
    images = classes[labels] + 1.5 * torch.randn(300, 12, generator=generator)
    result = zero_shot(images, classes, labels)
    assert 0.3 < result["top1"] < 0.95
    order, names = torch.randperm(300, generator=generator), torch.randperm(20, generator=generator)
    moved = zero_shot(images[order] * 5, classes[names] * 0.1, torch.argsort(names)[labels[order]])
    for key in ("top1", "top5", "majority"):
        assert moved[key] == result[key]
    assert moved["top1_error"] == pytest.approx(result["top1_error"], rel=0.2)


def test_error_bar_grows_when_the_images_of_a_class_are_one_drawing():
    generator = torch.Generator().manual_seed(2)
    classes = torch.randn(100, 16, generator=generator)
    one_each = classes + 1.2 * torch.randn(100, 16, generator=generator)
    labels = torch.arange(100)
    single = zero_shot(one_each, classes, labels)
    copies = zero_shot(one_each.repeat(9, 1), classes, labels.repeat(9))
    assert single["top1"] == copies["top1"]
    p = single["top1"]
    assert single["top1_error"] == pytest.approx((p * (1 - p) / 100) ** 0.5, rel=0.15)
    assert copies["top1_error"] == pytest.approx(single["top1_error"], rel=0.15)  # nine copies tell nothing new
    assert zero_shot(one_each, classes, labels) == single


def test_error_bar_draws_classes_evenly():
    """Two classes, one image hit and nine missed: 1, .1, .1, 0 with equal chance, whose standard deviation is .406."""
    labels = torch.tensor([0] + [1] * 9)
    result = zero_shot(torch.eye(2)[0].expand(10, -1), torch.eye(2), labels, resamples=20_000)
    assert result["top1"] == pytest.approx(0.1)
    assert result["top1_error"] == pytest.approx(0.165**0.5, abs=0.01)


def test_templates_are_normalised_averaged_and_normalised():
    features = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 7.0]]])
    half = 0.5**0.5
    torch.testing.assert_close(class_features(features), torch.tensor([[half, half], [0.0, 1.0]]))


def test_prompts_put_names_in_literally():
    assert prompts(["cat {0}", "dog"], ["{}", "a drawing of {}."]) == ["cat {0}", "a drawing of cat {0}.", "dog", "a drawing of dog."]
    with pytest.raises(ValueError, match="a drawing"):
        prompts(["cat"], ["a drawing"])
    with pytest.raises(ValueError, match="no template"):
        prompts(["cat"], [])


def test_what_cannot_be_scored_is_refused():
    images, classes = torch.randn(4, 3), torch.randn(5, 3)
    for labels in (torch.tensor([0, 1, 2, 5]), torch.tensor([-1, 1, 2, 3])):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 5\)"):
            zero_shot(images, classes, labels)
    with pytest.raises(ValueError, match="needs images"):
        zero_shot(images[:0], classes, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        zero_shot(images * torch.nan, classes, torch.zeros(4, dtype=torch.int64))
