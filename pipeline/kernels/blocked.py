"""The loss on a CPU in strips of rows, in pure torch: four similarity-sized products forward and backward, and never B x N numbers.

Why it is shaped like this (S = s <x_i, y_j>; at 4,096 x 4,096 x 512 in bfloat16 six sevenths of the time are products):
 - One exp2 per element serves rows and columns: all logits share one shift, so both sums run over the same numbers.
 - The shift is a typical logit and enters the product as its summand, before rounding. A bfloat16 product rounds what it stores to 8
   bits, 0.25 at a logit of 60, and the rounding is relative: around the shift, where the softmax has its mass, almost nothing is lost.
 - The own pair is kept out of the matrix. Its coefficient p - 1 comes from the sum of the others, without cancellation: in bfloat16
   p = 0.999 would be 1 and its gradient 0.
 - The logits of the first rows are kept for backward, as far as they take no more room than two float32 copies of the features.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline.kernels import careful
from pipeline.kernels.clip import Problem

_LOG2E = math.log2(math.e)
_STRIP = 1024  # rows of a strip; with fewer the columns' gradients are added up more often
_ELEMENTS = 2**18  # of a block of element-wise work: what it reads and writes stays in a 1 to 2 MB cache
_PIECE = 512  # rows of what is done to gradients a piece at a time
_HEADROOM = 86.0  # nats above the shift before exp2 overflows float32 (at 88.7)
_NEAR = 2.0  # nats from 0 under which a bfloat16 logit is rounded (by 0.004) no worse than its exponential
_FAINT = 2.0**-100  # a sum under this may have lost its largest terms to underflow


def clip_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], per_sample, cosine, p_row, p_col [B]) of a checked problem on the CPU."""
    image, text, all_image, all_text, offset = problem.image, problem.text, problem.all_image, problem.all_text, problem.offset
    rows, kept = image.shape[0], None
    if problem.used is not None and not bool(problem.used.all()):
        # removed rows are left out rather than masked: they cost nothing and meet no special case
        kept = problem.used[offset : offset + rows].nonzero()[:, 0]
        image, text = image[kept], text[kept]
        if not problem.square:
            columns = problem.used.nonzero()[:, 0]
            all_image, all_text, offset = all_image[columns], all_text[columns], int(problem.used[:offset].sum())
    cosine = _row_dots(image, text, problem.scale.dtype)
    if image.shape[0] == 0:
        row = col = p_row = p_col = (image.sum() + text.sum() + problem.scale) * cosine  # nothing, with a gradient of nothing
    elif problem.square:
        row, p_row, col, p_col = _Similarity.apply(image, text, problem.scale, cosine, 0, True)
    else:
        here = slice(offset, offset + image.shape[0])
        own_text, own_image = (_row_dots(a, b[here], cosine.dtype) for a, b in ((image, all_text), (text, all_image)))
        row, p_row = _Similarity.apply(image, all_text, problem.scale, own_text, offset, False)
        col, p_col = _Similarity.apply(text, all_image, problem.scale, own_image, offset, False)
    per_sample = (row + col) / 2
    weighted = per_sample
    if problem.weight is not None:
        weighted = per_sample * (problem.weight if kept is None else problem.weight[kept])
    loss = weighted.sum() / rows
    if kept is not None:
        per_sample, p_row, p_col = (_spread(value, kept, rows) for value in (per_sample, p_row, p_col))
        cosine = _row_dots(problem.image, problem.text, cosine.dtype)
    return loss, per_sample, cosine, p_row, p_col


