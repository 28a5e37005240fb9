"""Zero-shot classification: an image is given the class whose text is nearest."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.retrieval import ranks, unit


def prompts(names: Sequence[str], templates: Sequence[str] = ("{}",)) -> list[str]:
    """Every class name in every template, classes outside: C x T texts, to be embedded and reshaped to [C, T, D].

    A name is put in by replacement, never by formatting: it may hold braces. Raises ValueError for a template without `{}`.
    """
    blind = [template for template in templates if "{}" not in template]
    if blind or not templates:
        raise ValueError(f"a template needs {{}} where the class name goes; found {blind or 'no template at all'}")
    return [template.replace("{}", name) for name in names for template in templates]


def class_features(features: Tensor) -> Tensor:
    """One unit row per class from float [C, T, D]: each template normalised, their mean normalised again (Radford et al. 2021,
    section 3.1.4). Returns float32 [C, D]. Raises ValueError when a value is not finite."""
    classes, templates, width = features.shape
    return unit(unit(features.reshape(classes * templates, width)).reshape(classes, templates, width).mean(1))


def zero_shot(images: Tensor, classes: Tensor, labels: Tensor, *, resamples: int = 1000, seed: int = 0) -> dict:
    """Top-1 and top-5 accuracy of the nearest class text.

    `images` float [n, D], `classes` float [C, D] (any norm), `labels` int64 [n] in [0, C). Equal scores are read against the model,
    so collapsed features score 0 (or 1 where 5 >= C), never by the luck of the order.

    Returns shares in [0, 1]: `top1`, `top5`, their `top1_error` and `top5_error` (bootstrap standard errors), `chance` = 1/C,
    `chance_top5`, `majority` (the share of the commonest label: what a constant answer can reach at best), and the counts `classes` C,
    `classes_present`, `images` n. The bootstrap draws classes, not images: images of one class are often drawings of one thing, and
    drawing them one by one would call the error smaller than it is. Raises ValueError for no images, labels outside of [0, C),
    or features that are not finite.
    """
    count, total = images.shape[0], classes.shape[0]
    labels = labels.cpu()
    if count == 0 or labels.shape != (count,):
        raise ValueError(f"zero-shot needs images and one label each; found {count} images and labels of shape {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= total:
        raise ValueError(f"labels must be in [0, {total}), found {int(labels.min())} to {int(labels.max())}")
    before = ranks(images, classes, torch.stack([torch.arange(count), labels], 1)).cpu()
    sizes = np.bincount(labels.numpy(), minlength=total)
    result: dict = {}
    for k in (1, 5):
        hits = (before < k).double()
        result[f"top{k}"] = hits.mean().item()
        by_class = np.bincount(labels.numpy(), weights=hits.numpy(), minlength=total)
        result[f"top{k}_error"] = _bootstrap_error(by_class[sizes > 0], sizes[sizes > 0], resamples, seed)
    return result | {
        "chance": 1 / total,
        "chance_top5": min(5, total) / total,
        "majority": float(sizes.max() / count),
        "classes": total,
        "classes_present": int((sizes > 0).sum()),
        "images": count,
    }


def _bootstrap_error(hits: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> float:
    """Standard deviation of sum(hits)/sum(sizes) over resampled classes; [resamples, C] weights, 2.4 MB at C = 300."""
    if len(sizes) < 2 or resamples < 2:
        return 0.0
    draws = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
    return float(np.std((draws @ hits) / (draws @ sizes), ddof=1))
