"""SigLIP's pairwise sigmoid loss through the same tiles: no normaliser, so rows need nothing of the other side's sums."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn.functional import softplus

from pipeline.distributed.comm import Comm
from pipeline.kernels import ranks, reference
from pipeline.kernels.checks import Problem, checked, choose, scalar
from pipeline.kernels.similarity import Pairs, similarity

__all__ = ["SiglipLoss", "siglip_loss"]


class SiglipLoss(NamedTuple):
    """What `siglip_loss` returns. All but `loss` is detached; a row whose weight is 0 has 0 in `per_sample`."""

    loss: Tensor  # [], float32 (float64 for float64 rows), differentiable
    per_sample: Tensor  # [B], l_i in nats, not weighted
    cosine: Tensor  # [B], <image_i, text_i>


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    columns: Tensor | None = None,
    offset: int = 0,
    weights: Tensor | None = None,
    comm: Comm | None = None,
    impl: str = "auto",
) -> SiglipLoss:
    """The sigmoid loss of SigLIP (arXiv 2303.15343, algorithm 1) with per-sample outputs.

    With s_ij = s <image_i, text_j> + b and z_ij = 1 for the own text and -1 for every other:

        l_i = sum_j log(1 + exp(-z_ij s_ij)),    loss = (1/B) sum_i w_i l_i

    Arguments, dtypes, implementations and errors are those of `clip_loss`; `columns` are text rows [N, D] alone. w_i = 0 removes row i
    as a row and as a column. Gradients reach image, text, columns, scale and bias.
    """
    given = None if columns is None else (columns, columns)
    problem = checked(image, text, logit_scale, given, offset, weights, comm, "siglip_loss")
    bias, chosen = scalar(logit_bias, image, "siglip_loss", "logit_bias"), choose(impl, problem, "siglip_loss")
    with torch.autocast(image.device.type, enabled=False), record_function("kernels.siglip_loss"):
        if chosen == "reference":
            per_sample, cosine = reference.siglip_loss(ranks.with_columns(problem), bias)
        else:
            per_sample, cosine = _tiled(problem, bias, chosen)
        if problem.weight is None:
            return SiglipLoss(per_sample.mean(), per_sample.detach(), cosine.detach())
        per_sample = per_sample.masked_fill(problem.weight == 0, 0)
        return SiglipLoss((per_sample * problem.weight).mean(), per_sample.detach(), cosine.detach())


def _tiled(problem: Problem, bias: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """per_sample and cosine, [B]."""
    image, scale, used = problem.image, problem.scale, problem.used
    mine = None if used is None else used[problem.offset : problem.offset + image.shape[0]]
    if problem.comm.size > 1:
        others, _, cosine = ranks.similarity(image, problem.text, scale, mine, problem.comm, impl, bias=bias, kind="sigmoid")
    else:
        others, _, cosine = similarity(Pairs(image, problem.all_text, scale, bias, mine, used, problem.offset, "sigmoid"), impl)
    own = scale * cosine + bias
    return (others + softplus(-own.double(), threshold=80)).to(scale.dtype), cosine
