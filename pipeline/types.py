"""The nouns. N_b is the global candidate batch, R the world size, b = N_b / R the candidate rows of a rank, G the number of
selection groups, k the trained rows of a rank."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

EVERY = "*"  # among a selection's weights: those of every objective that has none of its own


@dataclass
class Batch:
    """Candidate rows of one rank; every tensor has the same first dimension b."""

    sample: Tensor  # int64 [b], global sample id
    slot: Tensor  # int64 [b], row in this rank's score table
    visit: Tensor  # int64 [b], how often the sample's lane has gone round before
    valid: Tensor  # bool [b]; False: could not be decoded; not scored, selected, recorded, nor a negative
    fields: dict[str, Tensor]  # "image", "text", "audio", "label", ...
    teacher: dict[str, Tensor] = field(default_factory=dict)  # filled by teachers; empty in stage 1
    unselected: dict[str, Tensor] | None = None  # after take(): detached scoring embeddings of the rows left out
    bad: tuple[tuple[int, str], ...] = ()  # (sample id, cause) of the rows that are not valid; for the record only
    skipped: int = 0  # samples passed over on the way to these rows; for the record only
    weight: Tensor | None = None  # float32 [b], how many samples of its visit a row stands for; None: each for itself

    def __len__(self) -> int:
        return self.sample.shape[0]

    def map(self, change: Any) -> "Batch":
        """The same batch with `change` applied to every tensor (a move to a device, a choice of rows)."""
        return replace(
            self,
            sample=change(self.sample),
            slot=change(self.slot),
            visit=change(self.visit),
            valid=change(self.valid),
            fields={name: change(value) for name, value in self.fields.items()},
            teacher={name: change(value) for name, value in self.teacher.items()},
            weight=None if self.weight is None else change(self.weight),
        )

    def take(self, rows: Tensor, features: dict[str, Tensor] | None = None, padding: Tensor | None = None) -> "Batch":
        """The rows that are trained; `rows` is int64 [k]. Those that are `padding` (bool [k]) are not valid.

        `features` of all b rows (image and text [b, D], and a bool [b] `embedded` where not all rows have them) leave those of the
        other rows in `unselected`: image, text and a bool `valid`, [b - k, ...]; all b of them where some are padding.
        """
        taken = self.map(lambda value: value[rows])
        if padding is not None:
            taken.valid = taken.valid & ~padding
        if features is None:
            return taken
        valid = self.valid & features["embedded"] if "embedded" in features else self.valid
        chosen = torch.zeros(len(self), dtype=torch.uint8, device=rows.device)
        if padding is None:
            # a choice by mask would wait for the device
            rest = chosen.index_fill_(0, rows, 1).argsort(stable=True)[: len(self) - rows.shape[0]]
        else:
            chosen.index_copy_(0, rows, (~padding).to(torch.uint8))
            rest, valid = torch.arange(len(self), device=rows.device), valid & (chosen == 0)
        left = {"image": features["image"], "text": features["text"], "valid": valid}
        return replace(taken, unselected={name: value.detach()[rest] for name, value in left.items()})

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy from pinned memory does not wait."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader when it pins."""
        return self.map(lambda value: value.pin_memory())


@dataclass
class Candidates:
    """One selection group of g rows, as a selector sees it."""

    slot: Tensor  # int64 [g], row in the score table
    cosine: Tensor | None  # float32 [g] in [-1, 1]; None when the selector asked for no scores
    keep: int  # how many rows to train
    loss: Tensor | None = None  # float32 [g], per-sample loss with negatives from the group only
    sample: Tensor | None = None  # int64 [g], global sample id; the slot stands in where it is None
    valid: Tensor | None = None  # bool [g]; all rows where it is None
    step: int = 0
    image: Tensor | None = None  # float32 [g, D], unit rows
    text: Tensor | None = None  # float32 [g, D], unit rows
    weight: Tensor | None = None  # float32 [g], see Batch.weight


@dataclass
class Selection:
    """What is trained. After `batch.take(rows)` only the weights may be read."""

    rows: Tensor  # int64 [k], ascending
    weights: dict[str, Tensor] = field(default_factory=dict)  # of the rows, [k] each, by objective, EVERY for all not named; empty: 1
    ranked_by: Tensor | None = None  # float32 [g], what the group was ranked by (largest kept); for the record only
    padding: Tensor | None = None  # bool [k]: rejected rows that only make the ranks' shapes equal; not trained. None: none
    scale: float = 1.0  # rows of all ranks, padding too, over those that are trained: what a mean over rows has to be multiplied by

    def weight(self, objective: str, valid: Tensor) -> Tensor:
        """float32 [k] >= 0: a row's weight in the mean over rows that this objective takes; 0 where `valid` (bool [k]) is False."""
        given = self.weights.get(objective, self.weights.get(EVERY))
        return (valid.float() if given is None else given.float().masked_fill(~valid, 0)) * self.scale


class StepOutput(NamedTuple):
    """What a training forward returns. Never a dataclass: ZeRO-3's hooks do not look inside one."""

    loss: Tensor
    terms: dict[str, Tensor]  # detached, still on the device
    adversary: dict[str, Tensor]  # detached features for an adversary's own step; usually empty
    cosine: Tensor | None = None  # float32 [k] of the trained rows, detached; None where the towers give no image and text of one width
    per_sample: Tensor | None = None  # float32 [k], detached, see Objective.per_sample; None unless exactly one objective tells it


class Cached(NamedTuple):
    """One piece of a batch that is trained in several (pipeline/distributed/replay.py)."""

    rows: slice  # of the batch: the piece that is embedded
    features: dict[str, Tensor]  # of the whole batch, detached
    gradients: dict[str, Tensor] | None  # of the loss by the whole batch's features; None: compute the loss
    before_loss: Callable[[], None]  # sets the generators as they were when the gradients were made
