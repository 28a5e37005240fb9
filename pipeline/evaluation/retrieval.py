"""Retrieval in both directions, scored by caption: several images may share one caption, and one image may have several."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KS = (1, 5, 10)
_TIE = 1e-6  # cosines closer than float32 rounding of a dot product are one score: a matmul gives equal columns slightly different values
_BLOCK_ELEMENTS = 1 << 24  # 64 MiB of float32 scores at a time, whatever n and m are


def retrieval(images: Tensor, texts: Tensor, image_text: Sequence[Sequence[int]], *, ks: Sequence[int] = KS) -> dict:
    """Recall at k from image to text and from text to image.

    `images` float [n, D] and `texts` float [m, D] are features of any norm; `texts` holds each distinct caption once and
    `image_text[i]` the rows of the captions of image i. A query hits when any of its right answers is among the k first. Equal scores
    are read against the model: a wrong answer comes before a right one of the same cosine (to 1e-6), so features that have collapsed
    to a point hit only where k exceeds the number of wrong answers. Images without caption and captions without image ask nothing
    and stay as wrong answers.

    Returns shares in [0, 1]: `image_to_text` and `text_to_image`, each `{"r1", "r5", "r10", "queries", "chance"}` with
    `chance` the same recalls of a random order; `images` n, `texts` m. Raises ValueError for features that are not finite or
    rows that do not exist. Costs n x m x D multiplications a direction and 64 MiB.
    """
    _same_width(images, texts)
    if len(image_text) != images.shape[0]:
        raise ValueError(f"image_text lists {len(image_text)} images, the features hold {images.shape[0]}; they must be the same images")
    right = torch.tensor(sorted({(i, t) for i, row in enumerate(image_text) for t in row}), dtype=torch.int64).reshape(-1, 2)
    return {
        "image_to_text": _recalls(images, texts, right, ks),
        "text_to_image": _recalls(texts, images, right.flip(1), ks),
        "images": images.shape[0],
        "texts": texts.shape[0],
    }


def class_retrieval(
    queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, *, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Recall at k of a row of the same class, by cosine; held-out queries against a gallery of training rows, whose labels need not have
    been trained on (the protocol of video retrieval: Xia et al., Robust Cross-modal KD, 2023).

    `queries` float [n, D], `gallery` float [m, D], labels int64 [n] and [m]; rows below 0 are left out. Returns `r1`, `r5`, `r10` in [0, 1],
    `map` (mean average precision over the whole gallery) and `queries`, `gallery`. Raises ValueError for features that are not finite or an empty side.
    """
    asked, there = query_labels >= 0, gallery_labels >= 0
    if not asked.any() or not there.any():
        raise ValueError("no labelled query, or no labelled row in the gallery; retrieval by class needs labels on both sides")
    scores = unit(queries[asked]) @ unit(gallery[there]).T
    right = query_labels[asked][:, None] == gallery_labels[there][None]
    # equal scores are read against the model, as in `ranks`: of rows that score the same the wrong ones come first
    order = (scores / _TIE).round().mul(2).sub(right.float()).double().argsort(1, descending=True)
    hits = right.gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    average = (precision * hits).sum(1) / hits.sum(1).clamp_min(1)
    found = {f"r{k}": hits[:, :k].amax(1).mean().item() for k in ks}
    return found | {"map": average.mean().item(), "queries": int(asked.sum()), "gallery": int(there.sum())}