def _row_dots(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """<a_i, b_i>, [B]; by pieces, so that the widened copies stay in the cache."""
    result = torch.empty(a.shape[0], dtype=exact)
    for k in range(0, a.shape[0], 256):
        torch.sum(a[k : k + 256].detach().to(exact) * b[k : k + 256].detach().to(exact), 1, out=result[k : k + 256])
    return result


def _spread(value: Tensor, places: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=value.dtype).index_copy_(0, places, value.detach())


class _Similarity(torch.autograd.Function):
    """x [B, D], y [N, D], s -> log sum_j exp S_ij - S_io and exp(S_io - log sum_j exp S_ij), both [B], o = offset + i; with `columns`
    (N = B, offset 0) the same two over i for every column. The first of each two is differentiable, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, cosine: Tensor, offset: int, columns: bool) -> tuple[Tensor, ...]:
        s, exact = scale.item(), scale.dtype
        work_x, work_y = _workable(x), _workable(y)
        shift = _shift(work_x, work_y, s, offset)
        own = s * cosine - shift / _LOG2E
        keep = _kept_rows(work_x) if any(ctx.needs_input_grad) else 0
        row, col, logits = _sums(work_x, work_y, s, shift, offset, keep, exact)
        total, col_total = row + own.exp(), col + own.exp() if columns else None
        ctx.careful = any(bool(((value <= _FAINT) | (value == torch.inf)).any()) for value in (total, col_total) if value is not None)
        if ctx.careful:
            work_x, work_y, logits = work_x.to(exact), work_y.to(exact), None
            own = own + shift / _LOG2E
            row, col = careful.log_sums(work_x, work_y, s, offset, columns, _strip_rows(x.shape[0]))
            total, col_total = torch.logaddexp(row, own), torch.logaddexp(col, own) if columns else None
        else:
            row, col = row.log(), col.log()
        ctx.s, ctx.shift, ctx.offset, ctx.dtype = s, shift, offset, x.dtype
        margins = [value - own for value in ((row, col) if columns else (row,))]
        ctx.save_for_backward(work_x, work_y, logits, total, col_total, *margins)
        outputs = [result for margin in margins for result in (softplus(margin, threshold=80), torch.sigmoid(-margin))]
        ctx.mark_non_differentiable(*outputs[1::2])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("clip_loss: impl 'blocked' has no second derivative (create_graph=True); use impl='reference'")
        x, y, logits, total, col_total, *margins = ctx.saved_tensors
        own = -sum(grad * torch.sigmoid(margin) for grad, margin in zip(grads[::2], margins))  # of the own pair's logit
        column_grad = grads[2] if col_total is not None else None
        with torch.autocast("cpu", enabled=False):
            if ctx.careful:
                rule = careful.Probabilities(ctx.s, grads[0], total, column_grad, col_total)
            else:
                rule = _Probabilities(ctx.s, ctx.shift, grads[0] / total, None if col_total is None else column_grad / col_total, logits)
            dx, dy, ds = _gradients(x, y, ctx.s, ctx.offset, own, rule, ctx.needs_input_grad, ctx.dtype)
        return dx, dy, ds, None, None, None


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
            _write_logits(out, x, y, self.s, self.shift, offset + first)
        height = min(rows, max(1, _ELEMENTS // total))
        exps, factors = torch.empty(height, total, dtype=exact), torch.empty(height, total, dtype=exact)
        for k in range(0, rows, height):
            block = out[k : k + height]
            e, alpha = exps[: block.shape[0]], self.alpha[first + k : first + k + block.shape[0], None]
            torch.exp2(_widened(logits[k : k + height], e), out=e)
            e.mul_(alpha if self.beta is None else torch.add(alpha, self.beta, out=factors[: block.shape[0]]))
            block.copy_(e)


def _sums(x: Tensor, y: Tensor, s: float, shift: float, offset: int, keep: int, exact: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over rows [B] and columns [N] of exp2(logits) without the own pairs, and the logits of the first `keep` rows."""
    rows, total = x.shape[0], y.shape[0]
    strip = _strip_rows(rows)
    height = min(strip, max(1, _ELEMENTS // total))
    kept = torch.empty(keep, total, dtype=x.dtype) if keep else None
    buffer, exps = torch.empty(strip if keep < rows else 0, total, dtype=x.dtype), torch.empty(height, total, dtype=exact)
    row, col, part = torch.empty(rows, dtype=exact), torch.zeros(total, dtype=exact), torch.empty(total, dtype=exact)
    for first in range(0, rows, strip):
        last = min(first + strip, rows)
        logits = kept[first:last] if last <= keep else buffer[: last - first]
        _write_logits(logits, x[first:last], y, s, shift, offset + first)
        for k in range(first, last, height):
            block = logits[k - first : k - first + height]
            e = exps[: block.shape[0]]
            torch.exp2(_widened(block, e), out=e)
            torch.sum(e, 1, out=row[k : k + block.shape[0]])
            col += torch.sum(e, 0, out=part)
    return row, col, kept


def _gradients(
    x: Tensor, y: Tensor, s: float, offset: int, own: Tensor, rule: Any, needs: tuple[bool, ...], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, y (in `dtype`) and s, strip by strip: P from `rule`, then dx = P y and dy += P' x, own pairs apart."""
    rows, width, exact = x.shape[0], x.shape[1], own.dtype
    strip = _strip_rows(rows)
    probabilities = torch.empty(strip, y.shape[0], dtype=x.dtype)
    dx, dy = (torch.empty(x.shape, dtype=dtype) if needs[0] else None), (torch.zeros(y.shape, dtype=exact) if needs[1] else None)
    narrow = torch.empty(max(_PIECE, y.shape[0] if needs[1] and x.dtype != exact else 0), width, dtype=x.dtype)
    wide, ds = torch.empty(_PIECE, width, dtype=exact), torch.zeros((), dtype=exact)
    for first in range(0, rows, strip):
        last = min(first + strip, rows)
        p = probabilities[: last - first]
        rule.write(p, x[first:last], y, first, offset, exact)
        for k in range(first, last, _PIECE) if needs[0] or needs[2] else ():
            end = min(k + _PIECE, last)
            part = _widened(torch.mm(p[k - first : end - first], y, out=narrow[: end - k]), wide[: end - k])
            part.addcmul_(own[k:end, None], y[offset + k : offset + end].to(exact))
            ds += torch.dot(part.flatten(), x[k:end].to(exact).flatten())  # sum_ij G_ij <x_i, y_j>
            if dx is not None:
                dx[k:end] = part.mul_(s)
        if dy is not None:
            _add_transposed(dy, p, x[first:last], narrow, wide)
            dy[offset + first : offset + last].addcmul_(own[first:last, None], x[first:last].to(exact))
    return dx, None if dy is None else dy.mul_(s).to(dtype), ds if needs[2] else None


def _add_transposed(dy: Tensor, p: Tensor, x: Tensor, narrow: Tensor, wide: Tensor) -> None:
    if narrow.dtype == dy.dtype:
        dy.addmm_(p.T, x)
        return
    # a half-precision product rounds its result, so strips are added up outside of it
    part = torch.mm(p.T, x, out=narrow[: dy.shape[0]])
    for c in range(0, dy.shape[0], _PIECE):
        piece = part[c : c + _PIECE]
        dy[c : c + _PIECE] += wide[: piece.shape[0]].copy_(piece)


def _write_logits(out: Tensor, x: Tensor, y: Tensor, s: float, shift: float, offset: int) -> None:
    """log2(e) S - shift into `out`, the own pairs -inf; the shift rides on the accumulator and is not rounded with the product."""
    if shift:
        out.fill_(-shift)
    out.addmm_(x, y.T, alpha=s * _LOG2E, beta=1 if shift else 0)
    out.diagonal(offset).fill_(-torch.inf)


def _shift(x: Tensor, y: Tensor, s: float, offset: int) -> float:
    """A typical logit times log2(e): the mean under the softmax of a few rows, their own columns left out. It decides only what is
    rounded. 0 where that is good enough (a summand costs 5 % of a product); never so low that a cosine of 1 could overflow."""
    step_x, step_y = math.ceil(x.shape[0] / 32), math.ceil(y.shape[0] / 2048)
    logits = s * (x[::step_x] @ y[::step_y].T).float()
    rows, cols = torch.arange(0, x.shape[0], step_x), torch.arange(0, y.shape[0], step_y)
    logits.masked_fill_(offset + rows[:, None] == cols, -1e30)
    typical = (logits.softmax(1) * logits).sum(1).mean().item()
    if not _NEAR <= abs(typical) <= abs(s):  # nothing to gain, or no number
        typical = 0.0
    typical = max(typical, abs(s) - _HEADROOM)
    return torch.tensor(typical * _LOG2E).bfloat16().item()  # exact in every dtype that it is filled into


def _widened(block: Tensor, out: Tensor) -> Tensor:
    """The block itself, or its copy in the wider dtype of `out`."""
    return block if block.dtype == out.dtype else out.copy_(block)


def _strip_rows(rows: int) -> int:
    return min(_STRIP, max(16, rows // 4))


def _kept_rows(x: Tensor) -> int:
    """Rows whose logits are kept: whole strips, at most every second row and no more bytes than two float32 copies of the features."""
    rows, strip = x.shape[0], _strip_rows(x.shape[0])
    return min(rows // 2, 8 * x.shape[1] // x.element_size()) // strip * strip


def _workable(rows: Tensor) -> Tensor:
    """float16 products are a hundred times slower than float32 ones on a CPU, bfloat16 ones where oneDNN has none."""
    if rows.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return rows
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
