"""Problems for the tile kernels and their answers: the definitions, dense and in float64."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from pipeline.kernels.gpu import gradients, sums
from pipeline.kernels.gpu.configs import Config, Tile
from pipeline.kernels.similarity import Gradients, Pairs, Sums

T = TypeVar("T", bound=tuple)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_TILE, _OTHER = Tile(32, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2)
# several strips, several chunks both ways, other tiles forward than backward
SMALL = Config(sums=_TILE, write=_OTHER, sigmoid=_OTHER, careful=_TILE, chunk=(48, 80), partials=1024)


class Answer(NamedTuple):
    """All that the two functions give, in float64 on the CPU."""

    row: Tensor
    col: Tensor
    cosine: Tensor
    dx: Tensor
    dy: Tensor
    ds: Tensor


def problem(
    rows: int, cols: int, width: int, s: float, dtype: torch.dtype, *, kind: str = "softmax", offset: int = 0, masked: bool = False, seed: int = 0
) -> tuple[Pairs, Gradients]:  # fmt: skip
    """Random unit rows, and gradients of the size that a mean over the rows gives them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (normalize(torch.randn(size, width, generator=generator), dim=1) for size in (rows, cols))
    used_x = used_y = None
    grad_row, grad_col, grad_own = (torch.rand(size, generator=generator).double() / rows for size in (rows, cols, rows))
    if masked:
        used_y = torch.rand(cols, generator=generator) < 0.7
        used_x = used_y[offset : offset + rows].clone()
        x, y = x * used_x[:, None], y * used_y[:, None]
        grad_row, grad_col, grad_own = grad_row * used_x, grad_col * used_y, grad_own * used_x
    if kind != "softmax":
        grad_col = grad_col[:0]
    bias = torch.tensor(-7.0) if kind == "sigmoid" else None
    return moved(Pairs(x.to(dtype), y.to(dtype), torch.tensor(s), bias, used_x, used_y, offset, kind)), moved(
        Gradients(grad_row, grad_col, -grad_own.float())
    )


def moved(values: T, device: torch.device = DEVICE) -> T:
    """A named tuple with its tensors on a device."""
    return type(values)(*(value.to(device) if isinstance(value, Tensor) else value for value in values))


def answer(pairs: Pairs, given: Gradients, col: Tensor | None = None) -> Answer:
    """By definition; `col` replaces the column sums for the gradients."""
    pairs, given = moved(pairs, torch.device("cpu")), moved(given, torch.device("cpu"))
    x, y, s = pairs.x.double(), pairs.y.double(), pairs.scale.double()
    cosines = x @ y.T
    own = torch.zeros_like(cosines, dtype=torch.bool)
    own.diagonal(pairs.offset)[: len(x)] = True
    used_x, used_y = (torch.ones(len(v), dtype=torch.bool) if used is None else used for v, used in ((x, pairs.used_x), (y, pairs.used_y)))
    logits = (s * cosines).masked_fill(own | ~(used_x[:, None] & used_y), -torch.inf)
    if pairs.kind == "sigmoid":
        logits = logits + pairs.bias.double()
        sigmoid = logits.sigmoid()
        row, sums_col, coefficient = softplus(logits, threshold=80).sum(1), sigmoid.sum(1), given.row[:, None] * sigmoid
    else:
        row, sums_col = logits.logsumexp(1), logits.logsumexp(0) if pairs.kind == "softmax" else logits.new_empty(0)
        coefficient = given.row[:, None] * (logits - row.nan_to_num(neginf=0)[:, None]).exp()
        if pairs.kind == "softmax":
            total = sums_col if col is None else col.cpu()
            coefficient = coefficient + given.col * (logits - total.nan_to_num(neginf=0)).exp()
    whole = s * coefficient + own * given.own[:, None].double()
    return Answer(row, sums_col, cosines[own], whole @ y, whole.T @ x, (coefficient * cosines).sum())


def found(pairs: Pairs, given: Gradients, config: Config | None = SMALL, wide: bool = True) -> tuple[Sums, Answer]:
    """What the kernels say, and the same as an answer."""
    result = sums(pairs, config=config)
    dx, dy, ds = gradients(pairs, result, given, wide=wide, config=config)
    assert (dx.dtype, dy.dtype) == (pairs.x.dtype, torch.float32 if wide else pairs.y.dtype)
    assert (result.row.dtype, result.col.dtype, result.cosine.dtype) == (torch.float64, torch.float64, torch.float32)
    return result, Answer(*(value.double().cpu() for value in (result.row, result.col, result.cosine, dx, dy, ds)))


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm."""
    assert value.shape == truth.shape and value.isfinite().all()
    return ((value.double().cpu() - truth).norm() / truth.norm()).item()
