"""What the blocked path does to a strip of logits for SigLIP's pairwise loss (arXiv 2303.15343): softplus forward, sigmoid backward."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline.kernels.blocked.strips import block_rows, write_logits


def sums(x: Tensor, y: Tensor, s: float, bias: float, offset: int, strip: int) -> tuple[Tensor, Tensor]:
    """sum_j softplus(S_ij) and sum_j sigmoid(S_ij), float64 [B], own pairs left out."""
    rows, total = x.shape[0], y.shape[0]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    height, buffer = block_rows(total), torch.empty(min(strip, rows), total, dtype=x.dtype)
    row, slope = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.float64)
    for first in range(0, rows, strip):
        last = min(first + strip, rows)
        logits = buffer[: last - first]
        write_logits(logits, x[first:last], y, s, 0.0, offset + first)
        for k in range(first, last, height):
            # the bias joins after widening: a bfloat16 logit around 0 is finer than one around -10
            block = logits[k - first : k - first + height].to(exact) + bias
            row[k : k + block.shape[0]] = softplus(block).sum(1)
            slope[k : k + block.shape[0]] = torch.sigmoid(block).sum(1)
    return row, slope


class Sigmoids:
    """Writes g_i sigmoid(S_ij) of a strip, own pairs 0."""

    def __init__(self, s: float, bias: float, grad: Tensor) -> None:
        self.s, self.bias, self.grad = s, bias, grad

    def write(self, out: Tensor, x: Tensor, y: Tensor, first: int, offset: int, exact: torch.dtype) -> None:
        write_logits(out, x, y, self.s, 0.0, offset + first)
        height = block_rows(out.shape[1])
        for k in range(0, out.shape[0], height):
            block = out[k : k + height]
            block.copy_(torch.sigmoid(block.to(exact) + self.bias).mul_(self.grad[first + k : first + k + block.shape[0], None]))
