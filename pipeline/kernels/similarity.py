"""The tile machinery behind one op: sums over S = s x y' + b and their gradients, never storing S. Every loss here is plain autograd on top.

`torch.library` knows the op as `dissect::similarity` with its fake implementation and its gradient `dissect::similarity_gradients`, so
`torch.compile` and export see one node forward and one backward. The op is opaque to autocast: the dtype of the rows decides alone.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["IMPLEMENTATIONS", "Gradients", "Pairs", "Similarity", "Sums", "gradients", "similarity", "sums"]

# each module holds sums(pairs, keep) and gradients(pairs, sums, gradients, need_x, need_y, wide), and kept(x, y): rows of logits kept for backward
IMPLEMENTATIONS = {"blocked": "pipeline.kernels.blocked", "triton": "pipeline.kernels.gpu"}
KINDS = ("softmax", "rows", "sigmoid")


class Pairs(NamedTuple):
    """Rows x against columns y. Row i's own column is `offset` + i and is left out of every sum: p - 1 is then exact without cancellation.

    A row or column that is not used is zeros (the caller's work) and counts nowhere; the own column of a used row is used.
    """

    x: Tensor  # [B, D]
    y: Tensor  # [N, D], the dtype of x
    scale: Tensor  # [], float32, or float64 for float64 rows
    bias: Tensor | None = None  # [], as scale; only for "sigmoid"
    used_x: Tensor | None = None  # bool [B]; None: all
    used_y: Tensor | None = None  # bool [N]; None: all
    offset: int = 0
    kind: str = "softmax"  # "rows": a softmax whose columns are not wanted; "sigmoid": SigLIP's


class Sums(NamedTuple):
    """What one pass over the pairs gives; sums leave the own pairs out. Rows and columns that are not used hold -inf (0 for "sigmoid")."""

    row: Tensor  # float64 [B], log sum_j exp S_ij; "sigmoid": sum_j softplus S_ij
    col: Tensor  # float64 [N], log sum_i exp S_ij; "rows": [0]; "sigmoid": [B], sum_j sigmoid S_ij
    cosine: Tensor  # [B] in the dtype of scale, <x_i, y_own>
    shift: Tensor  # float32 [], what the pass took off every logit, in units of log 2; NaN: sums would have under- or overflowed, two maxima were taken
    logits: Tensor  # of the first rows, [kept, N], for backward; most often empty


class Gradients(NamedTuple):
    """With respect to the first three of `Sums`; "sigmoid" has none for `col`."""

    row: Tensor  # float64 [B]
    col: Tensor  # float64 [N] or [0]
    own: Tensor  # [B]


class Similarity(NamedTuple):
    """`Sums` without what is only for backward; differentiable, once."""

    row: Tensor
    col: Tensor
    cosine: Tensor


def similarity(pairs: Pairs, impl: str) -> Similarity:
    """The sums of `pairs`, with gradients for x, y, scale and bias. Raises ModuleNotFoundError where `impl` needs an extra."""
    tensors = (pairs.x, pairs.y, pairs.scale, pairs.bias)
    keep = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    return Similarity(*torch.ops.dissect.similarity(*pairs, impl, keep)[:3])


def sums(pairs: Pairs, impl: str, keep: bool) -> Sums:
    """One pass, without autograd; `keep` allows logits to be kept for `gradients`."""
    with torch.autocast(pairs.x.device.type, enabled=False):
        return _module(impl).sums(pairs, keep)


def gradients(
    pairs: Pairs, found: Sums, given: Gradients, impl: str, need_x: bool = True, need_y: bool = True, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, ds), S formed again: G_ij = g_i exp(S_ij - row_i) + g'_j exp(S_ij - col_j), or g_i sigmoid(S_ij), dx = s G y, dy = s G' x.

    `found.col` may be larger than this call's own sums: the log-sum-exp over the rows of all ranks. dx and dy are empty when not needed;
    dy has the dtype of y, or with `wide` that of scale, so that the parts of several ranks can be added up before they are rounded.
    """
    with torch.autocast(pairs.x.device.type, enabled=False):
        return _module(impl).gradients(pairs, found, given, need_x, need_y, wide)


def _module(impl: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[impl])


@torch.library.custom_op("dissect::similarity", mutates_args=())
def _similarity(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, used_x: Tensor | None, used_y: Tensor | None,
    offset: int, kind: str, impl: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(sums(Pairs(x, y, scale, bias, used_x, used_y, offset, kind), impl, keep))


@_similarity.register_fake
def _(x, y, scale, bias, used_x, used_y, offset, kind, impl, keep):
    rows, total = x.shape[0], y.shape[0]
    kept = _module(impl).kept(x, y) if keep and kind != "sigmoid" else 0
    col = {"softmax": total, "rows": 0, "sigmoid": rows}[kind]
    return (
        x.new_empty(rows, dtype=torch.float64),
        x.new_empty(col, dtype=torch.float64),
        x.new_empty(rows, dtype=scale.dtype),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(kept, total if kept else 0),
    )


@torch.library.custom_op("dissect::similarity_gradients", mutates_args=())
def _similarity_gradients(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, used_x: Tensor | None, used_y: Tensor | None, offset: int, kind: str,
    row: Tensor, col: Tensor, cosine: Tensor, shift: Tensor, logits: Tensor, grad_row: Tensor, grad_col: Tensor, grad_own: Tensor,
    impl: str, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pairs, found = Pairs(x, y, scale, bias, used_x, used_y, offset, kind), Sums(row, col, cosine, shift, logits)
    return gradients(pairs, found, Gradients(grad_row, grad_col, grad_own), impl, need_x, need_y)


@_similarity_gradients.register_fake
def _(x, y, scale, *rest):
    need_x, need_y = rest[-2:]
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,)), torch.empty_like(scale)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, y, scale, bias, used_x, used_y, ctx.offset, ctx.kind, ctx.impl, _ = inputs
    ctx.save_for_backward(x, y, scale, bias, used_x, used_y, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)  # zeros for the kept logits would cost what they cost


def _backward(ctx: Any, grad_row: Tensor | None, grad_col: Tensor | None, grad_own: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"impl {ctx.impl!r} has no second derivative (create_graph=True); use impl='reference'")
    *given, row, col, cosine, shift, logits = ctx.saved_tensors
    grads = [
        value if grad is None else grad for grad, value in zip((grad_row, grad_col, grad_own), map(torch.zeros_like, (row, col, cosine)))
    ]
    need_x, need_y, need_s, need_b = ctx.needs_input_grad[:4]
    dx, dy, ds = torch.ops.dissect.similarity_gradients(
        *given, ctx.offset, ctx.kind, row, col, cosine, shift, logits, *grads, ctx.impl, need_x, need_y
    )
    db = (grads[0] * col).sum().to(given[3].dtype) if need_b else None  # "sigmoid": `col` holds each row's sum of sigmoids
    return dx if need_x else None, dy if need_y else None, ds if need_s else None, db, *[None] * 6


_similarity.register_autograd(_backward, setup_context=_remember)
