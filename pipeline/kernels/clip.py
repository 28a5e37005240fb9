"""The symmetric contrastive loss of CLIP behind one function: its checks, its choice of implementation and what it returns."""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ClipLoss", "clip_loss"]

_IMPLEMENTATIONS = {"reference": "pipeline.kernels.reference", "blocked": "pipeline.kernels.blocked"}
_SEATS = ("triton",)  # named, not built in yet
_BLOCKED_FROM = 512  # rows and columns; with fewer the reference is as fast, its one matrix fits the cache


class ClipLoss(NamedTuple):
    """What `clip_loss` returns. All but `loss` is detached; a row whose weight is 0 has 0 in `per_sample`, `p_row` and `p_col`."""

    loss: Tensor  # [], float32 (float64 for float64 rows), differentiable
    per_sample: Tensor  # [B], l_i in nats, not weighted
    cosine: Tensor  # [B], <image_i, text_i>
    p_row: Tensor  # [B], softmax probability of the own text among all texts
    p_col: Tensor  # [B], softmax probability of the own image among all images
    delta: Tensor | None  # [B], history_i - 100 max(cosine_i, 0); None without history


class Problem(NamedTuple):
    """One checked call, as an implementation gets it; rows of weight 0 are zeroed already."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    scale: Tensor  # [], float32 or float64
    all_image: Tensor  # [N, D]
    all_text: Tensor  # [N, D]
    offset: int
    weight: Tensor | None  # [B], dtype of the logits; None: all 1
    used: Tensor | None  # bool [N], columns that count; None: all
    square: bool  # the columns are the local rows themselves


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    columns: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    weights: Tensor | None = None,
    history: Tensor | None = None,
    impl: str = "auto",
) -> ClipLoss:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3) with per-sample outputs.

    `image`, `text`: unit rows [B, D] of one dtype (float16, bfloat16, float32, float64). `logit_scale`: the scale s itself and not its
    logarithm, a number or a floating tensor of shape () or (1,). `columns`: the gathered (image, text) rows [N, D] of the same dtype in
    which local row i is column `offset` + i; by default the local rows. With s_ij = s <image_i, text_j>, s'_ij = s <text_i, image_j>:

        l_i = (log sum_j exp s_ij + log sum_j exp s'_ij - s_ii - s'_ii) / 2,    loss = (1/B) sum_i w_i l_i

    `weights` w >= 0 are [B], or [N] with the local ones at `offset` (1 by default); w_i = 0 removes row i as a row and as a column,
    whatever it holds. `history` [B] is on the 100 cos scale. Gradients reach image, text, columns and the scale, not the weights.

    `impl`: "reference" (plain torch, stores B x N), "blocked" (CPU, never does; no second derivative), or "auto": blocked for large
    problems on a CPU, else the reference. The dtype of the rows alone decides the arithmetic, autocast does not reach inside: the
    reference widens half precision to float32; blocked multiplies bfloat16 rows as they are, with logits rounded to 8 bits around a
    typical logit, so that at s = 100 gradients have at most 0.65 of the error of bfloat16 logits. All outputs are float32 (float64
    for float64 rows). Raises ValueError for what does not fit, and says what was expected.
    """
    problem = _checked(image, text, logit_scale, columns, offset, weights, history)
    module = import_module(_IMPLEMENTATIONS[_choice(impl, problem)])
    with torch.autocast(image.device.type, enabled=False):
        loss, per_sample, cosine, p_row, p_col = module.clip_loss(problem)
        cosine = cosine.detach()
        delta = None if history is None else history.detach() - 100 * cosine.clamp_min(0)
    return ClipLoss(loss, per_sample.detach(), cosine, p_row.detach(), p_col.detach(), delta)


