"""What a positive pair is contrasted with: the rows of the batch, a queue of earlier rows, or a bank of all samples; one interface.

Queue and bank are buffers, the same on every rank whatever the number of ranks, so that checkpoints hold them and any world size goes on
with them. `forward` reads them and remembers what to write; `after_step` writes, once a step: gradient accumulation calls `forward` twice.
"""

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.hashing import hash_ids
from pipeline.kernels import clip_loss
from pipeline.objectives._rows import Used, fresh, unit
from pipeline.objectives.base import ObjectiveConfig


class ContrastConfig(ObjectiveConfig):
    """Settings of a contrastive term between two kinds of features."""

    temperature: float = Field(0.1, gt=0)
    projection: int = Field(128, ge=0, description="width of the linear heads before the contrast; 0: none, all features have one width")
    negatives: Literal["batch", "queue", "bank"] = Field(
        "batch",
        description="batch: the other rows of all ranks. queue: and the last rows of earlier steps (MoCo). bank: one row per sample, updated "
        "by momentum, of which `drawn` are compared (CRD); takes 8 x samples x projection bytes on every rank",
    )
    queue: int = Field(4096, ge=1, description="rows that the queue holds; fewer than there are samples")
    samples: int | None = Field(None, ge=2, description="bank: how many samples the shards hold")
    drawn: int = Field(16384, ge=1, description="bank: negatives drawn in a step and shared by its rows; all where there are no more")
    momentum: float = Field(0.5, ge=0, lt=1, description="bank: the share of a row that stays when it is updated")
    mask_same_class: bool = Field(False, description="rows of the anchor's label are no negatives")
    label: str = Field("label", description="mask_same_class: the batch field with int64 labels; below 0 is no label")

    def fields(self) -> tuple[str, ...]:
        return (self.label,) if self.mask_same_class else ()

    def contrast(self, key: str, width: int) -> "Contrast":
        """A contrast between rows of `width` columns. Raises ConfigError where the bank's size is missing."""
        if self.negatives == "batch":
            return InBatch(self)
        if self.negatives == "queue":
            return fresh(key, lambda: Queue(self, width))
        if self.samples is None:
            raise ConfigError(f"objectives: {self.name}: negatives: bank needs `samples`, the number of samples in the shards")
        return fresh(key, lambda: Bank(self, width))


class Rows(NamedTuple):
    """Which rows are compared."""

    sample: Tensor  # int64 [b]
    visit: Tensor  # int64 [b]
    weight: Tensor  # float [b]; 0: neither an anchor nor a negative
    used: Used  # of that weight
    label: Tensor | None  # int64 [b]: rows of one label are not each other's negatives; below 0: no label


class Contrasted(NamedTuple):
    """What a contrast returns."""

    loss: Tensor  # [], the mean over ranks is the loss of the whole batch
    bound: Tensor  # [], detached: the estimate of the mutual information in nats, a lower bound where negatives are fresh


class Contrast(nn.Module):
    """Base of the three: the loss of unit rows `left` [b, p] and `right` [b, p] that belong together row by row."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config
        self.pending: tuple[Tensor, ...] | None = None

    def forward(self, left: Tensor, right: Tensor, rows: Rows, comm: Comm) -> Contrasted:
        """Collective."""
        raise TypeError(f"{type(self).__name__} must define forward()")

    def after_step(self) -> None:
        """Writes what the last forward left; called after the optimizer's step."""

    def remember(self, left: Tensor, right: Tensor, rows: Rows, comm: Comm) -> None:
        """Keeps the rows of all ranks for `after_step`."""
        if self.training:
            label = torch.full_like(rows.sample, -1) if rows.label is None else rows.label
            self.pending = tuple(comm.gather(x.detach()) for x in (left, right, rows.sample, rows.weight > 0, label))


