"""Gradient accumulation that keeps the contrastive batch whole (GradCache, Gao et al. 2021).

The loss needs the features of all rows, but memory holds the activations of a few. So all pieces are embedded without a graph; the loss of
all features gives each feature its gradient; then each piece is embedded again, with a graph, and takes its gradients from there. The last
piece goes through the true loss instead, with the other rows' features as they were: parameters outside the towers' rows (the logit
scale, an objective's own) get their gradient there, once. Costs a second forward and a second loss.

In ZeRO stage 3 nothing is fetched ahead while pieces are trained: DeepSpeed prefetches along the trace of the last forward and backward, and
the last piece, which alone runs the objectives, breaks the trace of the others and they its. A module then waits for its weights when it is
reached. Use larger pieces there, or stage 2 where the weights fit.

BatchNorm sees a piece at a time, as with any gradient accumulation, and moves its averages twice; use it with models that have none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.types import Batch, Cached, Selection, StepOutput


def accumulate(engine: Any, batch: Batch, selection: Selection, rows: int, seed: Callable[[int], None]) -> StepOutput:
    """Forward and backward of a whole step, `rows` rows at a time; the engine's optimizer has not stepped yet afterwards.

    `seed(piece)` sets the generators before each forward of a piece: dropout falls on the same elements both times.
    """
    pieces = [slice(first, min(first + rows, len(batch))) for first in range(0, len(batch), rows)]
    with torch.no_grad(), engine.untracked(), engine.autocast():
        parts = []
        for place, at in enumerate(pieces):
            seed(place)
            parts.append(engine.raw(batch.map(lambda value, at=at: value[at]), "features"))
    whole = {name: torch.cat([part[name] for part in parts]) if value.ndim >= 2 else value for name, value in parts[0].items()}
    leaves = {name: value.detach().requires_grad_(value.ndim >= 2) for name, value in whole.items()}
    learned = [name for name, leaf in leaves.items() if leaf.requires_grad]
    seed(len(pieces))
    with engine.untracked(), engine.autocast():
        loss, _ = engine.raw.loss(leaves, batch, selection)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [leaves[name] for name in learned], allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(learned, found) if gradient is not None}
    for place, at in enumerate(pieces):
        last = place == len(pieces) - 1
        with engine.synchronised(last):
            seed(place)
            with engine.autocast():
                out = engine.task(batch, "train", selection, Cached(at, whole, None if last else gradients, lambda: seed(len(pieces))))
            engine.backward(out.loss, last)
    return out
