"""Training loops that a run is measured against: a plain one over all pairs, and the published selection procedure restated.

Both get this project's batches and towers with their attention on the CPU written out, which is the faster form there, so that only
the loop differs: they are at least as fast as the same thing written with open_clip alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.selector import PlainLoop
from pipeline.types import Batch


class FullLoop:
    """Load, forward, backward, clip, step: nothing else."""

    def __init__(self, tower: torch.nn.Module, batches: Iterator[Batch], dtype: torch.dtype) -> None:
        from open_clip.loss import ClipLoss

        self.device = next(tower.parameters()).device
        self.tower, self.batches, self.dtype, self.loss = tower.train(), batches, dtype, ClipLoss()
        self.optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True)

    def step(self) -> int:
        """Trains one batch; how many candidates it had."""
        batch = next(self.batches).to(self.device)
        self.train(batch.fields)
        return len(batch)

    def train(self, fields: dict[str, Tensor]) -> None:
        """One optimizer step on these rows."""
        with self.autocast():
            out = self.tower(fields)
            loss = self.loss(out["image"], out["text"], out["scale"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.tower.model.logit_scale.clamp_(0, 4.6052)

    def autocast(self) -> Any:
        """The precision of training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class PublishedLoop(FullLoop):
    """DISSect as its code does it (arXiv 2507.12998, restated): after warm-up, a float32 forward of all rows in train mode, outside of
    autocast; histories in Python dictionaries by string key, one sample at a time; a second forward of the chosen rows, and their loss."""

    def __init__(self, tower: torch.nn.Module, batches: Iterator[Batch], dtype: torch.dtype, rate: float, num_samples: int) -> None:
        super().__init__(tower, batches, dtype)
        self.rate = rate
        history = 40 + 20 * torch.rand(num_samples, generator=torch.Generator().manual_seed(0))
        self.book = PlainLoop([f"{i:09}" for i in range(num_samples)], history)
        self.current: dict[str, float] = {}

    def step(self) -> int:
        """Scores one batch and trains the chosen part of it; how many candidates it had."""
        batch = next(self.batches).to(self.device)
        keys = [f"{sample:09}" for sample in batch.sample.tolist()]
        with torch.no_grad():
            out = self.tower(batch.fields)
            cosine = F.cosine_similarity(out["image"], out["text"])
        for key, value in zip(keys, torch.clamp(100 * cosine, min=0)):
            self.current[key] = value.item()
        rows = self.book.select(keys, cosine, int(len(batch) * self.rate))
        self.train({name: value[rows] for name, value in batch.fields.items()})
        return len(batch)
