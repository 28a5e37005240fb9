"""Segmentation from noisy label maps with two sensors (CromSS, arXiv 2405.01217): cross-entropy and Dice on smoothed labels under masks of
selection/cromss.py, and each sensor follows the other's detached prediction. With one sensor, and everything else off, plain segmentation."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.maps import IGNORE
from pipeline.distributed.comm import Comm
from pipeline.objectives._rows import feature, labels_of, weight_of
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.selection import cromss
from pipeline.types import Batch, Selection

NAME = "noisy_segmentation"


class Config(ObjectiveConfig):
    """The defaults are the paper's. `select: false`, `alpha: 0`, `beta: 0`, `consistency: 0` leave plain cross-entropy and Dice."""

    first: str = Field("s1.logits", description="logits of a sensor, [b, classes, h, w]")
    second: str | None = Field("s2.logits", description="logits of another one; null: one sensor alone, without consistency")
    label: str = Field("segmentation", description="the batch field with label maps, [b, h, w]; 255: no label, counts nowhere")
    prior: str | None = Field("prior", description="the batch field with class shares around each pixel, uint8 [b, classes, h, w]")
    select: bool = Field(True, description="soft masks by confidence; false: every labelled pixel weighs 1")
    entangle: bool = Field(True, description="a sensor's confidence is lowered by the other's doubt")
    confidence: Literal["entropy", "gini"] = Field("entropy", description="of a prediction that the other sensor follows")
    ramp: Literal["exp", "linear"] = "exp"
    ramp_steps: int = Field(0, ge=0, description="optimizer steps until selection has set in fully; 0: from the start")
    keep: float = Field(0.5, ge=0, le=1, description="share of each class's pixels that weighs 1 after the ramp")
    alpha: float = Field(0.15, ge=0, le=1, description="share of the prior in the target")
    beta: float = Field(0.05, ge=0, le=1, description="share of the uniform distribution in the target")
    consistency: float = Field(1.0, ge=0, description="weight of following the other sensor")

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        if self.alpha + self.beta > 1:
            raise ValueError(f"alpha {self.alpha:g} + beta {self.beta:g}: are shares of the target, at most 1 together")
        if self.alpha and self.prior is None:
            raise ValueError("alpha: smooths with the prior; name its field, or set alpha to 0")
        return self

    def reads(self) -> tuple[str, ...]:
        return (self.first, *([self.second] if self.second else []))

    def fields(self) -> tuple[str, ...]:
        return (self.label, *([self.prior] if self.alpha else []))

    def build(self) -> "NoisySegmentation":
        return NoisySegmentation(self)


