"""One small training loop for all of them: the pipeline's Task, batches in memory, the critic's step after the model's."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.distributed.comm import LocalComm
from pipeline.objectives._critic import mlp
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.task import Task
from pipeline.types import Batch, Selection


class Mlp(nn.Module):
    """A tower: chosen fields side by side -> hidden layers with ReLU -> `embedding` [b, width], and `logits` where there are classes.

    `rectified`: a ReLU on the embedding too.
    """

    def __init__(
        self,
        reads: tuple[str, ...],
        columns: int,
        width: int,
        classes: int = 0,
        hidden: tuple[int, ...] = (128, 128),
        rectified: bool = False,
    ) -> None:
        super().__init__()
        self.reads, sizes = reads, (columns, *hidden)
        self.last = nn.ReLU() if rectified else nn.Identity()
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.Linear(sizes[-1], width))
        self.head = nn.Linear(width, classes) if classes else None

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = self.last(self.body(torch.cat([fields[name] for name in self.reads], 1)))
        return {"embedding": embedding} | ({"logits": self.head(embedding)} if self.head is not None else {})


class LateFusion(nn.Module):
    """Two encoders and an MLP on their embeddings: gives `first`, `second` (before the fusion) and `logits`."""

    def __init__(self, fields: tuple[str, str], columns: tuple[int, int], width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = (Mlp((field,), count, width, hidden=(128,), rectified=True) for field, count in zip(fields, columns))
        self.head = mlp(2 * width, width, classes)

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        first, second = (encoder(fields)["embedding"] for encoder in (self.first, self.second))
        return {"first": first, "second": second, "logits": self.head(torch.cat([first, second], 1))}


def train(
    towers: dict[str, nn.Module],
    objectives: dict[str, ObjectiveConfig],
    fields: dict[str, Tensor],
    *,
    epochs: int,
    seed: int,
    batch: int = 64,
    lr: float = 1e-3,
    frozen: dict[str, Tensor] | None = None,
) -> Task:
    """Trains all towers with Adam. `frozen`: teachers' rows, as a cached teacher lays them on the batch.

    Everything that is drawn is drawn from `seed`: two methods see the same initial weights and the same batches.
    """
    torch.manual_seed(seed)
    task = Task(towers, {name: (config.weight, config.build()) for name, config in objectives.items()}, LocalComm()).train()
    optimizer = torch.optim.Adam(task.parameters(), lr=lr)
    rivals = {o: o.adversary() for o in task.objectives.values() if o.adversary() is not None}
    against = {o: torch.optim.AdamW(critic.parameters(), **critic.adamw) for o, critic in rivals.items()}
    rows, order = len(next(iter(fields.values()))), np.random.default_rng(seed)
    for epoch in range(epochs):
        for chosen in torch.from_numpy(order.permutation(rows)).split(batch):
            if len(chosen) > 1:
                step(task, optimizer, rivals, against, taken(fields, frozen or {}, chosen, epoch))
    return task.eval()


def step(
    task: Task, optimizer: torch.optim.Optimizer, rivals: dict[Objective, nn.Module], against: dict[Objective, Any], batch: Batch
) -> None:
    """The model's step, then the critics' on the rows that the model's forward left."""
    optimizer.zero_grad()
    task(batch, "train", Selection(torch.arange(len(batch)))).loss.backward()
    optimizer.step()
    for objective in task.objectives.values():
        objective.after_step()
    for objective, critic in rivals.items():
        against[objective].zero_grad()
        critic(objective.adversary_inputs).backward()
        against[objective].step()


def taken(fields: dict[str, Tensor], frozen: dict[str, Tensor], chosen: Tensor, visit: int = 0) -> Batch:
    """The chosen rows as a batch."""
    every = {name: value[chosen] for name, value in fields.items()}
    teacher = {name: value[chosen] for name, value in frozen.items()}
    return Batch(chosen, chosen, torch.full_like(chosen, visit), torch.ones(len(chosen), dtype=torch.bool), every, teacher)


def compared(results: list[dict[str, dict[str, float]]], bars: list[tuple[str, str, str, float, float | None]]) -> list[dict[str, Any]]:
    """For (column, better, worse, margin, share of seeds that it must hold in): the differences seed by seed, for __main__.judged."""
    return [
        {
            "what": f"{column}: {better} over {worse}",
            "margin": margin,
            "share": share,
            "differences": [seed[better][column] - seed[worse][column] for seed in results],
        }
        for column, better, worse, margin, share in bars
    ]


@torch.no_grad()
def features(task: Task, fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all towers give for all rows."""
    return task(taken(fields, {}, torch.arange(len(next(iter(fields.values()))))), "features")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())
