"""Host code: which kernel runs on which part of the matrix. Sizes come from shapes alone, nothing is read from the device."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from pipeline.kernels.gpu import tiles, vectors
from pipeline.kernels.gpu.configs import Config, Tile, choose
from pipeline.kernels.similarity import Gradients, Pairs, Sums

__all__ = ["gradients", "kept", "on", "sums"]

_KINDS = {"softmax": 0, "rows": 1, "sigmoid": 2}
_HEADROOM = 70.0  # nats: e^70 summed over 10^8 columns is finite in float32
_FAINT = 2.0**-104  # a sum below so much for every term may have lost a millionth to underflow
_UNIT = 4096.0  # the largest coefficient of P: far from float16's overflow, and p = 2^-26 is still a normal number
_IDLE = 1024  # programs of a careful kernel, which most often have nothing to do: enough to fill a GPU where they have
REDUCE = {"DEPTH": 32, "WIDTH": 64, "num_warps": 4}
FINISH = {"HEIGHT": 8, "WIDTH": 128, "num_warps": 4}
WIDTH = 256  # of a program on a vector


def kept(x: Tensor, y: Tensor) -> int:
    """Rows whose logits `sums` keeps for `gradients`: none, forming them again costs less than storing them."""
    return 0


def sums(pairs: Pairs, keep: bool = False, config: Config | None = None) -> Sums:
    """One pass over the pairs: float32 sums within a tile, float64 from there on, in an order that never changes.

    The shift is max(0, |s| - 70) nats. Where a used row or column under- or overflows all the same (every cosine but its own below -0.4
    at s = 100, or none there at all) a second pass takes two maxima. The device decides, and `shift` is NaN then.
    """
    p = _prepared(pairs)
    rows, cols, kind = p.x.shape[0], p.y.shape[0], _KINDS[p.kind]
    config = config or choose(p.x.device, p.x.dtype, rows, cols, p.x.shape[1])
    found = Sums(
        row=p.x.new_empty(rows, dtype=torch.float64),
        col=p.x.new_empty((cols, 0, rows)[kind], dtype=torch.float64),
        cosine=p.x.new_empty(rows, dtype=torch.float32),
        shift=torch.zeros_like(p.scale) if kind == 2 else ((p.scale.abs() - _HEADROOM) * math.log2(math.e)).clamp_min(0),
        logits=p.x.new_empty(0, 0),
    )
    with on(p.x.device):
        _pass(p, found, config.sigmoid if kind == 2 else config.sums, config.partials, careful=False)
        if kind != 2:  # a sigmoid neither under- nor overflows
            _pass(p, found, config.careful, config.partials, careful=True)
    return found


def _pass(p: Pairs, found: Sums, tile: Tile, budget: int, careful: bool) -> None:
    """Strip by strip of rows, so that the partial sums stay within the budget."""
    rows, cols, kind = p.x.shape[0], p.y.shape[0], _KINDS[p.kind]
    strip = _strip(rows, cols, tile, budget)
    across, down = triton.cdiv(cols, tile.cols), triton.cdiv(strip, tile.rows)
    row_parts = p.x.new_empty(across * strip, dtype=torch.float32)
    col_parts = p.x.new_empty((down * cols, 0, across * strip)[kind], dtype=torch.float32)
    for first in range(0, rows, strip):
        here = slice(first, min(first + strip, rows))
        part = p._replace(x=p.x[here], used_x=None if p.used_x is None else p.used_x[here], offset=p.offset + first)
        height = part.x.shape[0]
        kernel = tiles.careful_sums_kernel if careful else tiles.sums_kernel
        _launch(kernel, part, found.shift, (row_parts, col_parts, found.cosine[here]), (), tile, careful)
        _reduce(row_parts, found.row[here], found.shift, part.used_x, across, cols, True, True, kind, careful)
        if kind == 2:
            _reduce(col_parts, found.col[here], found.shift, part.used_x, across, cols, True, True, kind, careful)
        elif kind == 0:
            ends = (first == 0, here.stop == rows)
            _reduce(col_parts, found.col, found.shift, p.used_y, triton.cdiv(height, tile.rows), rows, *ends, kind, careful)


def gradients(
    pairs: Pairs,
    found: Sums,
    given: Gradients,
    need_x: bool = True,
    need_y: bool = True,
    wide: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P is formed again a chunk at a time, in the dtype of the rows; the products with it are the library's, accumulated in float32.

    The coefficients of P are scaled to at most 4096, so that 1/B does not underflow in float16; that comes off again in float32.
    float32 rows are multiplied as `torch.backends.cuda.matmul` says, which is not TF32 unless the user asks for it.
    """
    p = _prepared(pairs)
    rows, cols, width = p.x.shape[0], p.y.shape[0], p.x.shape[1]
    config = config or choose(p.x.device, p.x.dtype, rows, cols, width)
    own, by_row = given.own.contiguous(), need_x or not need_y  # by_row: which side gives the gradient of the scale
    height, breadth = min(config.chunk[0], rows), min(config.chunk[1], cols)
    probabilities = p.x.new_empty(height, triton.cdiv(breadth, 64) * 64)  # aligned rows, also where N is odd
    wide_x = p.x.new_empty((height, width) if by_row else (0, width), dtype=torch.float32)
    wide_y = p.y.new_empty((cols, width) if need_y else (0, width), dtype=torch.float32)
    dx = torch.empty_like(p.x) if need_x else None
    dots = p.x.new_empty(rows if by_row else cols, dtype=torch.float32)
    with on(p.x.device):
        unit, by_x, by_y = _coefficients(p, found, given)
        for r in range(0, rows, height):
            down = slice(r, min(r + height, rows))
            x = p.x[down]
            for c in range(0, cols, breadth):
                across = slice(c, min(c + breadth, cols))
                part = _part(p, down, across)
                chunk = probabilities[: x.shape[0], : part.y.shape[0]]
                _write(part, found.shift, [v[down] for v in by_x], [v[across] for v in by_y], chunk, config)
                if by_row:
                    _add_product(wide_x[: x.shape[0]], chunk, part.y, c == 0)
                if need_y:
                    _add_product(wide_y[across], chunk.T, x, r == 0)
            if by_row:
                out = None if dx is None else dx[down]
                _finish(wide_x, x, p.y, own[down], True, p.scale, unit, out, dots[down], p.offset + r)
        dy = (wide_y if wide or p.y.dtype == torch.float32 else torch.empty_like(p.y)) if need_y else None
        if need_y:
            _finish(wide_y, p.y, p.x, own, False, p.scale, unit, dy, None if by_row else dots, -p.offset)
    empty = p.x.new_empty(0)
    return empty if dx is None else dx, empty if dy is None else dy, dots.sum(dtype=torch.float64).to(p.scale.dtype)