class NoisySegmentation(Objective):
    """The losses are normalised over all ranks; the thresholds of the masks are of each rank's own pixels, as in the authors' code."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))  # of the optimizer; in the checkpoint, so that a ramp goes on

    def after_step(self) -> None:
        self.step += 1

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        weight = weight_of(NAME, batch, selection)
        logits = [feature(NAME, features, batch, name, weight) for name in c.reads()]
        label, known = self._labels(labels_of(NAME, batch, c.label), logits, weight)
        probability = [z.detach().softmax(1) for z in logits]
        believed, sure = self._masks(probability, label, known)
        rows = (weight.to(logits[0].dtype)[:, None, None] * known).to(logits[0].dtype)
        target = self._target(batch, label, known, logits[0])
        loss = sum(supervised(z, target, mask * rows, comm) for z, mask in zip(logits, believed))
        if len(logits) == 2 and c.consistency:
            agree = follow(logits[0], probability[1], sure[1] * rows, comm) + follow(logits[1], probability[0], sure[0] * rows, comm)
            loss = loss + c.consistency * agree
        self.telemetry = self._telemetry(probability, label, known, believed, comm)
        return loss

    def _labels(self, label: Tensor, logits: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b, h, w] with 0 where there is no label, and bool [b, h, w] where there is one in a row that counts. Raises ConfigError."""
        c, classes = self.config, logits[0].shape[1]
        shapes = [list(z.shape) for z in logits]
        expected = [len(label), classes, *label.shape[1:]]
        if any(shape != expected for shape in shapes):
            raise ConfigError(f"{NAME}: {', '.join(c.reads())} have shapes {shapes}, the label maps in {c.label!r} need {expected}")
        known = (label >= 0) & (label != IGNORE)
        if label.device.type == "cpu" and bool((known & (label >= classes)).any()):
            raise ConfigError(f"{NAME}: {c.label!r} holds class {int(label[known].max())}, but {c.first} has {classes} classes")
        known &= (weight > 0)[:, None, None]
        return label.masked_fill(~known, 0), known

    def _masks(self, probability: list[Tensor], label: Tensor, known: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of each sensor the weights of the labels, and of its predictions where the other one follows them; [b, h, w] in [0, 1]."""
        c = self.config
        if not c.select:
            every = [torch.ones_like(p[:, 0]) for p in probability]
            return every, every
        of_label = [cromss.label_confidence(p, label) for p in probability]
        of_itself = [cromss.prediction_confidence(p, c.confidence) for p in probability]
        if c.entangle and len(probability) == 2:
            of_label, of_itself = (list(cromss.entangled(*pair)) for pair in (of_label, of_itself))
        ramped = cromss.ramp(self.step[0], c.ramp_steps, c.ramp)
        keep, classes, given = cromss.keep_ratio(ramped, c.keep), probability[0].shape[1], label.masked_fill(~known, -1)
        believed = [cromss.class_balanced_mask(one, given, keep, classes) for one in of_label]
        return believed, [cromss.consistency_mask(one, ramped) for one in of_itself]

    def _target(self, batch: Batch, label: Tensor, known: Tensor, like: Tensor) -> Tensor:
        """[b, classes, h, w], sums to 1 over the classes where there is a label, and to 0 elsewhere. Raises ConfigError."""
        c, classes = self.config, like.shape[1]
        prior = None
        if c.alpha:
            prior = batch.fields.get(c.prior)
            if prior is None or prior.shape != like.shape:
                found = sorted(batch.fields) if prior is None else list(prior.shape)
                raise ConfigError(f"{NAME}: smooths with the field {c.prior!r} of shape {list(like.shape)}; found {found}. Or set alpha: 0")
        return smoothed(label, prior, classes, c.alpha, c.beta, like.dtype) * known[:, None]

    def _telemetry(self, probability: list[Tensor], label: Tensor, known: Tensor, believed: list[Tensor], comm: Comm) -> dict[str, Tensor]:
        """Of all labelled pixels, the mean over sensors: the share on which prediction and label agree, and the mask's mean."""
        share = known * (comm.size / comm.sum(known.sum()).clamp_min(1)) / len(probability)
        right = sum(((p.argmax(1) == label) * share).sum() for p in probability)
        return {"label_agreement": right, "label_weight": sum((mask * share).sum() for mask in believed)}


def smoothed(label: Tensor, prior: Tensor | None, classes: int, alpha: float, beta: float, dtype: torch.dtype) -> Tensor:
    """(1 - alpha - beta) one-hot + alpha prior + beta / classes: int64 [b, h, w], [b, classes, h, w] or None -> [b, classes, h, w].

    The prior need not be normalised; a pixel where it is all 0 has the uniform one.
    """
    target = torch.nn.functional.one_hot(label, classes).movedim(-1, 1).to(dtype) * (1 - alpha - beta) + beta / classes
    if prior is None:
        return target
    prior = prior.to(dtype)
    total = prior.sum(1, keepdim=True)
    return target + alpha * torch.where(total > 0, prior / total.clamp_min(1e-12), 1 / classes)


def supervised(logits: Tensor, target: Tensor, mask: Tensor, comm: Comm) -> Tensor:
    """Soft cross-entropy, the mean over the mask [b, h, w], and soft Dice under it, over the pixels of all ranks; 0 where the mask is 0."""
    log_q, weight = logits.log_softmax(1), mask[:, None]
    q, places = log_q.exp(), (0, 2, 3)
    sums = [-(weight * target * log_q).sum()[None], mask.sum()[None]]
    sums += [part.sum(places) for part in (weight * q * target, weight * (q + target), target)]
    lengths = [len(part) for part in sums]
    entropy, area, common, both, there = over_ranks(torch.cat(sums), comm).split(lengths)
    dice = torch.where((there > 0) & (area > 0), 1 - 2 * common / both.clamp_min(1e-7), 0.0)
    return entropy[0] / area[0].clamp_min(1e-12) + dice.mean()


def follow(logits: Tensor, peer: Tensor, mask: Tensor, comm: Comm) -> Tensor:
    """Cross-entropy with a peer's detached probabilities [b, classes, h, w], the mean over the peer's mask; 0 where that is 0."""
    entropy = -(mask[:, None] * peer * logits.log_softmax(1)).sum()
    entropy, area = over_ranks(torch.stack([entropy, mask.sum()]), comm)
    return entropy / area.clamp_min(1e-12)


def over_ranks(sums: Tensor, comm: Comm) -> Tensor:
    """The sum over ranks with gradient: each rank then has the whole loss, and the mean of their gradients is the loss's."""
    return comm.gather(sums[None]).sum(0)
