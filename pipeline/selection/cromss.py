"""CromSS (Liu et al., IEEE TGRS 2025, arXiv 2405.01217): how far each pixel of a noisy label map is believed.

Pure functions of detached probabilities and no selector: objectives/noisy_segmentation.py calls them on the logits of the training forward,
so that nothing is computed twice; the run's selector is keep_all. The rules are those of the authors' public code, their entropy of a
probability of 0 aside, which is 0 here and was NaN there. Nothing here waits for the device.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def label_confidence(probability: Tensor, label: Tensor) -> Tensor:
    """The probability of the given label. float [b, K, h, w], int64 [b, h, w] in 0..K-1 -> float [b, h, w] in [0, 1]."""
    return probability.gather(1, label[:, None])[:, 0]


def prediction_confidence(probability: Tensor, kind: Literal["entropy", "gini"] = "entropy") -> Tensor:
    """How sure the prediction is, whatever the label. float [b, K, h, w] -> [b, h, w] in [0, 1]: 1 - H / ln K, 0 where it is uniform; or
    the sum of squares, 1 / K where it is uniform."""
    if kind == "gini":
        return probability.square().sum(1)
    negative_entropy = (probability * probability.clamp_min(1e-12).log()).sum(1)
    return (1 + negative_entropy / math.log(probability.shape[1])).clamp(0, 1)


def entangled(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The confidences of two sensors of one shape, each lowered by what the other doubts: (c + c c') / 2, from c / 2 to c."""
    both = own * other
    return (own + both) / 2, (other + both) / 2


def ramp(step: Tensor | float, steps: int, shape: Literal["exp", "linear"] = "exp") -> Tensor:
    """float64, how far selection has set in: exp(-5 (1 - t/T)^2), 0.0067 at the start, or t/T; 1 from step `steps` on."""
    step = torch.as_tensor(step, dtype=torch.float64)
    done = (step / steps).clamp(max=1) if steps else torch.ones_like(step)
    return torch.exp(-5 * (1 - done).square()) if shape == "exp" else done


def keep_ratio(ramped: Tensor, end: float) -> Tensor:
    """The share of each class's pixels that keep the weight 1: from about 1 down to `end`."""
    return 1 - ramped * (1 - end)


def class_balanced_mask(confidence: Tensor, label: Tensor, keep: Tensor | float, classes: int) -> Tensor:
    """Soft weights in [0, 1]: in each class the int(n keep) most confident pixels of this rank's batch have 1, the others the share of
    the last of those that they reach.

    `confidence` float [...], `label` int64 of the same shape; pixels whose label is not in 0..classes-1 have 0. A class of which no pixel
    is kept has 0, one whose last kept confidence is 0 has 1; keep = 0 gives the confidence itself. Two sorts of all pixels.
    """
    flat, of = confidence.flatten(), label.flatten()
    known = (of >= 0) & (of < classes)
    of = torch.where(known, of, classes)
    keep = torch.as_tensor(keep, dtype=torch.float64, device=flat.device)
    counts = torch.stack([(of == k).sum() for k in range(classes)])  # bincount would wait for the device
    kept = (counts * keep).long()
    best = flat.argsort(descending=True, stable=True)
    ranked = flat[best[of[best].argsort(stable=True)]]  # class after class, the most confident first
    last = ranked[(counts.cumsum(0) - counts + kept - 1).clamp(0, len(flat) - 1)]
    threshold = torch.where(kept > 0, last, torch.inf)[of.clamp_max(classes - 1)]
    mask = torch.where(threshold > 0, (flat / threshold).clamp_max(1), 1.0)
    mask = torch.where(keep > 0, mask, flat)
    return torch.where(known, mask, 0.0).reshape(confidence.shape)


def consistency_mask(confidence: Tensor, ramped: Tensor) -> Tensor:
    """The weights of a peer's predictions: 1 at first, its confidence in the end."""
    ramped = ramped.to(confidence.dtype)
    return (1 - ramped) + ramped * confidence
