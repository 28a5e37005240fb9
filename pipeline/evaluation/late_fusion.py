"""Late fusion of several models' probabilities, and compound classes from it by rules (AVCER, Ryumina et al. 2024, arXiv 2403.12687).

Weights are fitted on validation data only; nothing here reads a test label. Shapes: M models, N rows, C classes.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

EMOTIONS = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
COMPOUNDS = ((3, 6), (4, 6), (5, 6), (2, 6), (1, 6), (3, 5), (1, 5))  # the paper's order: fearfully surprised first
GRID = tuple(round(0.01 + 0.05 * step, 2) for step in range(10))
_CHUNK = 64  # candidates scored at once; _CHUNK x N x C numbers


class Fusion(NamedTuple):
    """Fitted weights; `fuse` applies them."""

    classes: np.ndarray  # float64 [M, C]; columns sum to 1 over models
    models: np.ndarray  # float64 [M], of a second level; ones: there is none
    score: float  # mean recall on the data it was fitted on

    def fuse(self, probabilities: np.ndarray) -> np.ndarray:
        """float64 [N, C] of [M, N, C]: sum over m of models_m classes_mc p_mc, not normalised again over classes. Raises ValueError."""
        p = checked(probabilities)
        if (len(p), p.shape[2]) != self.classes.shape:
            raise ValueError(f"the weights are for {self.classes.shape} models and classes, the probabilities are {p.shape} (M, N, C)")
        return np.einsum("mc,mnc->nc", self.classes * self.models[:, None], p)


def class_weights(
    probabilities: np.ndarray, labels: np.ndarray, *, classes: Sequence[int] | None = None, draws: int = 10_000, seed: int = 42
) -> Fusion:
    """The best of `draws` weight matrices by mean recall over `classes` (all by default): the first is uniform, the others have columns from
    a flat Dirichlet. The uniform one makes it no worse than the mean on these data; the first of equals wins, so more draws never score less.

    Recall is averaged over those of `classes` that occur (UAR). The paper leaves neutral out: a neutral row counts nowhere, and an emotion
    that is called neutral is missed.

    `probabilities` [M, N, C], `labels` int [N], of validation data. 10,000 draws for 3 x 1,500 x 7 take seconds. Raises ValueError.
    """
    p, members = checked(probabilities, labels), _hits_of(labels, classes if classes is not None else range(np.shape(probabilities)[2]))
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, found {draws}")
    models, _, count = p.shape
    rng = np.random.default_rng(seed)
    best, best_score = np.full((models, count), 1 / models), -1.0
    for first in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - first)
        weights = rng.dirichlet(np.ones(models), size=(size - (first == 0), count)).transpose(0, 2, 1)
        if first == 0:
            weights = np.concatenate([best[None], weights])
        scores = _score(weights, p, members)
        if scores.max() > best_score:
            best, best_score = weights[scores.argmax()].copy(), float(scores.max())
    return Fusion(best, np.ones(models), best_score)


def model_weights(
    probabilities: np.ndarray, labels: np.ndarray, fusion: Fusion, *, classes: Sequence[int] | None = None, grid: Sequence[float] = GRID
) -> Fusion:
    """A second level on top of class weights: one factor per model, the best of all combinations of `grid` (the paper's "hierarchical"
    weights). No second level is the first candidate, so the score cannot fall. Raises ValueError for more than a million combinations."""
    p, members = checked(probabilities, labels), _hits_of(labels, classes if classes is not None else range(np.shape(probabilities)[2]))
    if len(grid) ** len(p) > 1_000_000:
        raise ValueError(f"{len(grid)} values for {len(p)} models are {len(grid) ** len(p)} combinations; take a grid of fewer values")
    best, best_score = np.ones(len(p)), -1.0
    for chunk in _chunks(itertools.chain([tuple(best)], itertools.product(grid, repeat=len(p)))):
        scales = np.array(chunk)
        scores = _score(fusion.classes[None] * scales[:, :, None], p, members)
        if scores.max() > best_score:
            best, best_score = scales[scores.argmax()], float(scores.max())
    return Fusion(fusion.classes, best, best_score)


def align(rows: np.ndarray, count: int) -> np.ndarray:
    """[count, C] of [n, C]: a model that ended early (sound shorter than pictures) repeats its last row; what is beyond is cut."""
    if len(rows) == 0:
        raise ValueError("a model without a single row cannot be aligned; leave it out")
    return rows[np.minimum(np.arange(count), len(rows) - 1)]


def rule_weights(pairs: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """float64 [C] of Rule 2: the number of compound classes minus in how many of them the class is (inferred; the paper's numbers exactly)."""
    return np.array([len(pairs) - sum(c in pair for pair in pairs) for c in range(count)], dtype=np.float64)


def compound_scores(
    fused: np.ndarray,
    pairs: Sequence[tuple[int, int]] = COMPOUNDS,
    *,
    mask: bool = False,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """float64 [N, len(pairs)]: what each compound class scores. Plain: F_a + F_b.

    `mask` is Rule 1: what is not above 1/C counts as 0. `weights` [C] is Rule 2: (u_a F_a + u_b F_b) / (u_a + u_b). Both: mask first.
    """
    fused = np.asarray(fused, dtype=np.float64)
    if mask:
        fused = masked(fused)
    a, b = (np.array(side) for side in zip(*pairs))
    if weights is None:
        return fused[:, a] + fused[:, b]
    u = np.asarray(weights, dtype=np.float64)
    return (u[a] * fused[:, a] + u[b] * fused[:, b]) / (u[a] + u[b])


def masked(fused: np.ndarray) -> np.ndarray:
    """Rule 1's mask: entries not above 1/C become 0."""
    return np.where(fused > 1 / fused.shape[1], fused, 0.0)


def decide(scores: np.ndarray, plain: np.ndarray, ties: Literal["previous", "plain"] = "plain") -> np.ndarray:
    """int64 [N]: the best class of each row; where several share the best score (a row that Rule 1 has emptied) a tie rule decides.

    `previous`: the decision of the row before, if it is among the best (rows are frames of one video). `plain`, and where that fails: the
    best by the scores `plain` [N, K], made without rules; of equals the first.
    """
    best = scores == scores.max(1, keepdims=True)
    decisions = np.where(best, plain, -np.inf).argmax(1)
    if ties == "previous":
        for row in np.flatnonzero(best.sum(1) > 1):
            if row and best[row, decisions[row - 1]]:
                decisions[row] = decisions[row - 1]
    return decisions


def compound(
    fused: np.ndarray,
    pairs: Sequence[tuple[int, int]] = COMPOUNDS,
    *,
    rules: Sequence[Literal["mask", "weights"]] = (),
    ties: Literal["previous", "plain"] = "plain",
) -> np.ndarray:
    """int64 [N]: the compound class of each row of fused probabilities [N, C], without any example of such a class.

    On compounds whose two parts are equally strong both rules lower the macro-F1 of the plain sum; validate them before use.
    """
    weights = rule_weights(pairs, fused.shape[1]) if "weights" in rules else None
    return decide(compound_scores(fused, pairs, mask="mask" in rules, weights=weights), compound_scores(fused, pairs), ties)


def checked(probabilities: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """float64 [M, N, C]. Raises ValueError for other shapes, negative or non-finite numbers, or labels that do not fit."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 3 or 0 in p.shape:
        raise ValueError(f"expected probabilities [models, rows, classes], found {p.shape}")
    if not np.isfinite(p).all() or p.min() < 0:
        raise ValueError("probabilities must be finite and not negative; give softmax outputs, not logits")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (p.shape[1],) or labels.min() < 0 or labels.max() >= p.shape[2]:
            raise ValueError(f"expected {p.shape[1]} labels in [0, {p.shape[2]}), found shape {labels.shape}")
    return p


def _hits_of(labels: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N], and [N, K] whose product with hits is the mean recall's parts: 1 / (size of the class x number of classes)."""
    labels = np.asarray(labels)
    present = [c for c in classes if (labels == c).any()]
    if not present:
        raise ValueError(f"no row has one of the classes {list(classes)}")
    member = (labels[:, None] == np.array(present)).astype(np.float64)
    return labels, member / member.sum(0)


def _score(weights: np.ndarray, p: np.ndarray, members: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """[D] mean recalls of weight matrices [D, M, C]."""
    labels, member = members
    predicted = np.einsum("dmc,mnc->dnc", weights, p).argmax(2)
    return ((predicted == labels).astype(np.float64) @ member).mean(1)


def _chunks(items: Iterator[tuple[float, ...]]) -> Iterator[list[tuple[float, ...]]]:
    while chunk := list(itertools.islice(items, _CHUNK)):
        yield chunk