def ranks(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates come before each query's best right one, ties counted as before it.

    `queries` float [q, D], `candidates` float [m, D], `right` int64 [p, 2] of distinct (query, candidate) pairs in any order. Returns
    int64 [q]; m for a query without a right answer. Raises ValueError for features that are not finite or pairs out of range.
    """
    _same_width(queries, candidates)
    count, total = queries.shape[0], candidates.shape[0]
    queries, candidates = unit(queries), unit(candidates)
    right = right.to(queries.device)
    if right.numel() and (right.min() < 0 or right[:, 0].max() >= count or right[:, 1].max() >= total):
        raise ValueError(f"right answers must lie in {count} queries x {total} candidates; found up to {right.max(0).values.tolist()}")
    right = right[right[:, 0].argsort(stable=True)]
    before = torch.full((count,), total, dtype=torch.int64, device=queries.device)
    block = max(1, _BLOCK_ELEMENTS // max(total, 1))
    for start in range(0, count, block):
        scores = queries[start : start + block] @ candidates.T
        first, last = torch.searchsorted(right[:, 0].contiguous(), torch.tensor([start, start + block], device=right.device)).tolist()
        row, column = right[first:last, 0] - start, right[first:last, 1]
        best = torch.full((scores.shape[0],), -torch.inf, device=scores.device).scatter_reduce_(0, row, scores[row, column], "amax")
        scores[row, column] = -torch.inf
        asked = best > -torch.inf
        before[start : start + block][asked] = (scores >= best[:, None] - _TIE).sum(1)[asked]
    return before


def examples(
    images: Tensor,
    texts: Tensor,
    image_text: Sequence[Sequence[int]],
    captions: Sequence[str],
    *,
    count: int = 8,
    k: int = 5,
    seed: int = 0,
) -> list[dict]:
    """`count` captions drawn at random (seeded, never by how well they do) among those with an image, each with its k best images.

    Shapes as in `retrieval`; `captions[t]` is the text of row t. Returns what `evaluation/examples.json` holds under "retrieval":
    `{"caption": str, "images": [{"row": int, "right": bool, "caption": str, "score": float}]}` with score = 100 cos; of images of
    equal score the wrong one comes first.
    """
    owners: dict[int, set[int]] = {}
    for image, row in enumerate(image_text):
        for text in row:
            owners.setdefault(text, set()).add(image)
    asked = sorted(owners)
    drawn = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = [asked[i] for i in drawn]
    scores = (unit(texts[torch.tensor(chosen, dtype=torch.int64, device=texts.device)]) @ unit(images).T).cpu()
    found = []
    for text, row in zip(chosen, scores):
        mine = owners[text]
        near = torch.topk(row, min(k + len(mine), row.shape[0])).indices.tolist()
        order = sorted(near, key=lambda i: (-round(row[i].item() / _TIE), i in mine, i))[:k]
        shown = [
            {"row": i, "right": i in mine, "caption": captions[image_text[i][0]] if image_text[i] else "", "score": 100 * row[i].item()}
            for i in order
        ]
        found.append({"caption": captions[text], "images": shown})
    return found


def unit(features: Tensor) -> Tensor:
    """Rows of norm 1 in float32 [n, D] (a row of zeros stays zero). Raises ValueError when a value is not finite."""
    features = features.detach().float()
    bad = int((~torch.isfinite(features)).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {features.shape[0]} feature rows are not finite; the weights or the inputs are broken")
    return F.normalize(features, dim=1)


def _recalls(queries: Tensor, candidates: Tensor, right: Tensor, ks: Sequence[int]) -> dict:
    answers = torch.bincount(right[:, 0], minlength=queries.shape[0])
    asked = answers > 0
    if not asked.any():
        raise ValueError("no query has a right answer: retrieval needs images with captions")
    before = ranks(queries, candidates, right).cpu()[asked]
    result: dict = {f"r{k}": (before < k).double().mean().item() for k in ks}
    result["queries"] = int(asked.sum())
    result["chance"] = {f"r{k}": _chance(answers[asked], candidates.shape[0], k) for k in ks}
    return result


def _chance(answers: Tensor, total: int, k: int) -> float:
    """Mean over queries of P(a right answer among the k first of a random order): 1 - C(total - a, k) / C(total, k)."""
    missed = torch.ones(answers.shape[0], dtype=torch.float64)
    for drawn in range(min(k, total)):
        missed *= ((total - answers - drawn).clamp(min=0) / (total - drawn)).double()
    return (1 - missed).mean().item()


def _same_width(left: Tensor, right: Tensor) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(f"features must be [n, D] and [m, D] with one D; found {list(left.shape)} and {list(right.shape)}")