def _coefficients(p: Pairs, found: Sums, given: Gradients) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The unit, and (factor, log2 sum) of the rows and of the columns, float32; the columns have none unless their sums were wanted."""
    grads = (given.row, given.col) if p.kind == "softmax" else (given.row,)
    largest = torch.stack([grad.abs().amax() for grad in grads]).amax()
    unit = torch.where(largest > 0, (_UNIT / largest).clamp_max(1e30), 1.0).float()
    sides = []
    for log, grad in zip((found.row, found.col), grads):
        factor, log2 = (torch.empty_like(grad, dtype=torch.float32, memory_format=torch.contiguous_format) for _ in range(2))
        size, exp = grad.shape[0], p.kind != "sigmoid"
        vectors.coefficients_kernel[(triton.cdiv(size, WIDTH),)](
            log.contiguous(), grad.contiguous(), unit, found.shift, factor, log2, size, EXP=exp, WIDTH=WIDTH
        )
        sides.append((factor, log2))
    return unit, sides[0], sides[1] if len(sides) == 2 else ()


def _write(part: Pairs, shift: Tensor, by_x: list[Tensor], by_y: list[Tensor], chunk: Tensor, config: Config) -> None:
    beta, col = by_y or (None, None)
    stride, tile = (chunk.stride(0),), config.sigmoid if part.kind == "sigmoid" else config.write
    _launch(tiles.write_kernel, part, shift, (by_x[0], beta, chunk), stride, tile, False)
    if part.kind != "sigmoid":
        _launch(tiles.careful_write_kernel, part, shift, (by_x[0], beta, by_x[1], col, chunk), stride, config.careful, True)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b in float32, or total = a b."""
    beta = 0.0 if first else 1.0
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.device.type == "cpu":  # under the interpreter
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)


