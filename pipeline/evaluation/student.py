"""What a student of stage 2 knows: the features of a tower over whole shards, recognition, and retrieval by class."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.loader import batches
from pipeline.data.sources import DataConfig, SourceConfig, Sources
from pipeline.evaluation.recognition import recognition
from pipeline.evaluation.retrieval import class_retrieval
from pipeline.task import MAIN
from pipeline.types import Batch


def classifies(towers: dict[str, Any]) -> bool:
    """Whether the student gives logits over the data's classes; one that embeds images and texts is measured by evaluate.measure."""
    return "logits" in towers[MAIN].gives()


def whole(fetch: Fetch, batch: int, workers: int) -> Iterator[Batch]:
    """Batches of all samples in their order."""
    every = np.arange(fetch.sources.num_samples)
    return batches(fetch, [Rows(part, part, np.zeros_like(part)) for part in np.split(every, range(batch, len(every), batch))], workers)


@torch.inference_mode()
def forwards(
    run: Any, urls: Sequence[str], *, tower: str = MAIN, batch: int = 256, workers: int = 2
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Batches of all samples of the shards in their order, and the tower's features of them, in the run's precision and on its device.
    `run`: a pipeline.run.TrainedRun.

    Only the fields that this tower reads are decoded: what else it was trained with need not be there. Raises ConfigError, DataError.
    """
    config, model = run.config.towers[tower], run.task.towers[tower]
    data: DataConfig = run.config.data
    read = {name: data.modalities[name] for name in config.reads() if name in data.modalities}
    sources = Sources.open(data.model_copy(update={"sources": [SourceConfig(url=url) for url in urls], "modalities": read}))
    fetch = Fetch(sources, config.decoders(run.folder, train=False), seed=None)
    precision = run.config.engine
    for rows in whole(fetch, batch, workers):
        rows = rows.to(run.device)
        with torch.autocast(run.device.type, precision.dtype, enabled=precision.precision != "fp32"):
            found = model(rows.fields)
        yield rows, found


def outputs(run: Any, urls: Sequence[str], *, tower: str = MAIN, batch: int = 256, workers: int = 2) -> dict[str, Tensor]:
    """Of every sample of the shards that can be decoded, in their order: the tower's features with rows (float32, on the CPU), `label`
    and `sample` int64 [n], and `<field>.present` bool [n] where a sample may lack the field. Raises ConfigError, DataError."""
    parts: dict[str, list[Tensor]] = {}
    for rows, given in forwards(run, urls, tower=tower, batch=batch, workers=workers):
        found = {name: value for name, value in given.items() if value.ndim == 2}
        found |= {name: value for name, value in rows.fields.items() if value.ndim == 1} | {"sample": rows.sample}
        for name, value in found.items():
            value = value[rows.valid].cpu()
            parts.setdefault(name, []).append(value.float() if value.is_floating_point() else value)
    return {name: torch.cat(values) for name, values in parts.items()}


def measure_student(run: Any, url: str, *, batch: int = 256, workers: int = 2) -> dict[str, Any]:
    """Figures of the student on held-out shards: `recognition`, and `class_retrieval` of the held-out embeddings in those of the training
    shards, with all labels of both. Raises ConfigError, DataError."""
    if run.config.data.classes is None:
        raise ConfigError("data.classes: a student that classifies is evaluated against labels; name the classes of the shards")
    held = outputs(run, [url], batch=batch, workers=workers)
    trained = outputs(run, [source.url for source in run.config.data.sources], batch=batch, workers=workers)
    found = {"images": len(held["label"]), "recognition": recognition(held["logits"], held["label"])}
    return found | {"class_retrieval": class_retrieval(held["embedding"], trained["embedding"], held["label"], trained["label"])}
