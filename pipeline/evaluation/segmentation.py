"""Segmentation: a confusion matrix over all pixels of held-out label maps, and mIoU, mean F1 and overall accuracy from it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.data.decode import Decoder
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.maps import IGNORE
from pipeline.data.sources import SourceConfig, Sources
from pipeline.evaluation.evaluate import Periodic
from pipeline.evaluation.student import forwards, whole
from pipeline.task import MAIN
from pipeline.types import Batch


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
    images, matrices = add_up(run.config.towers[MAIN], forwards(run, [url], batch=batch, workers=workers))
    return {"images": images, "segmentation": {name: scores(matrix) for name, matrix in matrices.items()}}


def add_up(tower: Any, found: Iterable[tuple[Batch, dict[str, Tensor]]]) -> tuple[int, dict[str, Tensor]]:
    """How many samples could be read, and the confusion matrix of each sensor, from batches and the features of them. Raises DataError where
    no pixel has a label."""
    images, matrices = 0, dict.fromkeys(tower.sensors, torch.zeros(tower.classes, tower.classes, dtype=torch.long))
    for rows, features in found:
        images += int(rows.valid.sum())
        for name in tower.sensors:
            matrices[name] = matrices[name] + confusion(features[f"{name}.logits"][rows.valid], rows.fields[tower.label][rows.valid]).cpu()
    if not all(matrix.sum() for matrix in matrices.values()):
        raise DataError(f"no held-out pixel has a label in the field {tower.label!r}; give shards with members {tower.label}.png or .npy")
    return images, matrices


class Watched(Periodic):
    """The mean IoU over sensors, `miou`, and that of each, `<sensor>_miou`. Costs a forward of all towers over the held-out shards."""

    def open(self, config: Any, sources: Sources, decoders: dict[str, Decoder]) -> Fetch:
        """Raises ConfigError, DataError."""
        self.tower = config.towers[MAIN]
        read = (*self.tower.sensors, self.tower.label)
        modalities = {name: config.data.modalities[name] for name in read if name in config.data.modalities}
        held = config.data.model_copy(update={"sources": [SourceConfig(url=config.evaluation.data)], "modalities": modalities})
        return Fetch(Sources.open(held), {name: decoders[name] for name in read}, seed=None)

    def figures(self) -> dict[str, float]:
        """Shares in [0, 1]."""
        rows = (rows.to(self.engine.device) for rows in whole(self.held, self.config.batch, self.config.workers))
        _, matrices = add_up(self.tower, ((batch, self.engine.features(batch)) for batch in rows))
        each = {name: scores(matrix)["miou"] for name, matrix in matrices.items()}
        return {"miou": sum(each.values()) / len(each)} | {f"{name}_miou": value for name, value in each.items()}
