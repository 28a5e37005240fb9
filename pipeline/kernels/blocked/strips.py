"""What every pass over strips of rows on a CPU shares."""

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
_ELEMENTS = 2**18  # of a block of element-wise work: what it reads and writes stays in a 1 to 2 MB cache
_STRIP = 1024  # rows of a strip; with fewer the columns' gradients are added up more often


def strip_rows(rows: int) -> int:
    """Rows of a strip: a quarter of few rows, so that the square never exists."""
    return min(_STRIP, max(16, rows // 4))


def block_rows(total: int) -> int:
    """Rows of a block of element-wise work on `total` columns."""
    return max(1, _ELEMENTS // max(1, total))


def write_logits(out: Tensor, x: Tensor, y: Tensor, factor: float, shift: float, offset: int) -> None:
    """factor x y' - shift into `out`, the own pairs -inf; the shift rides on the accumulator and is not rounded with the product."""
    if shift:
        out.fill_(-shift)
    out.addmm_(x, y.T, alpha=factor, beta=1 if shift else 0)
    out.diagonal(offset).fill_(-torch.inf)


def row_dots(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """<a_i, b_i>, [B]; by pieces, so that the widened copies stay in the cache."""
    result = torch.empty(a.shape[0], dtype=exact)
    for k in range(0, a.shape[0], 256):
        torch.sum(a[k : k + 256].to(exact) * b[k : k + 256].to(exact), 1, out=result[k : k + 256])
    return result


def widened(block: Tensor, out: Tensor) -> Tensor:
    """The block itself, or its copy in the wider dtype of `out`."""
    return block if block.dtype == out.dtype else out.copy_(block)


def workable(dtype: torch.dtype) -> torch.dtype:
    """float16 products are a hundred times slower than float32 ones on a CPU, bfloat16 ones where oneDNN has none."""
    if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
