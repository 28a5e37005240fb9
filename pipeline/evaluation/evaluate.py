"""Evaluates a run: embeds held-out shards with the run's own preprocessing and hands the features to the measures."""

import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import ConfigError, Strict
from pipeline.data.decode import Decoder, captions
from pipeline.data.errors import BadSample, DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.loader import batches
from pipeline.data.sources import DataConfig, SourceConfig, Sources
from pipeline.data.storage import join, read_parquet
from pipeline.distributed.checkpoint import write_durably
from pipeline.evaluation.recognition import linear_probe
from pipeline.evaluation.retrieval import examples, retrieval
from pipeline.evaluation.selection_quality import read_log, selection_quality
from pipeline.evaluation.student import classifies, measure_student
from pipeline.evaluation.zero_shot import class_features, prompts, zero_shot
from pipeline.task import MAIN
from pipeline.types import Batch

Encode = Callable[[Batch], dict[str, Tensor]]


class EvaluationConfig(Strict):
    """What a run is evaluated on."""

    data: str | None = Field(None, description="folder of held-out shards, any fsspec URL")
    classes: str = Field(
        "seen",
        description="'seen': held-out captions that training has too; 'all' held-out captions; or a file of names, one a line, for shards with .cls members",
    )
    templates: str | None = Field(None, description="file of prompts with {}, one a line; None: the bare name")
    every: int = Field(0, ge=0, description="evaluate each so many steps while training, and keep the best weights; 0: at the end only")
    batch: int = Field(256, ge=1)
    workers: int = Field(2, ge=0)
    probe: bool = True


@dataclass
class HeldOut:
    """Held-out shards, read once: which rows can be used, their captions, and what they are classified into."""

    sources: Sources
    rows: np.ndarray  # int64 [n], samples whose text is fine
    captions: list[list[str]]  # per row
    names: list[str]  # class names
    labels: np.ndarray  # int64 [n], -1: of no class

    @classmethod
    def open(cls, config: EvaluationConfig, cache: DataConfig, seen: Callable[[], set[str]]) -> "HeldOut":
        """Reads texts and labels. Raises ConfigError, DataError."""
        data = cache.model_copy(update={"sources": [SourceConfig(url=config.data)]})
        sources = Sources.open(data)
        rows, texts, targets = [], [], []
        from_file = config.classes not in ("seen", "all")
        for row in range(sources.num_samples):
            try:
                members = sources.members(row)
                texts.append(captions(members["txt"]) if "txt" in members else [])
                targets.append(int(members["cls"]) if from_file else -1)
                rows.append(row)
            except DataError:
                raise  # the storage's fault, not the sample's
            except (BadSample, ValueError, KeyError):
                del texts[len(rows) :]  # counted as unusable: rows is shorter than num_samples
        if from_file:
            names, labels = read_lines(config.classes), np.array(targets, np.int64)
            if len(labels) and labels.max() >= len(names):
                raise ConfigError(
                    f"{config.classes}: {len(names)} names, but {config.data} holds class {labels.max()}; give the file that belongs to the shards"
                )
        else:
            first = [t[0] if t else "" for t in texts]
            names = sorted({c for c in first if c} & seen() if config.classes == "seen" else {c for c in first if c})
            place = {name: i for i, name in enumerate(names)}
            labels = np.array([place.get(c, -1) for c in first], np.int64)
        return cls(sources, np.array(rows, np.int64), texts, names, labels)


