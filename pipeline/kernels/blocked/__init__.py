"""The sums and their gradients on a CPU in strips of rows, in pure torch: four similarity-sized products, and never B x N numbers.

Why it is shaped like this (S = s <x_i, y_j>; at 4,096 x 4,096 x 512 in bfloat16 six sevenths of the time are products):
 - One exp2 per element serves rows and columns: all logits share one shift, so both sums run over the same numbers.
 - The shift is a typical logit and enters the product as its summand, before rounding. A bfloat16 product rounds what it stores to 8
   bits, 0.25 at a logit of 60, and the rounding is relative: around the shift, where the softmax has its mass, almost nothing is lost.
 - The own pair is kept out of the matrix. Its coefficient p - 1 comes from the sum of the others, without cancellation: in bfloat16
   p = 0.999 would be 1 and its gradient 0.
 - The logits of the first rows are kept for backward, as far as they take no more room than six float32 copies of the features.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.blocked import careful, sigmoid
from pipeline.kernels.blocked.strips import LOG2E, block_rows, row_dots, strip_rows, widened, workable, write_logits
from pipeline.kernels.similarity import Gradients, Pairs, Sums

_PIECE = 512  # rows of what is done to gradients a piece at a time
_HEADROOM = 86.0  # nats above the shift before exp2 overflows float32 (at 88.7)
_NEAR = 2.0  # nats from 0 under which a bfloat16 logit is rounded (by 0.004) no worse than its exponential
_FAINT = 2.0**-100  # a sum under this may have lost its largest terms to underflow


def sums(pairs: Pairs, keep: bool) -> Sums:
    """See `similarity.sums`. Rows and columns that are not used are left out rather than masked: they cost nothing."""
    places = _places(pairs)
    kept = kept_rows(pairs) if keep else 0
    if places is None:
        return _sums(pairs, kept)
    found = _sums(_compact(pairs, *places), 0)
    empty = 0.0 if pairs.kind == "sigmoid" else -torch.inf
    rows, columns = pairs.x.shape[0], pairs.y.shape[0]
    col = found.col
    if pairs.kind != "rows":
        col = _spread(col, places[1], columns, empty) if pairs.kind == "softmax" else _spread(col, places[0], rows, empty)
    row, cosine = _spread(found.row, places[0], rows, empty), _spread(found.cosine, places[0], rows, 0)
    return Sums(row, col, cosine, found.shift, pairs.x.new_empty(kept, columns if kept else 0))


def gradients(pairs: Pairs, found: Sums, given: Gradients, need_x: bool, need_y: bool, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `similarity.gradients`."""
    exact, places = pairs.scale.dtype, _places(pairs)
    types = pairs.x.dtype, exact if wide else pairs.y.dtype
    if places is None:
        return _gradients(pairs, _rule(pairs, found, given, True), given.own.to(exact), need_x, need_y, types)
    rows, columns = places
    found = found._replace(row=found.row[rows], col=found.col[columns] if pairs.kind == "softmax" else found.col)
    given = Gradients(given.row[rows], given.col[columns] if pairs.kind == "softmax" else given.col, given.own[rows])
    part = _compact(pairs, rows, columns)
    dx, dy, ds = _gradients(part, _rule(part, found, given, False), given.own.to(exact), need_x, need_y, types)
    dx = _spread(dx, rows, pairs.x.shape[0], 0) if need_x else dx
    return dx, _spread(dy, columns, pairs.y.shape[0], 0) if need_y else dy, ds


def kept_rows(pairs: Pairs) -> int:
    """Rows whose logits are kept for backward."""
    return 0 if pairs.kind == "sigmoid" else kept(pairs.x, pairs.y)