def _finish(
    wide: Tensor, own_side: Tensor, other: Tensor, own: Tensor, by_self: bool, scale: Tensor, unit: Tensor,
    out: Tensor | None, dots: Tensor | None, offset: int,
) -> None:  # fmt: skip
    rows, width = own_side.shape
    vectors.finish_kernel[(triton.cdiv(rows, FINISH["HEIGHT"]),)](
        wide, own_side, other, own, scale, unit, out, dots, rows, other.shape[0], width, offset, BY_SELF=by_self, **FINISH
    )


def _launch(kernel: triton.JITFunction, p: Pairs, shift: Tensor, vectors: tuple, rest: tuple, tile: Tile, careful: bool) -> None:
    (rows, width), cols = p.x.shape, p.y.shape[0]
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    edges = p.used_x is not None or p.used_y is not None or rows % tile.rows != 0 or cols % tile.cols != 0
    kernel[(min(blocks, _IDLE) if careful else blocks,)](
        p.x, p.y, p.scale, p.bias, p.used_x, p.used_y, shift, *vectors, rows, cols, width, p.offset, *rest,
        KIND=_KINDS[p.kind], BM=tile.rows, BN=tile.cols, BK=tile.depth, EVEN_K=width % tile.depth == 0, EDGES=edges,
        WIDEN=p.x.dtype == torch.bfloat16 and p.x.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _reduce(
    parts: Tensor, out: Tensor, shift: Tensor, used: Tensor | None, count: int, terms: int,
    first: bool, last: bool, kind: int, careful: bool,
) -> None:  # fmt: skip
    size = out.shape[0]
    grid = (triton.cdiv(size, REDUCE["WIDTH"]),)
    if careful:
        vectors.careful_reduce_kernel[grid](parts, out, shift, count, size, int(first), int(last), **REDUCE)
    else:
        faint = terms * _FAINT
        vectors.reduce_kernel[grid](parts, out, shift, used, count, size, faint, int(first), int(last), LOG=kind != 2, **REDUCE)


def _strip(rows: int, cols: int, tile: Tile, budget: int) -> int:
    """Rows of a strip: whole row blocks whose partial sums fit the budget."""
    each = 4 * cols * (1 / tile.cols + 1 / tile.rows)
    return min(rows, max(1, int(budget / each) // tile.rows) * tile.rows)


def _part(p: Pairs, down: slice, across: slice) -> Pairs:
    used = (None if p.used_x is None else p.used_x[down], None if p.used_y is None else p.used_y[across])
    return p._replace(x=p.x[down], y=p.y[across], used_x=used[0], used_y=used[1], offset=p.offset + down.start - across.start)


def _prepared(pairs: Pairs) -> Pairs:
    """The pairs as the kernels read them: contiguous, the scalars in float32, the masks as bytes."""
    device = pairs.x.device
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"impl 'triton': the rows are on {device}; expected a CUDA device, or TRITON_INTERPRET=1 set before the first import"
        )
    if pairs.x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"impl 'triton': rows are {pairs.x.dtype}; expected float16, bfloat16 or float32 (impl='reference' takes float64)")
    scale, bias = (None if value is None else value.detach().float().contiguous() for value in (pairs.scale, pairs.bias))
    used_x, used_y = (None if value is None else value.contiguous().view(torch.uint8) for value in (pairs.used_x, pairs.used_y))
    x, y = pairs.x.detach().contiguous(), pairs.y.detach().contiguous()
    return pairs._replace(x=x, y=y, scale=scale, bias=bias, used_x=used_x, used_y=used_y)


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
