"""The kernels that form logits tile by tile. A program owns one tile [BM, BN] of z = log2(e) (s <x_i, y_j> + b) and never stores it.

Conventions of all four:
 - Grids are one-dimensional and rasterised in groups of GROUP row blocks, so that tiles that run at one time share rows in the L2.
 - KIND 0: sums over rows and columns; 1: rows alone; 2: SigLIP's sigmoid. EDGES: some row or column of a tile may lie outside of the
   matrix or be unused: its logits are -inf. Loads beyond the edge repeat the last row: no mask, the copies stay asynchronous.
 - SHIFT is the flag of the careful path as well: the kernels for one common shift do nothing when it is NaN, the careful ones unless it is.
 - The own pair of row i, column OFFSET + i, is left out; only tiles on that diagonal pay for it, and they store its cosine.
 - WIDEN multiplies in float32 what is half precision: for the interpreter alone, whose bfloat16 tl.dot multiplies bit patterns.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below every logit; in place of a maximum of -inf, from which nothing can be subtracted


@triton.jit
def _blocks(tile, row_blocks, col_blocks):
    """The (row block, column block) of a tile in grouped order."""
    group = tile // (col_blocks * GROUP)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    place = tile % (col_blocks * GROUP)
    return group * GROUP + place % height, place // height


@triton.jit
def _cosines(
    X, Y, m0, n0, rows, cols, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EDGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of one tile, accumulated in float32; float32 rows are multiplied as such, never as TF32."""
    m, n, k = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), tl.arange(0, BK)
    if EDGES:
        m, n = tl.minimum(m, rows - 1), tl.minimum(n, cols - 1)
    x = X + m.to(tl.int64)[:, None] * D + k[None, :]
    y = Y + n.to(tl.int64)[None, :] * D + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        if EVEN_K:
            a, b = tl.load(x), tl.load(y)
        else:
            a = tl.load(x, mask=k[None, :] < D - start, other=0.0)
            b = tl.load(y, mask=k[:, None] < D - start, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        x += BK
        y += BK
    return total


@triton.jit
def _outside(USED, place, size):
    """0 for what counts and -inf for what lies beyond `size` or is unused."""
    inside = place < size
    if USED is not None:
        inside = inside & (tl.load(USED + place, mask=inside, other=0) != 0)
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def _logits(
    X, Y, SCALE, BIAS, USED_X, USED_Y, COSINE, shift, m0, n0, rows, cols, D, OFFSET,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EDGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """z - shift of one tile, -inf where nothing counts; stores the cosines of the own pairs unless COSINE is None."""
    cosines = _cosines(X, Y, m0, n0, rows, cols, D, BM, BN, BK, EVEN_K, EDGES, WIDEN)
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    diagonal = (m0 + OFFSET < n0 + BN) & (m0 + OFFSET + BM > n0)
    if COSINE is not None:  # noqa: SIM102 - the one is decided at compile time, the other at run time
        if diagonal:
            own = tl.sum(tl.where((m + OFFSET)[:, None] == n[None, :], cosines, 0.0), 1)
            tl.store(COSINE + m, own, mask=(m + OFFSET >= n0) & (m + OFFSET < n0 + BN) & (m < rows))
    summand = -shift
    if BIAS is not None:
        summand += tl.load(BIAS) * LOG2E
    z = cosines * (tl.load(SCALE) * LOG2E) + summand
    if diagonal:
        # a second branch, and not one with the cosines kept beside the logits: that costs 78 registers of 205
        z = tl.where((m + OFFSET)[:, None] == n[None, :], float("-inf"), z)
    if EDGES:
        z += _outside(USED_X, m, rows)[:, None]
        z += _outside(USED_Y, n, cols)[None, :]
    return z


@triton.jit(do_not_specialize=["rows", "cols", "OFFSET"])
def sums_kernel(
    X, Y, SCALE, BIAS, USED_X, USED_Y, SHIFT, ROW, COL, COSINE, rows, cols, D, OFFSET,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EDGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Partial sums of 2^(z - shift) of one tile: ROW [column blocks, rows], COL [row blocks, cols]. One exp serves both. For the sigmoid
    ROW holds sums of softplus and COL [column blocks, rows] those of sigmoid."""
    shift = tl.load(SHIFT)
    if shift != shift:
        return
    row_blocks, col_blocks = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    mb, nb = _blocks(tl.program_id(0), row_blocks, col_blocks)
    z = _logits(X, Y, SCALE, BIAS, USED_X, USED_Y, COSINE, shift, mb * BM, nb * BN, rows, cols, D, OFFSET, BM, BN, BK, EVEN_K, EDGES, WIDEN)
    m, n = mb * BM + tl.arange(0, BM), nb * BN + tl.arange(0, BN)
    place = nb.to(tl.int64) * rows + m
    if KIND == 2:
        softplus, sigmoid = _sigmoid(z)
        tl.store(ROW + place, tl.sum(softplus, 1), mask=m < rows)
        tl.store(COL + place, tl.sum(sigmoid, 1), mask=m < rows)
    else:
        e = tl.exp2(z)
        tl.store(ROW + place, tl.sum(e, 1), mask=m < rows)
        if KIND == 0:
            tl.store(COL + mb.to(tl.int64) * cols + n, tl.sum(e, 0), mask=n < cols)


@triton.jit
def _sigmoid(z):
    """(softplus, sigmoid) of z / log2(e). log(1 + t) is 2 artanh(t / (2 + t)) by its series: t may be far below the spacing of numbers
    at 1, and the logarithm of a GPU has an absolute error there."""
    t = tl.exp2(-tl.abs(z))
    u = t / (2.0 + t)
    v = u * u
    series = 1.0 + v * (1 / 3 + v * (1 / 5 + v * (1 / 7 + v * (1 / 9 + v * (1 / 11 + v * (1 / 13))))))
    return tl.maximum(z, 0.0) * LN2 + 2.0 * u * series, tl.where(z > 0, 1.0, t) / (1.0 + t)


@triton.jit(do_not_specialize=["rows", "cols", "OFFSET"])
def careful_sums_kernel(
    X, Y, SCALE, BIAS, USED_X, USED_Y, SHIFT, ROW, COL, COSINE, rows, cols, D, OFFSET,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EDGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `sums_kernel` for logits too far apart for one shift: a maximum for every row and every column of a tile, two exps; what is
    stored are the tile's log2 sums. A program takes every n-th of the tiles, so that few are launched for nothing where there is nothing
    to be done."""
    shift = tl.load(SHIFT)
    if shift == shift:
        return
    row_blocks, col_blocks = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    for tile in range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        mb, nb = _blocks(tile, row_blocks, col_blocks)
        z = _logits(
            X, Y, SCALE, BIAS, USED_X, USED_Y, COSINE, 0.0, mb * BM, nb * BN, rows, cols, D, OFFSET, BM, BN, BK, EVEN_K, EDGES, WIDEN
        )
        m, n = mb * BM + tl.arange(0, BM), nb * BN + tl.arange(0, BN)
        top = tl.maximum(tl.max(z, 1), LOWEST)
        tl.store(ROW + nb.to(tl.int64) * rows + m, top + tl.log2(tl.sum(tl.exp2(z - top[:, None]), 1)), mask=m < rows)
        if KIND == 0:
            top = tl.maximum(tl.max(z, 0), LOWEST)
            tl.store(COL + mb.to(tl.int64) * cols + n, top + tl.log2(tl.sum(tl.exp2(z - top[None, :]), 0)), mask=n < cols)


@triton.jit(do_not_specialize=["rows", "cols", "OFFSET"])
def write_kernel(
    X, Y, SCALE, BIAS, USED_X, USED_Y, SHIFT, ALPHA, BETA, P, rows, cols, D, OFFSET, STRIDE,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EDGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """P = 2^(z - shift) (alpha_i + beta_j), or alpha_i sigmoid(z), of one tile in the dtype of P [rows, STRIDE]; own pairs 0."""
    shift = tl.load(SHIFT)
    if shift != shift:
        return
    mb, nb = _blocks(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(cols, BN))
    z = _logits(X, Y, SCALE, BIAS, USED_X, USED_Y, None, shift, mb * BM, nb * BN, rows, cols, D, OFFSET, BM, BN, BK, EVEN_K, EDGES, WIDEN)
    m, n = mb * BM + tl.arange(0, BM), nb * BN + tl.arange(0, BN)
    factor = tl.load(ALPHA + m, mask=m < rows, other=0.0)[:, None]
    if KIND == 2:
        p = factor * _sigmoid(z)[1]
    else:
        if KIND == 0:
            factor += tl.load(BETA + n, mask=n < cols, other=0.0)[None, :]
        p = tl.exp2(z) * factor
    place = P + m.to(tl.int64)[:, None] * STRIDE + n[None, :]
    if EDGES:
        tl.store(place, p.to(P.dtype.element_ty), mask=(m < rows)[:, None] & (n < cols)[None, :])
    else:
        tl.store(place, p.to(P.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "cols", "OFFSET"])
def careful_write_kernel(
    X, Y, SCALE, BIAS, USED_X, USED_Y, SHIFT, ALPHA, BETA, ROW, COL, P, rows, cols, D, OFFSET, STRIDE,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EDGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """P = alpha_i 2^(z - row_i) + beta_j 2^(z - col_j), ROW and COL in units of log 2."""
    shift = tl.load(SHIFT)
    if shift == shift:
        return
    row_blocks, col_blocks = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    for tile in range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0)):
        mb, nb = _blocks(tile, row_blocks, col_blocks)
        z = _logits(X, Y, SCALE, BIAS, USED_X, USED_Y, None, 0.0, mb * BM, nb * BN, rows, cols, D, OFFSET, BM, BN, BK, EVEN_K, EDGES, WIDEN)
        m, n = mb * BM + tl.arange(0, BM), nb * BN + tl.arange(0, BN)
        alpha, row = tl.load(ALPHA + m, mask=m < rows, other=0.0), tl.load(ROW + m, mask=m < rows, other=0.0)
        p = tl.exp2(z - row[:, None]) * alpha[:, None]
        if KIND == 0:
            beta, col = tl.load(BETA + n, mask=n < cols, other=0.0), tl.load(COL + n, mask=n < cols, other=0.0)
            p += tl.exp2(z - col[None, :]) * beta[None, :]
        place = P + m.to(tl.int64)[:, None] * STRIDE + n[None, :]
        tl.store(place, p.to(P.dtype.element_ty), mask=(m < rows)[:, None] & (n < cols)[None, :])
