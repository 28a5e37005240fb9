"""The symmetric contrastive loss of CLIP behind one function, with what selection wants to know about every pair at no extra pass."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn.functional import softplus

from pipeline.distributed.comm import Comm
from pipeline.kernels import ranks, reference
from pipeline.kernels.checks import Problem, checked, choose
from pipeline.kernels.similarity import Pairs, similarity

__all__ = ["ClipLoss", "clip_loss"]


class ClipLoss(NamedTuple):
    """What `clip_loss` returns. All but `loss` is detached; a row whose weight is 0 has 0 in `per_sample`, `p_row` and `p_col`."""

    loss: Tensor  # [], float32 (float64 for float64 rows), differentiable
    per_sample: Tensor  # [B], l_i in nats, not weighted
    cosine: Tensor  # [B], <image_i, text_i>
    p_row: Tensor  # [B], softmax probability of the own text among all texts
    p_col: Tensor  # [B], softmax probability of the own image among all images
    delta: Tensor | None  # [B], history_i - 100 max(cosine_i, 0); None without history


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    columns: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    weights: Tensor | None = None,
    history: Tensor | None = None,
    comm: Comm | None = None,
    impl: str = "auto",
) -> ClipLoss:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3) with per-sample outputs.

    `image`, `text`: unit rows [B, D] of one dtype (float16, bfloat16, float32, float64). `logit_scale`: the scale s itself and not its
    logarithm, a number or a floating tensor of shape () or (1,). With s_ij = s <image_i, text_j>, s'_ij = s <text_i, image_j>:

        l_i = (log sum_j exp s_ij + log sum_j exp s'_ij - s_ii - s'_ii) / 2,    loss = (1/B) sum_i w_i l_i

    The columns j are the local rows; or `columns`, (image, text) rows [N, D] in which local row i is column `offset` + i; or with `comm`
    the rows of all ranks, B on each: one B x N similarity per rank, whose mean over ranks of loss and gradients is that of the whole.
    `weights` w >= 0 are [B], or [N] with the local ones at `offset` (1 by default); w_i = 0 removes row i as a row and as a column,
    whatever it holds. `history` [B] is on the 100 cos scale. Gradients reach image, text, columns and the scale, not the weights.

    `impl`: "reference" (plain torch, stores B x N), "blocked" (CPU) and "triton" (CUDA; extra `triton`), which never do and have no
    second derivative, or "auto": those for large problems, else the reference. The dtype of the rows alone decides the arithmetic,
    autocast does not reach inside: the reference widens half precision to float32; blocked multiplies bfloat16 rows as they are, with
    logits rounded to 8 bits around a typical logit, so that at s = 100 gradients have at most 0.65 of the error of bfloat16 logits;
    triton accumulates in float32. All outputs are float32 (float64 for float64 rows). Raises ValueError for what does not fit, and
    says what was expected; ModuleNotFoundError where an extra is missing.
    """
    problem = checked(image, text, logit_scale, columns, offset, weights, comm, "clip_loss")
    if history is not None and history.shape != (image.shape[0],):
        raise ValueError(f"clip_loss: expected history [{image.shape[0]}], found {tuple(history.shape)}")
    chosen = choose(impl, problem, "clip_loss")
    with torch.autocast(image.device.type, enabled=False), record_function("kernels.clip_loss"):
        if chosen == "reference":
            loss, per_sample, cosine, p_row, p_col = reference.clip_loss(ranks.with_columns(problem))
        else:
            loss, per_sample, cosine, p_row, p_col = _tiled(problem, chosen)
        cosine = cosine.detach()
        delta = None if history is None else history.detach() - 100 * cosine.clamp_min(0)
    return ClipLoss(loss, per_sample.detach(), cosine, p_row.detach(), p_col.detach(), delta)


def _tiled(problem: Problem, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], per_sample, cosine, p_row, p_col [B]). The sums leave the own pairs out: l = log(1 + exp(log-sum - own)) cannot cancel."""
    image, text, used, here = problem.image, problem.text, problem.used, slice(problem.offset, problem.offset + problem.image.shape[0])
    mine = None if used is None else used[here]
    if problem.comm.size > 1:
        row, col, cosine = ranks.similarity(image, text, problem.scale, mine, problem.comm, impl)
    elif problem.square:
        row, col, cosine = similarity(Pairs(image, text, problem.scale, None, mine, used), impl)
    else:
        rest = (problem.scale, None, mine, used, problem.offset, "rows")
        row, _, cosine = similarity(Pairs(image, problem.all_text, *rest), impl)
        col, _, other_cosine = similarity(Pairs(text, problem.all_image, *rest), impl)
    own = problem.scale * cosine
    other_own = own if problem.square else problem.scale * other_cosine
    margins = row - own, col - other_own  # float64
    # without a threshold under 80 softplus would drop e^-20 of its argument
    per_sample = sum(softplus(margin, threshold=80) for margin in margins) / 2
    if problem.weight is None:
        loss = per_sample.mean()
    else:
        loss = (per_sample * problem.weight).mean()
    p_row, p_col = (torch.sigmoid(-margin) for margin in margins)
    if mine is not None:
        per_sample, p_row, p_col = (value.masked_fill(~mine, 0) for value in (per_sample, p_row, p_col))
    exact = problem.scale.dtype
    return loss.to(exact), per_sample.to(exact), cosine, p_row.to(exact), p_col.to(exact)
