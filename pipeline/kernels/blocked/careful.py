"""The blocked sums for logits too far apart for one common shift: a maximum for every row and every column, and two exps."""

import torch
from torch import Tensor


def log_sums(x: Tensor, y: Tensor, s: float, offset: int, columns: bool, strip: int) -> tuple[Tensor, Tensor]:
    """log sum_j exp S_ij [B] and, with `columns`, log sum_i exp S_ij [N] (else [0]), own pairs left out; strips of `strip` rows."""
    row = torch.empty(x.shape[0], dtype=x.dtype)
    col = torch.full((y.shape[0] if columns else 0,), -torch.inf, dtype=x.dtype)
    for first in range(0, x.shape[0], strip):
        logits = _logits(x[first : first + strip], y, s, offset + first)
        row[first : first + strip] = torch.logsumexp(logits, 1)
        if columns:
            col = torch.logaddexp(col, torch.logsumexp(logits, 0))
    return row, col


class Probabilities:
    """Writes row_grad_i exp(S_ij - row_i) + col_grad_j exp(S_ij - col_j) of a strip, own pairs 0."""

    def __init__(self, s: float, row_grad: Tensor, row: Tensor, col_grad: Tensor | None, col: Tensor | None) -> None:
        # where nothing else is in a row, its log-sum is -inf and its gradient 0: any finite number does
        self.s, self.row_grad, self.row = s, row_grad, row.nan_to_num(neginf=0.0)
        self.col_grad, self.col = col_grad, None if col is None else col.nan_to_num(neginf=0.0)

    def write(self, out: Tensor, x: Tensor, y: Tensor, first: int, offset: int, exact: torch.dtype) -> None:
        logits, here = _logits(x.to(exact), y.to(exact), self.s, offset + first), slice(first, first + x.shape[0])
        probabilities = torch.exp(logits - self.row[here, None]).mul_(self.row_grad[here, None])
        if self.col is not None:
            probabilities += logits.sub_(self.col).exp_().mul_(self.col_grad)
        out.copy_(probabilities)


def _logits(x: Tensor, y: Tensor, s: float, offset: int) -> Tensor:
    logits = s * (x @ y.T)
    logits.diagonal(offset).fill_(-torch.inf)
    return logits
