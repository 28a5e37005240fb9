"""Recognition: a classifier's own answers, and a linear probe, how much of the classes a straight line finds in frozen image features."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def linear_probe(
    features: Tensor, labels: Tensor, *, min_images: int = 4, max_classes: int = 100, max_images: int = 40, seed: int = 0
) -> dict | None:
    """Logistic regression (scikit-learn, L2, C = 1) on standardised features: trained on one half, scored on the other.

    `features` float [n, D], `labels` int64 [n]. Only classes of at least `min_images` images count (4: two on either side); of those
    the `max_classes` largest are used, with at most `max_images` seeded draws each, which keeps it to seconds. The halves are stratified
    and seeded; the standardisation sees the training half only. Where a class holds several renderings of one drawing these fall on both
    sides, so the figure compares runs and is no claim about drawings never seen.

    Returns `top1` (share in [0, 1]), `majority` (what the commonest class alone would score), `chance` = 1/classes, `classes`, `images`,
    `train_images`, `test_images`, `classes_available` (before the cap), `converged`; None when fewer than two classes are large
    enough. Raises ValueError when a feature is not finite.
    """
    x, y = features.detach().float().cpu().numpy(), labels.cpu().numpy()
    bad = int((~np.isfinite(x)).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} feature rows are not finite; the weights or the inputs are broken")
    names, sizes = np.unique(y, return_counts=True)
    large = names[sizes >= min_images]
    if len(large) < 2:
        return None
    used = sorted(large, key=lambda name: (-sizes[names == name][0], name))[:max_classes]
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.sort(rng.permutation(np.flatnonzero(y == name))[:max_images]) for name in used])
    train, test = train_test_split(rows, test_size=0.5, stratify=y[rows], random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(x[train], y[train])
    _, test_sizes = np.unique(y[test], return_counts=True)
    return {
        "top1": float(probe.score(x[test], y[test])),
        "majority": float(test_sizes.max() / len(test)),
        "chance": 1 / len(used),
        "classes": len(used),
        "images": len(rows),
        "train_images": len(train),
        "test_images": len(test),
        "classes_available": len(large),
        "converged": not any(issubclass(w.category, ConvergenceWarning) for w in caught),
    }


def recognition(logits: Tensor, labels: Tensor) -> dict:
    """How often a classifier is right. `logits` float [n, C] (or probabilities), `labels` int64 [n], those below 0 are left out.

    Returns shares in [0, 1]: `accuracy`; `macro_f1`, the F1 of each class that occurs or is named, averaged; `majority`, what the commonest
    class alone would score; and `rows`, `classes` (C). Raises ValueError for features that are not finite or when no row has a label.
    """
    known = labels >= 0
    scores, wanted = logits.detach().float().cpu()[known.cpu()], labels.cpu()[known.cpu()]
    if not len(wanted):
        raise ValueError("no row has a label; recognition needs shards whose json or cls members hold classes, and data.classes")
    if bad := int((~torch.isfinite(scores)).any(1).sum()):
        raise ValueError(f"{bad} of {len(scores)} rows of logits are not finite; the weights or the inputs are broken")
    named = scores.argmax(1)
    return {
        "accuracy": float((named == wanted).float().mean()),
        "macro_f1": float(f1_score(wanted.numpy(), named.numpy(), average="macro", zero_division=0)),
        "majority": float(torch.bincount(wanted).max() / len(wanted)),
        "rows": len(wanted),
        "classes": scores.shape[1],
    }