def kept(x: Tensor, y: Tensor) -> int:
    """Whole strips, at most three rows of four and no more bytes than six float32 copies of the features; from shapes and dtypes alone."""
    rows, strip = x.shape[0], strip_rows(x.shape[0])
    return min(3 * rows // 4, 24 * x.shape[1] // workable(x.dtype).itemsize) // strip * strip


def _places(pairs: Pairs) -> tuple[Tensor, Tensor] | None:
    """Which rows and which columns are used; None when all are."""
    masks = [mask for mask in (pairs.used_x, pairs.used_y) if mask is not None]
    if all(bool(mask.all()) for mask in masks):
        return None
    every = (torch.arange(value.shape[0]) if mask is None else mask.nonzero()[:, 0] for value, mask in zip(pairs[:2], pairs[4:6]))
    return tuple(every)


def _compact(pairs: Pairs, rows: Tensor, columns: Tensor) -> Pairs:
    offset = int((columns < pairs.offset).sum())
    return pairs._replace(x=pairs.x[rows], y=pairs.y[columns], used_x=None, used_y=None, offset=offset)


def _spread(value: Tensor, places: Tensor, rows: int, filler: float) -> Tensor:
    return torch.full((rows, *value.shape[1:]), filler, dtype=value.dtype).index_copy_(0, places, value)


def _sums(pairs: Pairs, kept: int) -> Sums:
    x, y = _work(pairs)
    s, exact, own_columns = pairs.scale.item(), pairs.scale.dtype, pairs.kind == "softmax"
    cosine = row_dots(pairs.x, pairs.y[pairs.offset : pairs.offset + pairs.x.shape[0]], exact)
    if pairs.kind == "sigmoid":
        return Sums(
            *sigmoid.sums(x, y, s, pairs.bias.item(), pairs.offset, strip_rows(x.shape[0])), cosine, torch.zeros(()), x.new_empty(0, 0)
        )
    shift = _shift(x, y, s, pairs.offset)
    row, col, logits = _exponentials(x, y, s, shift, pairs.offset, kept, exact)
    own = (s * cosine - shift / LOG2E).exp()  # a sum that is nothing beside it need not be looked at again
    here = slice(pairs.offset, pairs.offset + x.shape[0])
    totals = [row + own, *([col.index_add(0, torch.arange(here.start, here.stop), own)] if own_columns else [])]
    if any(bool(((value <= _FAINT) | (value == torch.inf)).any()) for value in totals):
        row, col = careful.log_sums(x.to(exact), y.to(exact), s, pairs.offset, own_columns, strip_rows(x.shape[0]))
        return Sums(row.double(), col.double(), cosine, torch.full((), torch.nan), logits)
    shift_nats = shift / LOG2E
    col = col.double().log().add_(shift_nats) if own_columns else col.new_empty(0, dtype=torch.float64)
    return Sums(row.double().log().add_(shift_nats), col, cosine, torch.full((), shift), logits)


def _exponentials(
    x: Tensor, y: Tensor, s: float, shift: float, offset: int, keep: int, exact: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows [B] and columns [N] of exp2(logits) without the own pairs, and the logits of the first `keep` rows."""
    rows, total = x.shape[0], y.shape[0]
    strip = strip_rows(rows)
    height = min(strip, block_rows(total))
    kept = torch.empty(keep, total if keep else 0, dtype=x.dtype)
    buffer, exps = torch.empty(strip if keep < rows else 0, total, dtype=x.dtype), torch.empty(height, total, dtype=exact)
    row, col, part = torch.empty(rows, dtype=exact), torch.zeros(total, dtype=exact), torch.empty(total, dtype=exact)
    for first in range(0, rows, strip):
        last = min(first + strip, rows)
        logits = kept[first:last] if last <= keep else buffer[: last - first]
        write_logits(logits, x[first:last], y, s * LOG2E, shift, offset + first)
        for k in range(first, last, height):
            block = logits[k - first : k - first + height]
            e = exps[: block.shape[0]]
            torch.exp2(widened(block, e), out=e)
            torch.sum(e, 1, out=row[k : k + block.shape[0]])
            col += torch.sum(e, 0, out=part)
    return row, col, kept


def _rule(pairs: Pairs, found: Sums, given: Gradients, kept: bool) -> Any:
    """What writes G of a strip."""
    s, exact, own_columns = pairs.scale.item(), pairs.scale.dtype, pairs.kind == "softmax"
    if pairs.kind == "sigmoid":
        return sigmoid.Sigmoids(s, pairs.bias.item(), given.row.to(exact))
    shift = found.shift.item()
    if math.isnan(shift):
        col = (given.col.to(exact), found.col.to(exact)) if own_columns else (None, None)
        return careful.Probabilities(s, given.row.to(exact), found.row.to(exact), *col)
    # a row without any other column has a log-sum of -inf and a gradient of 0; 0 times inf would be no number
    alpha, beta = (
        torch.where(grad == 0, 0.0, grad * (shift / LOG2E - log).exp()).to(exact) if log.numel() else None
        for grad, log in ((given.row, found.row), (given.col, found.col))
    )
    return _Probabilities(s, shift, alpha, beta, found.logits if kept and found.logits.numel() else None)


class _Probabilities:
    """Writes exp2(logits) * (alpha_i + beta_j) of a strip: the gradient with respect to its logits, the own pairs 0."""

    def __init__(self, s: float, shift: float, alpha: Tensor, beta: Tensor | None, logits: Tensor | None) -> None:
        self.s, self.shift, self.alpha, self.beta, self.logits = s, shift, alpha, beta, logits

    def write(self, out: Tensor, x: Tensor, y: Tensor, first: int, offset: int, exact: torch.dtype) -> None:
        rows, total = out.shape
        logits = out
        if self.logits is not None and first < self.logits.shape[0]:  # whole strips are kept
            logits = self.logits[first : first + rows]
        else:
            write_logits(out, x, y, self.s * LOG2E, self.shift, offset + first)
        height = min(rows, block_rows(total))
        exps, factors = torch.empty(height, total, dtype=exact), torch.empty(height, total, dtype=exact)
        for k in range(0, rows, height):
            block = out[k : k + height]
            e, alpha = exps[: block.shape[0]], self.alpha[first + k : first + k + block.shape[0], None]
            torch.exp2(widened(logits[k : k + height], e), out=e)
            e.mul_(alpha if self.beta is None else torch.add(alpha, self.beta, out=factors[: block.shape[0]]))
            block.copy_(e)


def _gradients(
    pairs: Pairs, rule: Any, own: Tensor, need_x: bool, need_y: bool, types: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (in `types`) and ds, strip by strip: G from `rule`, then dx = s G y and dy += s G' x; `own` beside it, without s."""
    (x, y), offset, s, exact = _work(pairs), pairs.offset, pairs.scale.item(), own.dtype
    rows, width = x.shape
    probabilities = torch.empty(strip_rows(rows), y.shape[0], dtype=x.dtype)
    dx = torch.empty(x.shape if need_x else (0,), dtype=types[0])
    dy = torch.zeros(y.shape if need_y else (0,), dtype=exact)
    narrow = torch.empty(max(_PIECE, y.shape[0] if need_y and x.dtype != exact else 0), width, dtype=x.dtype)
    wide, ds = torch.empty(_PIECE, width, dtype=exact), torch.zeros((), dtype=exact)
    for first in range(0, rows, strip_rows(rows)):
        last = min(first + strip_rows(rows), rows)
        p = probabilities[: last - first]
        rule.write(p, x[first:last], y, first, offset, exact)
        for k in range(first, last, _PIECE):
            end = min(k + _PIECE, last)
            part = widened(torch.mm(p[k - first : end - first], y, out=narrow[: end - k]), wide[: end - k])
            ds += torch.dot(part.flatten(), x[k:end].to(exact).flatten())  # sum_ij G_ij <x_i, y_j>
            if need_x:
                dx[k:end] = part.mul_(s).addcmul_(own[k:end, None], y[offset + k : offset + end].to(exact))
        if need_y:
            _add_transposed(dy, p, x[first:last], narrow, wide)
    if need_y:
        dy.mul_(s)
        for k in range(0, rows, _PIECE):
            end = min(k + _PIECE, rows)
            dy[offset + k : offset + end].addcmul_(own[k:end, None], x[k:end].to(exact))
    return dx, dy.to(types[1]), ds


def _add_transposed(dy: Tensor, p: Tensor, x: Tensor, narrow: Tensor, wide: Tensor) -> None:
    if narrow.dtype == dy.dtype:
        dy.addmm_(p.T, x)
        return
    # a half-precision product rounds its result, so strips are added up outside of it
    part = torch.mm(p.T, x, out=narrow[: dy.shape[0]])
    for c in range(0, dy.shape[0], _PIECE):
        piece = part[c : c + _PIECE]
        dy[c : c + _PIECE] += wide[: piece.shape[0]].copy_(piece)


def _shift(x: Tensor, y: Tensor, s: float, offset: int) -> float:
    """A typical logit times log2(e): the mean under the softmax of a few rows, their own columns left out. It decides only what is
    rounded. 0 where that is good enough (a summand costs 5 % of a product); never so low that a cosine of 1 could overflow."""
    step_x, step_y = math.ceil(x.shape[0] / 32), math.ceil(y.shape[0] / 2048)
    if not x.shape[0]:
        return 0.0
    logits = s * (x[::step_x] @ y[::step_y].T).float()
    rows, cols = torch.arange(0, x.shape[0], step_x), torch.arange(0, y.shape[0], step_y)
    logits.masked_fill_(offset + rows[:, None] == cols, -1e30)
    typical = (logits.softmax(1) * logits).sum(1).mean().item()
    if not _NEAR <= abs(typical) <= abs(s):  # nothing to gain, or no number
        typical = 0.0
    typical = max(typical, abs(s) - _HEADROOM)
    return torch.tensor(typical * LOG2E).bfloat16().item()  # exact in every dtype that it is filled into


def _work(pairs: Pairs) -> tuple[Tensor, Tensor]:
    dtype = workable(pairs.x.dtype)
    return pairs.x.to(dtype), pairs.y.to(dtype)