class InBatch(Contrast):
    """Symmetric InfoNCE over the rows of all ranks (CPC, arXiv 1807.03748; equation 2 of the specification): I >= log B - loss."""

    def forward(self, left: Tensor, right: Tensor, rows: Rows, comm: Comm) -> Contrasted:
        at_least_two(rows, comm, self.config.name)
        if rows.label is None:
            found = clip_loss(left, right, 1 / self.config.temperature, weights=rows.weight.to(left.dtype), comm=comm)
            loss, each = found.loss, found.per_sample
        else:
            each = info_nce(left, right, rows, comm, self.config.temperature)
            loss = (each * rows.weight).mean()
        return Contrasted(loss, rows.used.count.log() - rows.used.mean(each))


class Queue(Contrast):
    """InfoNCE over the batch and a queue of what earlier steps gave (MoCo, arXiv 1911.05722, without a momentum encoder)."""

    def __init__(self, config: ContrastConfig, width: int) -> None:
        super().__init__(config)
        self.register_buffer("left", torch.zeros(config.queue, width))
        self.register_buffer("right", torch.zeros(config.queue, width))
        self.register_buffer("sample", torch.full((config.queue,), -1))  # -1: an empty place
        self.register_buffer("label", torch.full((config.queue,), -1))
        self.register_buffer("head", torch.zeros(1, dtype=torch.int64))

    def forward(self, left: Tensor, right: Tensor, rows: Rows, comm: Comm) -> Contrasted:
        each = info_nce(left, right, rows, comm, self.config.temperature, self)
        count = rows.used.count + (self.sample >= 0).sum()
        self.remember(left, right, rows, comm)
        return Contrasted((each * rows.weight).mean(), count.log() - rows.used.mean(each))

    @torch.no_grad()
    def after_step(self) -> None:
        if self.pending is None:
            return
        left, right, sample, used, label = (value[-len(self.sample) :] for value in self.pending)
        place = (self.head + torch.arange(len(sample), device=sample.device)) % len(self.sample)
        for kept, new in ((self.left, left), (self.right, right), (self.sample, sample.masked_fill(~used, -1)), (self.label, label)):
            kept[place] = new.to(kept.dtype)
        self.head += len(sample)
        self.pending = None


