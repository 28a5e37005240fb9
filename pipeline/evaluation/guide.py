"""Uni-modal ensemble or uni-modal teachers? The ensemble (UME), and the strategy that chooses (Du et al., ICML 2023, arXiv 2305.01233).

A linear probe on all uni-modal features that beats the ensemble has found what only the modalities together tell: then distil (UMT). The
rule means nothing where a modality alone predicts nothing (labels that are an XOR of two modalities), so models at chance overrule it.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.evaluation.late_fusion import checked

Method = Literal["umt", "ume"]
Rule = Literal["probe", "val", "both"]


def ume(
    probabilities: np.ndarray, present: np.ndarray | None = None, weights: Sequence[float] | None = None, logits: bool = False
) -> np.ndarray:
    """float64 [N, C], rows sum to 1: the mean of [M, N, C] over modalities; nothing is trained.

    `present` bool [M, N]: a row's mean is over the modalities it has. `weights` [M] >= 0: of the modalities, equal by default.
    `logits`: the mean of log-probabilities (a product of experts) instead. Raises ValueError where a row has no modality at all.
    """
    p = checked(probabilities)
    share = np.ones(p.shape[:2]) if present is None else np.asarray(present, dtype=np.float64).copy()
    share *= np.ones((len(p), 1)) if weights is None else np.asarray(weights, dtype=np.float64)[:, None]
    total = share.sum(0)
    if (total <= 0).any():
        raise ValueError(f"{int((total <= 0).sum())} of {p.shape[1]} rows have no modality of positive weight; leave them out")
    share = (share / total)[:, :, None]
    if not logits:
        mixed = np.where(share > 0, p, 0) * share
        return mixed.sum(0) / mixed.sum((0, 2))[:, None]
    mean = (np.log(np.where(share > 0, p, 1).clip(1e-300)) * share).sum(0)
    mean = np.exp(mean - mean.max(1, keepdims=True))
    return mean / mean.sum(1, keepdims=True)


def probe(
    train: Sequence[np.ndarray], labels: np.ndarray, validation: Sequence[np.ndarray], *, epochs: int = 60, lr: float = 1e-3, seed: int = 0
) -> np.ndarray:
    """int64 [N_val]: what a linear classifier on the concatenated features of all frozen uni-modal encoders says of validation rows.

    `train` and `validation`: one [N, d_m] per modality; `labels` int [N]. Trained as the encoders' own heads are, by Adam in batches of
    64: a logistic regression that has converged leans on what the encoders have memorised of these rows, and shifts the rule (10).
    """
    x, wanted, new = (torch.from_numpy(np.concatenate(rows, 1)).float() for rows in (train, [labels[:, None]], validation))
    make, classes = torch.Generator().manual_seed(seed), int(labels.max()) + 1
    weight, bias = torch.zeros(classes, x.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=make).split(64):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(x[rows], weight, bias), wanted[rows, 0].long()).backward()
            optimizer.step()
    return F.linear(new, weight, bias).argmax(1).numpy()


class NeedsUmt(ValueError):
    """The rule wants to see a trained UMT's predictions."""


class Choice(NamedTuple):
    """What to train, and why. Accuracies are shares in [0, 1] of the validation rows."""

    method: Method
    reason: str
    gap: float  # accuracy of the probe minus accuracy of the ensemble: rule (10)
    probe: float
    ume: float
    umt: float | None
    unimodal: tuple[float, ...]
    chance: float


def choose(
    rule: Rule,
    labels: np.ndarray,
    *,
    probe: np.ndarray,
    ume: np.ndarray,
    unimodal: Sequence[np.ndarray],
    umt: np.ndarray | None = None,
    delta: float | Literal["error"] = 0.0,
) -> Choice:
    """UMT or UME from predictions int [N] on validation rows.

    `probe`: UMT where the probe beats the ensemble by more than `delta` ("error": one standard error of the paired difference). `val`: the
    better of the two on these rows, UME where they tie (SynLeaF's rule). `both`: where they disagree, `val` decides. The probe's rule is
    not trusted unless every uni-modal model beats the commonest label by two standard errors; then `val` decides. Raises NeedsUmt where
    `val` is needed and there are no predictions of a trained UMT.
    """
    labels = np.asarray(labels)
    right = {name: np.asarray(found) == labels for name, found in (("probe", probe), ("ume", ume))}
    alone = tuple(float(np.mean(np.asarray(found) == labels)) for found in unimodal)
    chance = float(np.bincount(labels).max() / len(labels))
    margin = 2 * math.sqrt(chance * (1 - chance) / len(labels))
    difference = right["probe"].astype(float) - right["ume"]
    threshold = float(difference.std(ddof=1) / math.sqrt(len(labels))) if delta == "error" else delta
    accuracy_umt = None if umt is None else float(np.mean(np.asarray(umt) == labels))
    facts = (float(difference.mean()), float(right["probe"].mean()), float(right["ume"].mean()), accuracy_umt, alone, chance)
    blind = [place for place, accuracy in enumerate(alone) if accuracy <= chance + margin]

    by_probe: Method = "umt" if facts[0] > threshold else "ume"
    said = f"the probe is at {facts[1]:.1%} and the ensemble at {facts[2]:.1%} (gap {facts[0]:+.1%}, threshold {threshold:.1%})"
    if rule == "probe" and not blind:
        return Choice(by_probe, said, *facts)
    if blind:
        said = f"uni-modal model {blind[0]} is at {alone[blind[0]]:.1%}, within two standard errors of chance ({chance:.1%}): the probe is not trusted"
    if accuracy_umt is None:
        raise NeedsUmt(f"{said if blind else f'rule {rule}'}; train the distilled model too and give its predictions as `umt`")
    by_val: Method = "umt" if accuracy_umt > facts[2] else "ume"
    against = f"validation: UMT {accuracy_umt:.1%}, UME {facts[2]:.1%}"
    if rule == "both" and not blind:
        agree = "agree" if by_probe == by_val else "disagree, validation decides"
        return Choice(by_val, f"{said}; {against}; they {agree}", *facts)
    return Choice(by_val, f"{said}; {against}" if blind else against, *facts)
