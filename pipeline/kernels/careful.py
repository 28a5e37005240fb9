"""The blocked loss for logits too far apart for one common shift: a maximum for every row and every column, and two exps."""

import torch
from torch import Tensor


def log_sums(x: Tensor, y: Tensor, s: float, offset: int, columns: bool, strip: int) -> tuple[Tensor, Tensor | None]:
    """log sum_j exp S_ij [B] and, with `columns`, log sum_i exp S_ij [N], own pairs left out; strips of `strip` rows."""
    row = torch.empty(x.shape[0], dtype=x.dtype)
    col = torch.full((y.shape[0],), -torch.inf, dtype=x.dtype) if columns else None
    for first in range(0, x.shape[0], strip):
        logits = _logits(x[first : first + strip], y, s, offset + first)
        row[first : first + strip] = torch.logsumexp(logits, 1)
        if col is not None:
            col = torch.logaddexp(col, torch.logsumexp(logits, 0))
    return row, col


class Probabilities:
    """Writes row_grad_i exp(S_ij - row_i) + col_grad_j exp(S_ij - col_j) of a strip, own pairs 0; the logarithms hold the own pairs."""

    def __init__(self, s: float, row_grad: Tensor, row: Tensor, col_grad: Tensor | None, col: Tensor | None) -> None:
        self.s, self.row_grad, self.row, self.col_grad, self.col = s, row_grad, row, col_grad, col

    def write(self, out: Tensor, x: Tensor, y: Tensor, first: int, offset: int, exact: torch.dtype) -> None:
        logits, here = _logits(x, y, self.s, offset + first), slice(first, first + x.shape[0])
        torch.exp(logits - self.row[here, None], out=out).mul_(self.row_grad[here, None])
        if self.col is not None:
            out += logits.sub_(self.col).exp_().mul_(self.col_grad)


def _logits(x: Tensor, y: Tensor, s: float, offset: int) -> Tensor:
    logits = s * (x @ y.T)
    logits.diagonal(offset).fill_(-torch.inf)
    return logits
