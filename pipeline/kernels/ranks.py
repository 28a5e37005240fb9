"""The sums over the rows of all ranks: each rank has its own rows against the gathered columns, one b x N similarity and no more.

    what crosses           bytes a rank receives, N = ranks x b
    y, forward             N D in the dtype of the rows
    column sums, forward   8 N, added up as one vector
    column gradients       8 N
    dy, backward           4 N D, added up in float32 and scattered

The kernels know of no process: they get local rows, gathered columns and an offset. Gathering is Comm's.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.comm import Comm
from pipeline.kernels.checks import Problem
from pipeline.kernels.similarity import Gradients, Pairs, Similarity, Sums, gradients, sums


def similarity(
    x: Tensor, y: Tensor, scale: Tensor, used: Tensor | None, comm: Comm, impl: str, *, bias: Tensor | None = None, kind: str = "softmax"
) -> Similarity:
    """`kernels.similarity` of this rank's rows x [b, D] with the rows y [b, D] of all ranks; `col` is [b], of this rank's own columns.

    `used` bool [b] is of this rank. Collective, b the same everywhere. Gradients are the sums over the ranks' losses, so the mean over
    ranks of size x (a rank's share) is the gradient of the whole; the scale's and the bias's are this rank's part.
    """
    return Similarity(*_Similarity.apply(x, y, scale, bias, used, comm, impl, kind))


def with_columns(problem: Problem) -> Problem:
    """The problem with the gathered rows as its columns, for the reference; gathering keeps gradients."""
    comm, offset = problem.comm, problem.comm.rank * problem.image.shape[0]
    if comm.size == 1:
        return problem
    used = None if problem.used is None else comm.gather(problem.used)
    return problem._replace(
        all_image=comm.gather(problem.image), all_text=comm.gather(problem.text), offset=offset, used=used, square=False
    )


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, used: Tensor | None, comm: Comm, impl: str, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        offset, rows = comm.rank * x.shape[0], x.shape[0]
        columns, used_columns = comm.gather(y), None if used is None else comm.gather(used)
        pairs = Pairs(x, columns, scale, bias, used, used_columns, offset, kind)
        found = sums(pairs, impl, any(ctx.needs_input_grad))
        if kind == "softmax":
            # in float64, |s| taken off, no sum of exponentials can overflow or vanish; a merge by maximum would be two collectives
            limit = scale.abs()
            found = found._replace(col=comm.sum((found.col - limit).exp()).log() + limit)
        ctx.comm, ctx.impl, ctx.kind, ctx.offset = comm, impl, kind, offset
        ctx.save_for_backward(*pairs[:6], *found)
        return found.row, found.col[offset : offset + rows].clone() if kind == "softmax" else found.col, found.cosine

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor, grad_col: Tensor, grad_own: Tensor) -> tuple[Tensor | None, ...]:
        saved, comm = ctx.saved_tensors, ctx.comm
        pairs, found = Pairs(*saved[:6], ctx.offset, ctx.kind), Sums(*saved[6:])
        db = (grad_row * found.col).sum().to(pairs.scale.dtype) if ctx.needs_input_grad[3] else None
        if ctx.kind == "softmax":
            grad_col = comm.gather(grad_col)
        need_x, need_y, need_s = ctx.needs_input_grad[:3]
        dx, dy, ds = gradients(pairs, found, Gradients(grad_row, grad_col, grad_own), ctx.impl, need_x, need_y, wide=True)
        dy = comm.scatter_sum(dy).to(pairs.y.dtype) if need_y else None
        return dx if need_x else None, dy, ds if need_s else None, db, None, None, None, None