def _choice(impl: str, problem: Problem) -> str:
    if impl in _IMPLEMENTATIONS:
        if impl == "blocked" and problem.image.device.type != "cpu":
            raise ValueError(f"clip_loss: impl 'blocked' runs on the CPU, the rows are on {problem.image.device}; use 'reference'")
        return impl
    if impl in _SEATS:
        raise ValueError(f"clip_loss: impl {impl!r} is not built in yet; use one of {', '.join(_IMPLEMENTATIONS)} or auto")
    if impl != "auto":
        raise ValueError(f"clip_loss: unknown impl {impl!r}; known: auto, {', '.join(_IMPLEMENTATIONS)}")
    large = problem.image.shape[0] * problem.all_image.shape[0] >= _BLOCKED_FROM**2
    return "blocked" if problem.image.device.type == "cpu" and large else "reference"


def _checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    columns: tuple[Tensor, Tensor] | None,
    offset: int,
    weights: Tensor | None,
    history: Tensor | None,
) -> Problem:
    all_image, all_text = (image, text) if columns is None else columns
    _check_rows(image, text, "image and text", "[B, D]")
    _check_rows(all_image, all_text, "columns", "[N, D]")
    rows, total = image.shape[0], all_image.shape[0]
    if all_image.shape[1] != image.shape[1] or all_image.dtype != image.dtype:
        raise ValueError(f"clip_loss: rows are {_kind(image)} and columns {_kind(all_image)}; expected one width and one dtype")
    if not 0 <= offset <= total - rows:
        raise ValueError(f"clip_loss: offset {offset} puts {rows} local rows outside of {total} columns; expected 0 to {total - rows}")
    if history is not None and history.shape != (rows,):
        raise ValueError(f"clip_loss: expected history [{rows}], found {tuple(history.shape)}")
    exact = torch.float64 if image.dtype == torch.float64 else torch.float32
    scale = logit_scale if isinstance(logit_scale, Tensor) else torch.tensor(float(logit_scale), dtype=exact)
    if scale.shape not in ((), (1,)) or not scale.is_floating_point():
        raise ValueError(f"clip_loss: expected logit_scale as a number or a floating tensor of shape () or (1,), found {_kind(scale)}")
    scale = scale.reshape(()).to(image.device, exact)
    square = columns is None or (all_image is image and all_text is text)
    if weights is None:
        return Problem(image, text, scale, all_image, all_text, offset, None, None, square)
    weight, used = _weights(weights, rows, total, offset, exact)
    # a row of weight 0 may hold anything, NaN too, and 0 times NaN is NaN
    image, text = (value.masked_fill(~used[offset : offset + rows, None], 0) for value in (image, text))
    all_image, all_text = (image, text) if square else (value.masked_fill(~used[:, None], 0) for value in (all_image, all_text))
    return Problem(image, text, scale, all_image, all_text, offset, weight, used, square)


def _check_rows(image: Tensor, text: Tensor, what: str, shape: str) -> None:
    if image.dim() != 2 or image.shape != text.shape or image.dtype != text.dtype or not image.is_floating_point():
        raise ValueError(f"clip_loss: expected {what} of one shape {shape} and one floating dtype, found {_kind(image)} and {_kind(text)}")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"clip_loss: {what} are empty: {_kind(image)}; expected at least one row and one column")


def _weights(weights: Tensor, rows: int, total: int, offset: int, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    if weights.shape not in ((rows,), (total,)):
        raise ValueError(f"clip_loss: expected weights [{rows}] or [{total}], found {tuple(weights.shape)}")
    weights = weights.detach().to(exact)
    if weights.device.type == "cpu" and not bool((weights >= 0).all()):  # on a GPU the question would wait for the device
        raise ValueError(f"clip_loss: weights must be 0 or more, found {weights[~(weights >= 0)][0].item()}")
    local = weights if weights.shape[0] == rows else weights[offset : offset + rows]
    used = torch.ones(total, dtype=torch.bool, device=weights.device)
    used[offset : offset + rows] = local > 0
    return local, (weights > 0 if weights.shape[0] == total else used)


def _kind(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
