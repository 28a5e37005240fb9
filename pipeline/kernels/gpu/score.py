"""The tail of selection in three kernels: cosines of rows of any norm, what a visit changes, and its record in the table.

The results are `pipeline.kernels.score`'s bit for bit where the cosine is given: products are not contracted with sums, divisions are
rounded, and the choice itself is its code. What it does in twenty operations on the table is one kernel here, without scratch paper: a
row compares its slot with those of the whole group, g^2 comparisons of which a GPU does a million in a microsecond.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.hashing import hash_ids
from pipeline.kernels.gpu.launch import on
from pipeline.kernels.score import Scored, check_keep, check_slots, top_k_torch

__all__ = ["cosine", "score"]

COSINE = {"HEIGHT": 4, "WIDTH": 256, "num_warps": 4}
LOOK = {"WIDTH": 256, "num_warps": 4, "debug": True, "enable_fp_fusion": False}  # debug: with its assertion
RECORD = {"HEIGHT": 32, "WIDTH": 128, "num_warps": 4, "enable_fp_fusion": False}


def cosine(image: Tensor, text: Tensor) -> Tensor:
    """Row-wise cosine, float32 [B] in [-1, 1], of [B, D] in any floating dtype; a row of zeros has 0, a row with NaN has NaN."""
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(f"cosine: expected image and text of one shape [B, D], found {tuple(image.shape)} and {tuple(text.shape)}")
    rows, width = image.shape
    out = image.new_empty(rows, dtype=torch.float32)
    image, text = image.detach().contiguous(), text.detach().contiguous()
    with on(image.device):
        cosine_kernel[(triton.cdiv(rows, COSINE["HEIGHT"]),)](image, text, out, rows, width, **COSINE)
    return out


def score(
    cosine: Tensor,
    *,
    slot: Tensor,
    history: Tensor,
    visits: Tensor,
    keep: int | None = None,
    sample: Tensor | None = None,
    valid: Tensor | None = None,
    momentum: float | None = None,
    freeze: int | None = None,
    mean: bool = False,
    seed: int = 0,
) -> Scored:
    """`pipeline.kernels.score.score`, same arguments and same result. A slot outside of the table stops the device with an assertion."""
    if cosine.dim() != 1 or slot.shape != cosine.shape:
        raise ValueError(f"score: expected cosine [g] and slot [g], found {tuple(cosine.shape)} and {tuple(slot.shape)}")
    rows = slot.shape[0]
    check_keep(keep, rows)
    slot, valid = slot.contiguous(), None if valid is None else valid.contiguous().view(torch.uint8)
    current, before, change, pool = (cosine.new_empty(rows, dtype=torch.float32) for _ in range(4))
    count, countable = (cosine.new_empty(rows, dtype=torch.uint8) for _ in range(2))
    visit = (slot, history, visits, valid, current, before, count, countable)
    if slot.device.type == "cpu":  # the interpreter leaves the kernel's assertion out
        check_slots(slot.numpy(), history.numpy())
    with on(slot.device):
        look_kernel[(triton.cdiv(rows, LOOK["WIDTH"]),)](
            cosine.detach().float().contiguous(), *visit, change, pool, rows, history.shape[0], **LOOK
        )
    known, counts = count > 0, countable.view(torch.bool)
    # of one dimension: the median of everything may be read back by the host to index with it
    differential = torch.where(known, change, pool.nanmedian(0).values.nan_to_num(0.0))
    chosen = None
    if keep is not None:
        lot = hash_ids(seed, (slot if sample is None else sample) * 256 + count)
        chosen = top_k_torch(differential, keep, lot, counts)
    weight = float(momentum or 0)
    with on(slot.device):
        record_kernel[(triton.cdiv(rows, RECORD["HEIGHT"]),)](
            *visit[:3], *visit[4:], rows, weight, 1 - weight, -1 if freeze is None else freeze,
            MEAN=mean, MOMENTUM=momentum is not None and not mean, **RECORD,
        )  # fmt: skip
    return Scored(chosen, differential, current, before, known)


@triton.jit(do_not_specialize=["rows"])
def cosine_kernel(IMAGE, TEXT, OUT, rows, D, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """<a, b> / |a| / |b| of HEIGHT rows, one norm after the other: the product of two small ones could be 0."""
    i = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    dot, image_square, text_square = tl.zeros((HEIGHT,), tl.float32), tl.zeros((HEIGHT,), tl.float32), tl.zeros((HEIGHT,), tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        place = i.to(tl.int64)[:, None] * D + d[None, :]
        mask = (i < rows)[:, None] & (d < D)[None, :]
        image = tl.load(IMAGE + place, mask=mask, other=0.0).to(tl.float32)
        text = tl.load(TEXT + place, mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(image * text, 1)
        image_square += tl.sum(image * image, 1)
        text_square += tl.sum(text * text, 1)
    dot = tl.div_rn(tl.div_rn(dot, _norm(image_square)), _norm(text_square))
    dot = tl.where(dot > 1.0, 1.0, tl.where(dot < -1.0, -1.0, dot))  # minimum and maximum would lose a NaN
    tl.store(OUT + i, dot, mask=i < rows)


@triton.jit
def _norm(square):
    norm = tl.sqrt_rn(square)
    return tl.where(norm < 1.17549435e-38, 1.17549435e-38, norm)


@triton.jit(do_not_specialize=["rows", "total"])
def look_kernel(
    COSINE, SLOT, HISTORY, VISITS, VALID, CURRENT, BEFORE, COUNT, COUNTABLE, CHANGE, POOL, rows, total, WIDTH: tl.constexpr
):  # fmt: skip
    """Per row: the current score, the history and its visits, whether the row counts, and history minus score; POOL is that where it is
    known and counts, else NaN."""
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = i < rows
    slot = tl.load(SLOT + i, mask=inside, other=0)
    tl.device_assert((slot >= 0) & (slot < total), "score: a slot lies outside of the score table")
    cosine = tl.load(COSINE + i, mask=inside, other=0.0)
    countable = cosine == cosine
    if VALID is not None:
        countable = countable & (tl.load(VALID + i, mask=inside, other=0) != 0)
    current = cosine * 100.0
    current = tl.where(current <= 0.0, 0.0, current)
    before, count = tl.load(HISTORY + slot, mask=inside, other=0.0), tl.load(VISITS + slot, mask=inside, other=0)
    change = before - current
    tl.store(CURRENT + i, current, mask=inside)
    tl.store(BEFORE + i, before, mask=inside)
    tl.store(COUNT + i, count, mask=inside)
    tl.store(COUNTABLE + i, countable.to(tl.uint8), mask=inside)
    tl.store(CHANGE + i, change, mask=inside)
    tl.store(POOL + i, tl.where((count > 0) & countable, change, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["rows", "freeze"])
def record_kernel(
    SLOT, HISTORY, VISITS, CURRENT, BEFORE, COUNT, COUNTABLE, rows, momentum, rest, freeze,
    MEAN: tl.constexpr, MOMENTUM: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`update_history`: the rows of one sample find out how many of them count and which comes last (or first, where the history freezes
    with this visit), and then all of them write the same."""
    i = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    inside = i < rows
    slot, before = tl.load(SLOT + i, mask=inside, other=-1), tl.load(BEFORE + i, mask=inside, other=0.0)
    count = tl.load(COUNT + i, mask=inside, other=0).to(tl.int32)
    more, last = tl.full((HEIGHT,), 0, tl.int32), tl.full((HEIGHT,), -1, tl.int32)
    first = tl.full((HEIGHT,), 2147483647, tl.int32)
    for start in range(0, rows, WIDTH):
        j = start + tl.arange(0, WIDTH)
        other = tl.load(SLOT + j, mask=j < rows, other=-2)
        counts = tl.load(COUNTABLE + j, mask=j < rows, other=0) != 0
        same = (slot[:, None] == other[None, :]) & counts[None, :]
        more += tl.sum(same.to(tl.int32), 1)
        last = tl.maximum(last, tl.max(tl.where(same, j[None, :], -1), 1))
        first = tl.minimum(first, tl.min(tl.where(same, j[None, :], 2147483647), 1))
    written = inside & (more > 0) & ((freeze < 0) | (count < freeze))
    new = tl.load(CURRENT + tl.where(count == freeze - 1, first, last), mask=written, other=0.0)
    if MEAN:
        new = before + tl.div_rn(new - before, count.to(tl.float32) + 1.0)
    if MOMENTUM:
        new = tl.where(count > 0, momentum * before + rest * new, new)
    tl.store(HISTORY + slot, new, mask=written)
    tl.store(VISITS + slot, tl.minimum(count + more, 255).to(tl.uint8), mask=inside)
