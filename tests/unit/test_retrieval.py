"""Retrieval by caption: hand-computed ranks, several answers, ties read against the model, collapse to chance."""

import pytest
import torch

from pipeline.evaluation import retrieval as module
from pipeline.evaluation.retrieval import examples, ranks, retrieval


def angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane; the cosine of two is that of the difference of their angles."""
    radians = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_hand_computed_recalls_in_both_directions():
    # image at 0: texts at 10, 20, 90 come in this order; its caption is the second. image at 80: caption (90) is first.
    result = retrieval(angles(0, 80), angles(10, 20, 90), [[1], [2]], ks=(1, 2, 3))
    assert result["image_to_text"] | {"chance": None} == {"r1": 0.5, "r2": 1.0, "r3": 1.0, "queries": 2, "chance": None}
    # text 20 is nearest to the image at 0, text 90 to the image at 80; text 10 belongs to nobody and asks nothing
    assert result["text_to_image"]["r1"] == 1.0
    assert result["text_to_image"]["queries"] == 2
    assert (result["images"], result["texts"]) == (2, 3)


def test_any_right_answer_counts():
    images, texts = angles(0), angles(5, 50, 90)
    assert retrieval(images, texts, [[1]])["image_to_text"]["r1"] == 0
    assert retrieval(images, texts, [[2, 0]])["image_to_text"]["r1"] == 1


def test_images_that_share_a_caption_are_all_right():
    images, texts = angles(0, 4, 60), angles(3, 60)
    # by index, text 0 would have to find image 0 although image 1 is nearer; by caption either is right
    result = retrieval(images, texts, [[0], [0], [1]])
    assert result["text_to_image"]["r1"] == 1.0
    assert result["image_to_text"]["r1"] == 1.0


def test_a_wrong_answer_of_equal_score_comes_first():
    texts = angles(10, -10)  # both at the same angle from the image
    assert ranks(angles(0), texts, torch.tensor([[0, 0]])).tolist() == [1]
    assert ranks(angles(0), texts, torch.tensor([[0, 1]])).tolist() == [1]
    # a cosine that is lower by less than float32 can tell is an equal one; at 0.01 radians the difference is 5e-5
    close = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [1.0, -1e-2]])
    assert ranks(angles(0), close, torch.tensor([[0, 0]])).tolist() == [1]
    # two right answers of equal score do not stand in each other's way
    assert ranks(angles(0), texts, torch.tensor([[0, 0], [0, 1]])).tolist() == [0]


@pytest.mark.parametrize("width", [3, 64, 129])
def test_collapsed_features_score_no_more_than_chance(width):
    point = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    owners = [[i % 53] for i in range(211)]
    result = retrieval(point.expand(211, -1), point.expand(53, -1), owners)
    for direction in ("image_to_text", "text_to_image"):
        for k in ("r1", "r5", "r10"):
            assert result[direction][k] == 0


def test_random_features_score_what_chance_says():
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2000, 32, generator=generator), torch.randn(100, 32, generator=generator)
    result = retrieval(images, texts, [[i % 100] for i in range(2000)])
    assert result["image_to_text"]["chance"]["r5"] == pytest.approx(0.05)
    # 20 right images of 2,000: 1 - (1980/2000)(1979/1999)...
    assert result["text_to_image"]["chance"]["r1"] == pytest.approx(0.01)
    assert result["text_to_image"]["chance"]["r10"] == pytest.approx(0.0959, abs=2e-4)
    assert result["image_to_text"]["r5"] == pytest.approx(0.05, abs=0.02)
    assert result["text_to_image"]["r10"] == pytest.approx(0.096, abs=0.09)


def test_order_of_rows_norms_and_block_size_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    texts = torch.randn(40, 16, generator=generator)
    owners = [[i % 40, (i + 7) % 40] for i in range(150)]
    images = torch.stack([texts[row].sum(0) for row in owners]) + 2 * torch.randn(150, 16, generator=generator)
    whole = retrieval(images, texts, owners)
    assert 0.1 < whole["image_to_text"]["r1"] < 0.95
    order = torch.randperm(150, generator=generator).tolist()
    norms = torch.rand(40, 1, generator=generator) + 0.1
    assert retrieval(3 * images[order], texts * norms, [owners[i] for i in order]) == whole
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 100)
    assert retrieval(images, texts, owners) == whole


def test_no_block_is_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 64)
    rows = []
    searchsorted = torch.searchsorted

    def spy(keys, bounds):
        rows.append(int(bounds[1] - bounds[0]))
        return searchsorted(keys, bounds)

    monkeypatch.setattr(torch, "searchsorted", spy)
    ranks(torch.randn(50, 4), torch.randn(16, 4), torch.tensor([[i, i % 16] for i in range(50)]))
    assert max(rows) * 16 <= 64 and len(rows) == 13


def test_what_cannot_be_scored_is_refused():
    good = torch.randn(3, 4)
    with pytest.raises(ValueError, match="1 of 3 feature rows are not finite"):
        retrieval(torch.cat([good[:2], torch.full((1, 4), torch.nan)]), good, [[0], [1], [2]])
    with pytest.raises(ValueError, match="3 queries x 3 candidates"):
        retrieval(good, good, [[0], [1], [3]])
    with pytest.raises(ValueError, match="lists 2 images"):
        retrieval(good, good, [[0], [1]])
    with pytest.raises(ValueError, match="no query has a right answer"):
        retrieval(good, good, [[], [], []])
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[3, 5\]"):
        retrieval(good, torch.randn(3, 5), [[0], [1], [2]])


def test_examples_show_the_nearest_images_with_their_own_captions():
    shown = examples(angles(0, 30, 90), angles(1, 89), [[0], [0], [1]], ["near", "far"], count=2, k=2)
    by_caption = {entry["caption"]: entry["images"] for entry in shown}
    assert [(i["row"], i["right"]) for i in by_caption["near"]] == [(0, True), (1, True)]
    assert [(i["row"], i["right"], i["caption"]) for i in by_caption["far"]] == [(2, True, "far"), (1, False, "near")]
    assert by_caption["far"][0]["score"] == pytest.approx(100 * torch.cos(torch.deg2rad(torch.tensor(1.0))).item(), abs=1e-3)
    assert shown == examples(angles(0, 30, 90), angles(1, 89), [[0], [0], [1]], ["near", "far"], count=2, k=2)


def test_examples_of_equal_score_show_the_wrong_ones_first():
    shown = examples(angles(0, 0, 0), angles(1), [[0], [], []], ["it"], count=1, k=2)
    assert [image["right"] for image in shown[0]["images"]] == [False, False]