class Bank(Contrast):
    """The two memory banks of CRD (Tian et al., arXiv 1910.10699; equation 3 of the specification), one row per sample and side.

    Unlike there, the negatives of a step are drawn once and shared by its anchors (b x K products instead of b x K x p gathered
    numbers), and an anchor's own row is never its negative.
    """

    def __init__(self, config: ContrastConfig, width: int) -> None:
        super().__init__(config)
        reach = 1 / math.sqrt(width / 3)
        for name in ("left", "right"):
            self.register_buffer(name, torch.empty(config.samples, width).uniform_(-reach, reach))
        self.register_buffer("label", torch.full((config.samples,), -1))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # fixed by the first step
        self._fixed = False

    def forward(self, left: Tensor, right: Tensor, rows: Rows, comm: Comm) -> Contrasted:
        total = len(self.left)
        if rows.sample.device.type == "cpu" and int(rows.sample.max()) >= total:
            found = f"found sample {int(rows.sample.max())} in the batch and samples: {total} in the configuration"
            raise ConfigError(f"{self.config.name}: a bank has one row per sample; {found}")
        chosen, count = self._draw(rows, comm)
        allowed = chosen[None] != rows.sample[:, None]
        if rows.label is not None:
            allowed &= (self.label[chosen][None] != rows.label[:, None]) | (rows.label[:, None] < 0)
        dots = []
        for anchor, bank in ((left, self.right), (right, self.left)):
            own = (anchor * bank[rows.sample]).sum(1) / self.config.temperature
            dots.append((own, anchor @ bank[chosen].T / self.config.temperature))
        log_z, log_share = self._normaliser(dots, rows, comm), math.log(count / total)
        # in logarithms: exp(1 / temperature) need not fit the dtype
        each = sum(
            F.softplus(log_share - (own - z)) + (F.softplus(others - z - log_share) * allowed).sum(1)
            for (own, others), z in zip(dots, log_z)
        )
        self.remember(left, right, rows, comm)
        return Contrasted((each * rows.weight).mean(), math.log(count) - rows.used.mean(each) / 2)

    def _draw(self, rows: Rows, comm: Comm) -> tuple[Tensor, int]:
        """Bank rows int64 [K] that are negatives in this step, the same on every rank, and how many an anchor has."""
        total, drawn = len(self.left), self.config.drawn
        if drawn >= total - 1:
            return torch.arange(total, device=rows.sample.device), total - 1
        first = comm.gather(torch.stack([rows.sample[:1], rows.visit[:1]], 1))[:1]  # of the whole batch, at any number of ranks
        return hash_ids(0, first[:, 0], first[:, 1], torch.arange(drawn, device=first.device)) % total, drawn

    def _normaliser(self, dots: list[tuple[Tensor, Tensor]], rows: Rows, comm: Comm) -> Tensor:
        """log Z [2]: Z = N x the mean of exp over own rows and negatives at the first step, a constant from then on."""
        if not self._fixed and not bool(self.log_z.isnan().any()):
            self._fixed = True
        if self._fixed:
            return self.log_z
        used, top = (rows.weight > 0)[:, None], 1 / self.config.temperature
        parts = [(torch.cat([own[:, None], others], 1).detach() - top).exp() * used for own, others in dots]
        sums = comm.sum(torch.stack([part.sum() for part in parts])) / (rows.used.count * parts[0].shape[1])
        first = (sums * len(self.left)).log() + top
        self._first_z = torch.where(self.log_z.isnan() & first.isfinite(), first.to(self.log_z.dtype), self.log_z)
        return self._first_z.nan_to_num(0)  # NaN still: no row has counted yet

    @torch.no_grad()
    def after_step(self) -> None:
        if self.pending is None:
            return
        left, right, sample, used, label = self.pending
        for bank, new in ((self.left, left), (self.right, right)):
            old = bank[sample]
            moved = unit(self.config.momentum * old + (1 - self.config.momentum) * new.to(bank.dtype))
            bank[sample] = torch.where(used[:, None], moved, old)
        self.label[sample] = torch.where(used, label, self.label[sample])
        if not self._fixed:
            self.log_z.copy_(self._first_z)
        self.pending = None


def at_least_two(rows: Rows, comm: Comm, objective: str) -> None:
    """Raises ConfigError for a global batch of one row, which has nothing to be contrasted with."""
    if len(rows.sample) * comm.size < 2:
        raise ConfigError(f"{objective}: negatives: batch needs 2 rows or more, found 1; train larger batches, or take `queue` or `bank`")


def info_nce(left: Tensor, right: Tensor, rows: Rows, comm: Comm, temperature: float, queue: Queue | None = None) -> Tensor:
    """[b]: symmetric InfoNCE of every row, without false negatives: its own sample elsewhere, and rows of its label where given.

    Stores b x N products, N the rows of all ranks and the queue.
    """
    offset = comm.rank * len(left)
    sample, used = comm.gather(rows.sample), comm.gather(rows.weight > 0)
    label = None if rows.label is None else comm.gather(rows.label)
    columns = [comm.gather(left), comm.gather(right)]
    if queue is not None:
        columns = [torch.cat([new, kept.to(new.dtype)]) for new, kept in zip(columns, (queue.left, queue.right))]
        sample, used = torch.cat([sample, queue.sample]), torch.cat([used, queue.sample >= 0])
        label = None if label is None else torch.cat([label, queue.label])
    allowed = used[None] & (sample[None] != rows.sample[:, None])
    if label is not None:
        allowed = allowed & ((label[None] != rows.label[:, None]) | (rows.label[:, None] < 0))
    own = offset + torch.arange(len(left), device=left.device)
    allowed = allowed | (own[:, None] == torch.arange(len(sample), device=left.device)[None])
    each = 0
    for anchor, others in ((left, columns[1]), (right, columns[0])):
        logits = anchor @ others.T / temperature
        each = each + logits.masked_fill(~allowed, -math.inf).logsumexp(1) - logits.gather(1, own[:, None])[:, 0]
    return each / 2
