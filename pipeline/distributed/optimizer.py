"""AdamW as CLIP is trained with it: which parameters decay, and the learning rate of every step."""

import math

import torch
from pydantic import Field
from torch import nn

from pipeline.config import Strict


class OptimizerConfig(Strict):
    """AdamW with CLIP's recipe: no decay on gains, biases and the logit scale; linear warm-up, then cosine."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.98), strict=False)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.1, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    final_lr: float = Field(0.0, ge=0, description="where the cosine ends, as a share of lr")

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of `step`, a pure function: nothing to save, nothing to restore."""
        warmup = self.warmup * steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup if warmup >= 1 else self.lr
        progress = (step - warmup) / max(1, steps - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over all parameters that are trained; gains, biases and the logit scale have fewer than two dimensions."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
