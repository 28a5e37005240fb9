"""What the losses ask of their arguments, and which implementation a call takes."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.distributed.comm import Comm, LocalComm
from pipeline.kernels.similarity import IMPLEMENTATIONS

_TILED_FROM = 256  # rows and columns; with fewer the reference is faster, its one matrix fits the cache
_DEVICE = {"blocked": "cpu", "triton": "cuda"}


class Problem(NamedTuple):
    """One checked call; rows of weight 0 are zeroed already."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    scale: Tensor  # [], float32 or float64
    all_image: Tensor  # [N, D]
    all_text: Tensor  # [N, D]
    offset: int
    weight: Tensor | None  # [B], dtype of the scale; None: all 1
    used: Tensor | None  # bool [N], columns that count; None: all
    square: bool  # the columns are the local rows themselves, on this rank or on all
    comm: Comm  # of size 1 unless the columns are those of all ranks


def checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    columns: tuple[Tensor, Tensor] | None,
    offset: int,
    weights: Tensor | None,
    comm: Comm | None,
    what: str,
) -> Problem:
    """The arguments as a `Problem`. Raises ValueError that begins with `what`, for everything that does not fit."""
    if comm is not None and (columns is not None or offset):
        raise ValueError(f"{what}: expected comm or columns and offset, found both; with comm the columns are the rows of all ranks")
    all_image, all_text = (image, text) if columns is None else columns
    _check_rows(image, text, what, "image and text", "[B, D]")
    _check_rows(all_image, all_text, what, "columns", "[N, D]")
    rows, total = image.shape[0], all_image.shape[0]
    if all_image.shape[1] != image.shape[1] or all_image.dtype != image.dtype:
        raise ValueError(f"{what}: rows are {_kind(image)} and columns {_kind(all_image)}; expected one width and one dtype")
    if not 0 <= offset <= total - rows:
        raise ValueError(f"{what}: offset {offset} puts {rows} local rows outside of {total} columns; expected 0 to {total - rows}")
    scale = scalar(logit_scale, image, what, "logit_scale")
    square = columns is None or (all_image is image and all_text is text)
    comm = comm or LocalComm()
    if weights is None:
        return Problem(image, text, scale, all_image, all_text, offset, None, None, square, comm)
    weight, used = _weights(weights, rows, total, offset, scale.dtype, what)
    # a row of weight 0 may hold anything, NaN too, and 0 times NaN is NaN
    image, text = (value.masked_fill(~used[offset : offset + rows, None], 0) for value in (image, text))
    all_image, all_text = (image, text) if square else (value.masked_fill(~used[:, None], 0) for value in (all_image, all_text))
    return Problem(image, text, scale, all_image, all_text, offset, weight, used, square, comm)


def scalar(value: Tensor | float, rows: Tensor, what: str, name: str) -> Tensor:
    """A number or tensor of shape () or (1,) as a tensor [], float64 for float64 rows and else float32. Raises ValueError."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    # filled where it is needed: a copy to the device would wait for it
    found = value if isinstance(value, Tensor) else torch.full((), float(value), dtype=exact, device=rows.device)
    if found.shape not in ((), (1,)) or not found.is_floating_point():
        raise ValueError(f"{what}: expected {name} as a number or a floating tensor of shape () or (1,), found {_kind(found)}")
    return found.reshape(()).to(rows.device, exact)


def choose(impl: str, problem: Problem, what: str) -> str:
    """The implementation for `impl`, "auto" resolved. Raises ValueError for one that is unknown or for another device."""
    device, known = problem.image.device.type, ("reference", *IMPLEMENTATIONS)
    if impl == "auto":
        few = problem.image.shape[0] * problem.comm.size * problem.all_image.shape[0] < _TILED_FROM**2
        if few or device not in _DEVICE.values() or (device == "cuda" and problem.image.dtype == torch.float64):
            return "reference"
        return "blocked" if device == "cpu" else "triton"
    if impl not in known:
        raise ValueError(f"{what}: unknown impl {impl!r}; known: auto, {', '.join(known)}")
    if impl != "reference" and _DEVICE[impl] != device and not interpreted(impl):
        where = "the CPU" if _DEVICE[impl] == "cpu" else "CUDA devices"
        raise ValueError(f"{what}: impl {impl!r} runs on {where}, the rows are on {problem.image.device}; use 'reference' or 'auto'")
    return impl


def interpreted(impl: str) -> bool:
    """Whether Triton's interpreter runs the kernels, on any device (TRITON_INTERPRET=1 before they are imported)."""
    if impl != "triton" or find_spec("triton") is None:
        return False
    import triton

    return triton.knobs.runtime.interpret


def _check_rows(image: Tensor, text: Tensor, what: str, which: str, shape: str) -> None:
    if image.dim() != 2 or image.shape != text.shape or image.dtype != text.dtype or not image.is_floating_point():
        raise ValueError(f"{what}: expected {which} of one shape {shape} and one floating dtype, found {_kind(image)} and {_kind(text)}")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"{what}: {which} are empty: {_kind(image)}; expected at least one row and one column")


def _weights(weights: Tensor, rows: int, total: int, offset: int, exact: torch.dtype, what: str) -> tuple[Tensor, Tensor]:
    if weights.shape not in ((rows,), (total,)):
        raise ValueError(f"{what}: expected weights [{rows}] or [{total}], found {tuple(weights.shape)}")
    weights = weights.detach().to(exact)
    # on a GPU the question would wait for the device, and a compiler cannot answer it
    if weights.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((weights >= 0).all()):
        raise ValueError(f"{what}: weights must be 0 or more, found {weights[~(weights >= 0)][0].item()}")
    local = weights if weights.shape[0] == rows else weights[offset : offset + rows]
    used = torch.ones(total, dtype=torch.bool, device=weights.device)
    used[offset : offset + rows] = local > 0
    return local, (weights > 0 if weights.shape[0] == total else used)


def _kind(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