def read_lines(path: str) -> list[str]:
    """The lines of a text file that hold something. Raises ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected a text file with one entry a line")
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def own_measure(towers: Mapping[str, Any]) -> Callable[..., dict] | None:
    """How a student is measured that is no pair of an image and a text tower: (run, url, *, batch, workers) -> figures; None for one that is."""
    if module := towers[MAIN].measured_by():
        return importlib.import_module(module).measure
    return measure_student if classifies(towers) else None


def measure(
    held: HeldOut, config: EvaluationConfig, decoders: dict[str, Decoder], encode: Encode, device: torch.device
) -> tuple[dict, dict]:
    """All figures of held-out data, and examples for the report. Images that cannot be decoded are left out and counted."""
    images, kept = embed_images(held, config, decoders, encode, device)
    labels, texts = torch.from_numpy(held.labels[kept]), [held.captions[i] for i in kept]
    result: dict[str, Any] = {"images": len(kept), "unusable": held.sources.num_samples - len(kept)}
    if held.names and (labels >= 0).any():
        templates = read_lines(config.templates) if config.templates else ["{}"]
        embedded = embed_texts(prompts(held.names, templates), config, decoders, encode, device)
        classes = class_features(embedded.reshape(len(held.names), len(templates), -1))
        result["zero_shot"] = zero_shot(images[labels >= 0], classes, labels[labels >= 0])
    distinct = sorted({caption for text in texts for caption in text})
    shown: list[dict] = []
    if distinct:
        place = {caption: i for i, caption in enumerate(distinct)}
        pairs = [sorted({place[c] for c in text}) for text in texts]
        features = embed_texts(distinct, config, decoders, encode, device)
        result["retrieval"] = retrieval(images, features, pairs)
        shown = examples(images, features, pairs, distinct)
        for example in shown:  # the report reads images by their row in the shards
            for image in example["images"]:
                image["row"] = int(held.rows[kept[image["row"]]])
        if config.probe:
            probed = (
                labels
                if (labels >= 0).any() and config.classes not in ("seen", "all")
                else torch.tensor([pair[0] if pair else -1 for pair in pairs])
            )
            result["linear_probe"] = linear_probe(images[probed >= 0], probed[probed >= 0])
    return result, {"retrieval": shown, "data": config.data}


def embed_images(
    held: HeldOut, config: EvaluationConfig, decoders: dict[str, Decoder], encode: Encode, device: torch.device
) -> tuple[Tensor, np.ndarray]:
    """Unit rows float32 [m, D] on the CPU, and which of held.rows they are (int64 [m])."""
    fetch = Fetch(held.sources, {"image": decoders["image"]}, seed=None)
    parts = [held.rows[i : i + config.batch] for i in range(0, len(held.rows), config.batch)]
    requests = [Rows(part, np.zeros_like(part), np.zeros_like(part)) for part in parts]
    features, valid = [], []
    for batch in batches(fetch, requests, config.workers):
        features.append(encode(batch.to(device))["image"].float().cpu()[batch.valid])
        valid.append(batch.valid)
    return torch.cat(features), np.flatnonzero(torch.cat(valid).numpy())


def embed_texts(texts: list[str], config: EvaluationConfig, decoders: dict[str, Decoder], encode: Encode, device: torch.device) -> Tensor:
    """Unit rows float32 [len(texts), D] on the CPU."""
    return torch.cat([encode(_text_batch(part, decoders).to(device))["text"].float().cpu() for part in _chunks(texts, config.batch)])


def _chunks(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _text_batch(texts: list[str], decoders: dict[str, Decoder]) -> Batch:
    ids = torch.arange(len(texts))
    return Batch(ids, ids, ids, torch.ones(len(texts), dtype=torch.bool), {"text": decoders["text"].collate(texts)})


def judge_selection(folder: Path, sources: Sources, urls: list[str], warmup_visits: int | None) -> dict | None:
    """The selection log of a run against truth.parquet beside its shards; only evaluation ever opens that file."""
    log = read_log(folder / "selection")
    if log is None:
        return None
    parts = [_truth(url, int(base)) for url, base in zip(urls, sources.bases)]
    known = [part for part in parts if part is not None]
    return selection_quality(log, pa.concat_tables(known) if known else None, warmup_visits=warmup_visits)


def _truth(url: str, base: int) -> pa.Table | None:
    try:
        table = read_parquet(join(url, "truth.parquet"), ["sample", "noisy"])
    except FileNotFoundError:
        return None
    return table.set_column(0, "sample", pa.array(table["sample"].to_numpy() + base))


def write_result(folder: Path, values: dict[str, Any]) -> None:
    """Merges into result.json, whole or not at all."""
    path = folder / "result.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(before | values, indent=1), encoding="utf-8")
    partial.replace(path)


class Periodic:
    """Evaluation while training: a line in the metrics, and `best/` with the weights of the best first figure (zero-shot, else retrieval)."""

    def __init__(self, config: Any, folder: Path, engine: Any, record: Any, sources: Sources, decoders: dict[str, Decoder]) -> None:
        self.config, self.folder, self.engine, self.record, self.decoders = config.evaluation, folder, engine, record, decoders
        self.together = engine.stage == 3  # no rank has the weights alone: all encode the same, rank 0 writes
        here = engine.comm.rank == 0 or self.together
        self.held = self.open(config, sources, decoders) if here else None

    def open(self, config: Any, sources: Sources, decoders: dict[str, Decoder]) -> Any:
        """The held-out shards. Raises ConfigError, DataError."""
        return HeldOut.open(config.evaluation, config.data, lambda: set(sources.captions()))

    def __call__(self, step: int) -> None:
        """Rank 0 evaluates; the others meet it at the next collective (in ZeRO's stage 3 they evaluate with it)."""
        if self.held is None:
            return
        began = time.perf_counter()
        figures = self.figures()
        self.record.event(
            {"step": step, "eval": figures, "eval_seconds": time.perf_counter() - began} | {f"eval/{k}": v for k, v in figures.items()}
        )
        self._keep_best(step, figures)

    def figures(self) -> dict[str, float]:
        """What is recorded; the first one decides which weights are the best."""
        result, _ = measure(self.held, self.config, self.decoders, self.engine.features, self.engine.device)
        figures = {f"zero_shot_{k}": result["zero_shot"][k] for k in ("top1", "top5")} if "zero_shot" in result else {}
        if "retrieval" in result:
            figures |= {f"{way}_r1": result["retrieval"][way]["r1"] for way in ("image_to_text", "text_to_image")}
        return figures

    def _keep_best(self, step: int, figures: dict[str, float]) -> None:
        best, name = self.folder / "best", next(iter(figures), None)
        if name is None:
            return
        first = self.engine.comm.rank == 0
        before = json.loads((best / "best.json").read_text(encoding="utf-8")) if first and (best / "best.json").is_file() else None
        better = before is None or figures[name] > before[name]
        if self.engine.comm.broadcast(better) if self.together else better:
            if first:
                best.mkdir(exist_ok=True)
            self.engine.save_weights(best / "model.safetensors.part")
            if first:
                (best / "model.safetensors.part").replace(best / "model.safetensors")
                write_durably(best / "best.json", json.dumps({"step": step} | figures))  # half of it would end every later start
