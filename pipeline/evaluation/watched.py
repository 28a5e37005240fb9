"""What evaluates which student while it trains; and of one that classifies its accuracy on held-out shards, and whether the teacher beside it
goes weak."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.decode import Decoder
from pipeline.data.fetch import Fetch
from pipeline.data.sources import DataConfig, ModalityConfig, SourceConfig, Sources
from pipeline.evaluation.evaluate import Periodic
from pipeline.evaluation.recognition import linear_probe, recognition
from pipeline.evaluation.student import classifies, whole
from pipeline.task import MAIN
from pipeline.towers.base import TowerConfig
from pipeline.types import Batch


def watcher(towers: dict[str, TowerConfig]) -> type[Periodic]:
    """What `evaluation.every` does with this student. Raises ConfigError for one that is evaluated at the end alone."""
    if module := towers[MAIN].measured_by():
        if own := getattr(importlib.import_module(module), "Watched", None):
            return own
        raise ConfigError(
            f"evaluation.every: {towers[MAIN].name} is evaluated at the end, by python -m pipeline evaluate: {module} has no class Watched; "
            f"set it to 0"
        )
    return PeriodicStudent if classifies(towers) else Periodic


def auxiliary_fields(towers: dict[str, TowerConfig]) -> dict[str, tuple[str, ...]]:
    """Of each tower that sees what the student sees and more (AMID's teacher): the fields that the student does not see."""
    mine = set(towers[MAIN].reads())
    more = {
        name: tuple(field for field in tower.reads() if field not in mine) for name, tower in towers.items() if mine & set(tower.reads())
    }
    return {name: fields for name, fields in more.items() if fields}


class PeriodicStudent(Periodic):
    """The student's `accuracy` and `macro_f1`, and for each tower that sees more `<tower>_auxiliary_probe`: the accuracy of a linear probe on
    what it makes of the auxiliary modalities alone, fitted on one half of the held-out rows and scored on the other (linear_probe).

    A teacher that only has to agree with the student may forget what the student cannot see; then this falls while everything else rises.
    Held-out shards without the auxiliary modalities give no probe. Costs two forwards of all towers over the held-out shards.
    """

    def open(self, config: Any, sources: Sources, decoders: dict[str, Decoder]) -> Fetch:
        """Raises ConfigError, DataError."""
        if config.data.classes is None:
            raise ConfigError("evaluation.every: a student that classifies is evaluated against labels; name data.classes")
        self.mine, self.more = config.towers[MAIN].reads(), auxiliary_fields(config.towers)
        data: DataConfig = config.data
        seen = [*self.mine, *(field for fields in self.more.values() for field in fields)]
        modalities = {name: data.modalities[name] for name in self.mine if name in data.modalities}
        for name in seen[len(self.mine) :]:
            modalities[name] = data.modalities.get(name, ModalityConfig()).model_copy(update={"optional": True})
        held = data.model_copy(update={"sources": [SourceConfig(url=config.evaluation.data)], "modalities": modalities})
        return Fetch(Sources.open(held), {name: decoders[name] for name in seen}, seed=None)

    def figures(self) -> dict[str, float]:
        """Shares in [0, 1]."""
        found: dict[str, list[Tensor]] = {}
        for batch in self._batches():
            label = batch.fields["label"].masked_fill(~batch.valid, -1)
            logits = self._features(batch, self.mine)["logits"]
            told = {"logits": logits, "label": label}
            for name, fields in self.more.items():
                there = torch.stack([batch.fields[f"{field}.present"] for field in fields]).any(0)
                told |= {name: self._features(batch, fields)[f"{name}.embedding"], f"{name}.label": label.masked_fill(~there, -1)}
            for key, value in told.items():
                found.setdefault(key, []).append(value.cpu())
        whole = {key: torch.cat(values) for key, values in found.items()}
        right = recognition(whole["logits"], whole["label"])
        figures = {"accuracy": right["accuracy"], "macro_f1": right["macro_f1"]}
        for name in self.more:
            known = whole[f"{name}.label"] >= 0
            probed = linear_probe(whole[name][known], whole[f"{name}.label"][known]) if known.any() else None
            figures |= {f"{name}_auxiliary_probe": probed["top1"]} if probed else {}
        return figures

    def _batches(self) -> Iterator[Batch]:
        return (batch.to(self.engine.device) for batch in whole(self.held, self.config.batch, self.config.workers))

    def _features(self, batch: Batch, fields: tuple[str, ...]) -> dict[str, Tensor]:
        """What all towers make of some fields alone."""
        given = {name: value for name, value in batch.fields.items() if name.removesuffix(".present") in fields}
        return self.engine.features(replace(batch, fields=given))
