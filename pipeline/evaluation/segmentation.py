"""Segmentation: a confusion matrix over all pixels of held-out label maps, and mIoU, mean F1 and overall accuracy from it."""

from typing import Any

import torch
from torch import Tensor

from pipeline.data.errors import DataError
from pipeline.data.maps import IGNORE
from pipeline.evaluation.student import forwards
from pipeline.task import MAIN


def confusion(logits: Tensor, label: Tensor) -> Tensor:
    """int64 [classes, classes]: how many pixels of class i (row) were named j. `logits` [n, classes, h, w], `label` [n, h, w]; 255 has no
    label and counts nowhere. Raises ValueError for logits that are not finite."""
    classes = logits.shape[1]
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite; the weights or the inputs are broken")
    known = label != IGNORE
    pairs = label[known].long() * classes + logits.argmax(1)[known]
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores(matrix: Tensor) -> dict[str, Any]:
    """Of a confusion matrix, shares in [0, 1]: `miou` and `mf1`, the means over the classes that occur or are named; `oa`, the share of
    pixels named right; `iou`, by class, None for one that neither occurs nor is named; `pixels`. Raises ValueError without a label."""
    matrix = matrix.double()
    if not matrix.sum():
        raise ValueError("no pixel has a label; segmentation is measured on shards that hold label maps")
    right, named, there = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    found = (named + there) > 0
    iou, f1 = right / (named + there - right).clamp_min(1), 2 * right / (named + there).clamp_min(1)
    return {
        "miou": float(iou[found].mean()),
        "mf1": float(f1[found].mean()),
        "oa": float(right.sum() / matrix.sum()),
        "iou": [float(value) if there else None for value, there in zip(iou, found)],
        "pixels": int(matrix.sum()),
    }


def measure(run: Any, url: str, *, batch: int = 64, workers: int = 2) -> dict[str, Any]:
    """Figures of every sensor of the student on held-out shards, `segmentation: {<sensor>: scores}`. `run`: a pipeline.run.TrainedRun.
    Raises ConfigError, DataError."""
    tower = run.config.towers[MAIN]
    matrices: dict[str, Tensor] = {}
    images = 0
    for rows, found in forwards(run, [url], batch=batch, workers=workers):
        images += int(rows.valid.sum())
        for name in tower.sensors:
            one = confusion(found[f"{name}.logits"][rows.valid], rows.fields[tower.label][rows.valid])
            matrices[name] = matrices.get(name, 0) + one.cpu()
    if not all(matrix.sum() for matrix in matrices.values()):
        raise DataError(
            f"{url}: no pixel has a label in the field {tower.label!r}; give held-out shards with members {tower.label}.png or .npy"
        )
    return {"images": images, "segmentation": {name: scores(matrix) for name, matrix in matrices.items()}}
