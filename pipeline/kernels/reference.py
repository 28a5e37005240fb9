"""The losses in plain torch with autograd: the definition, the fallback and the baseline. They store B x N (CLIP's twice if not square)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline.kernels.checks import Problem


def clip_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], per_sample, cosine, p_row, p_col [B]) of a checked problem. Half-precision rows are widened first: float32 logits."""
    exact = problem.scale.dtype
    image, text = problem.image.to(exact), problem.text.to(exact)
    all_image, all_text = (image, text) if problem.square else (problem.all_image.to(exact), problem.all_text.to(exact))
    logits = problem.scale * _Product.apply(image, all_text)
    other = logits.T if problem.square else problem.scale * _Product.apply(text, all_image)
    row, row_own = _log_sum_and_own(logits, problem)
    col, col_own = _log_sum_and_own(other, problem)
    per_sample = (row - row_own + col - col_own) / 2
    p_row, p_col = (row_own - row).exp(), (col_own - col).exp()
    cosine = (image.detach() * text.detach()).sum(1)
    if problem.weight is None:
        return per_sample.mean(), per_sample, cosine, p_row, p_col
    removed = problem.weight == 0
    per_sample, p_row, p_col = (value.masked_fill(removed, 0) for value in (per_sample, p_row, p_col))
    return (problem.weight * per_sample).mean(), per_sample, cosine, p_row, p_col


def siglip_loss(problem: Problem, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(per_sample, cosine), [B], of a checked problem; rows of weight 0 hold anything in per_sample."""
    exact = problem.scale.dtype
    image, all_text = problem.image.to(exact), problem.all_text.to(exact)
    logits = problem.scale * _Product.apply(image, all_text) + bias
    rows = torch.arange(logits.shape[0], device=logits.device)
    sign = torch.ones_like(logits).index_put_((rows, problem.offset + rows), torch.full((), -1.0, dtype=exact, device=logits.device))
    losses = softplus(sign * logits, threshold=80)
    if problem.used is not None:
        losses = losses.masked_fill(~problem.used, 0)
    return losses.sum(1), (problem.image.detach().to(exact) * problem.text.detach().to(exact)).sum(1)


class _Product(torch.autograd.Function):
    """x y'. Autograd's own product would take its gradients in half precision where backward is called under autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x @ y.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ y, grad.T @ x


def _log_sum_and_own(logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """log sum_j exp of the columns that count, and the logit of the own pair, both [B]."""
    own = logits.diagonal(problem.offset)[: logits.shape[0]]
    if problem.used is not None:
        # a finite floor and not -inf: a row without any column would have a gradient of NaN
        logits = logits.masked_fill(~problem.used, torch.finfo(logits.dtype).min / 2)
    return torch.logsumexp(logits, 1), own
