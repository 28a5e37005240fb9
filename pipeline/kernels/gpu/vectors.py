"""The kernels around the tiles: ordered sums of partial sums, coefficients of the gradient, and its last touch. All of them are O(B D)."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)


@triton.jit(do_not_specialize=["parts", "size", "first", "last"])
def reduce_kernel(PARTS, OUT, SHIFT, USED, parts, size, FAINT, first, last, LOG: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """Adds PARTS [parts, size] float32 into OUT [size] float64, always in the same order; the `first` strip overwrites OUT. With LOG the
    `last` one takes the logarithm in nats, and SHIFT becomes NaN where a used sum is FAINT (its largest terms may have underflowed), infinite
    or no number: programs may race for that, all of them write the same."""
    shift = tl.load(SHIFT)
    if shift != shift:
        return
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = n < size
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    if first == 0:
        total = tl.load(OUT + n, mask=inside, other=0.0)
    for start in range(0, parts, DEPTH):
        k = start + tl.arange(0, DEPTH)
        place = PARTS + k.to(tl.int64)[:, None] * size + n[None, :]
        total += tl.sum(tl.load(place, mask=(k < parts)[:, None] & inside[None, :], other=0.0).to(tl.float64), 0)
    if LOG and last != 0:
        counts = inside
        if USED is not None:
            counts = inside & (tl.load(USED + n, mask=inside, other=0) != 0)
        bad = counts & ~((total > FAINT) & (total < float("inf")))
        tl.store(SHIFT + tl.zeros_like(n), tl.full((WIDTH,), float("nan"), tl.float32), mask=bad)
        total = tl.log(total) + shift.to(tl.float64) * LN2
    tl.store(OUT + n, total, mask=inside)


@triton.jit(do_not_specialize=["parts", "size", "first", "last"])
def careful_reduce_kernel(PARTS, OUT, SHIFT, parts, size, first, last, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """As `reduce_kernel` for PARTS that are log2 sums; OUT holds log2 sums until the `last` strip, then nats."""
    shift = tl.load(SHIFT)
    if shift == shift:
        return
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = n < size
    top, total = tl.full((WIDTH,), LOWEST, dtype=tl.float32), tl.zeros((WIDTH,), dtype=tl.float64)
    if first == 0:
        before = tl.load(OUT + n, mask=inside, other=float("-inf"))
        top = tl.maximum(before.to(tl.float32), LOWEST)
        total = tl.exp((before - top.to(tl.float64)) * LN2)
    for start in range(0, parts, DEPTH):
        k = start + tl.arange(0, DEPTH)
        place = PARTS + k.to(tl.int64)[:, None] * size + n[None, :]
        part = tl.load(place, mask=(k < parts)[:, None] & inside[None, :], other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, 0))
        total = total * tl.exp2(top - higher).to(tl.float64) + tl.sum(tl.exp2(part - higher[None, :]).to(tl.float64), 0)
        top = higher
    result = tl.log(total) * LOG2E + top.to(tl.float64)
    if last != 0:
        result *= LN2
    tl.store(OUT + n, result, mask=inside)


@triton.jit(do_not_specialize=["size"])
def coefficients_kernel(LOG, GRAD, UNIT, SHIFT, FACTOR, LOG2, size, EXP: tl.constexpr, WIDTH: tl.constexpr):
    """FACTOR_i = UNIT GRAD_i e^(shift - LOG_i), float32, what a 2^(z - shift) is multiplied by. On the careful path, and without EXP, the
    exponential stays away, and LOG2 is LOG in units of log 2. A sum of nothing, LOG = -inf, has no gradient."""
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = n < size
    factor = tl.load(GRAD + n, mask=inside, other=0.0).to(tl.float64) * tl.load(UNIT).to(tl.float64)
    if EXP:
        shift = tl.load(SHIFT)
        log = tl.load(LOG + n, mask=inside, other=float("-inf"))
        empty = log == float("-inf")
        log = tl.where(empty, 0.0, log)
        tl.store(LOG2 + n, (log * LOG2E).to(tl.float32), mask=inside)
        factor = tl.where(empty, 0.0, factor)
        if shift == shift:
            factor *= tl.exp(tl.where(factor == 0, 0.0, shift.to(tl.float64) * LN2 - log))
    tl.store(FACTOR + n, factor.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["rows", "others", "OFFSET"])
def finish_kernel(
    WIDE, SELF, OTHER, OWN, SCALE, UNIT, OUT, DOT, rows, others, D, OFFSET,
    BY_SELF: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """OUT_i = scale / UNIT WIDE_i + own OTHER_o for row o = i + OFFSET of the other side (none beyond `others`), where own is OWN_i with
    BY_SELF, else OWN_o, and DOT_i = <WIDE_i, SELF_i> / UNIT; OUT and DOT may be None, and OUT may be WIDE itself."""
    i = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    o = i + OFFSET
    inside, paired = i < rows, (i < rows) & (o >= 0) & (o < others)
    own = tl.load(OWN + (i if BY_SELF else o), mask=paired, other=0.0).to(tl.float32)
    unit = tl.load(UNIT)
    scale = tl.load(SCALE) / unit
    dots = tl.zeros((HEIGHT,), dtype=tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        fits = (d < D)[None, :]
        place = i.to(tl.int64)[:, None] * D + d[None, :]
        wide = tl.load(WIDE + place, mask=inside[:, None] & fits, other=0.0)
        other = tl.load(OTHER + o.to(tl.int64)[:, None] * D + d[None, :], mask=paired[:, None] & fits, other=0.0).to(tl.float32)
        if DOT is not None:
            dots += tl.sum(wide * tl.load(SELF + place, mask=inside[:, None] & fits, other=0.0).to(tl.float32), 1)
        if OUT is not None:
            tl.store(OUT + place, (scale * wide + own[:, None] * other).to(OUT.dtype.element_ty), mask=inside[:, None] & fits)
    if DOT is not None:
        tl.store(DOT + i, dots / unit, mask=inside)
