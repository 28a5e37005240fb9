"""The tile kernels against dense float64 definitions: dtypes, scales, odd sizes, masks, kinds."""

import pytest
import torch

from pipeline.kernels.gpu import gradients, sums
from tests.triton.problems import SMALL, Answer, answer, distance, found, problem

# of gradients, relative. float32 logits of 100 are known to 8e-6. Half precision rounds P and what is stored; Triton's interpreter cuts
# bfloat16 off where a GPU rounds it, hence 2^-7 and not 2^-8
BUDGET = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
SIZES = {"even": (64, 96, 48, 16), "odd": (37, 101, 72, 23), "one tile": (9, 9, 64, 0)}


def judge(value: Answer, truth: Answer, dtype: torch.dtype, s: float) -> None:
    for name in ("row", "col"):
        sure, said = getattr(truth, name), getattr(value, name)
        assert torch.equal(said == -torch.inf, sure == -torch.inf)
        torch.testing.assert_close(said, sure, atol=3e-6 + 2e-7 * s, rtol=3e-7)
    torch.testing.assert_close(value.cosine, truth.cosine, atol=2e-7, rtol=0)
    assert distance(value.dx, truth.dx) < BUDGET[dtype]
    assert distance(value.dy, truth.dy) < BUDGET[dtype]
    assert abs(value.ds - truth.ds) <= BUDGET[dtype] * abs(truth.ds)


@pytest.mark.parametrize("s", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", ["even", "odd"])
def test_softmax(size: str, dtype: torch.dtype, s: float) -> None:
    rows, cols, width, offset = SIZES[size]
    pairs, given = problem(rows, cols, width, s, dtype, offset=offset, masked=size == "odd")
    result, value = found(pairs, given)
    assert result.shift.item() == pytest.approx(max(0.0, s - 70) * 1.4426950408889634)
    judge(value, answer(pairs, given), dtype, s)


@pytest.mark.parametrize("kind", ["rows", "sigmoid"])
@pytest.mark.parametrize("size", ["even", "odd"])
def test_kinds_without_column_sums(size: str, kind: str) -> None:
    rows, cols, width, offset = SIZES[size]
    pairs, given = problem(rows, cols, width, 14.3, torch.float32, kind=kind, offset=offset, masked=size == "odd")
    value = found(pairs, given)[1]
    judge(value, answer(pairs, given), torch.float32, 14.3)


def test_a_sigmoid_far_below_the_spacing_of_numbers_at_one() -> None:
    pairs, given = problem(20, 20, 64, 1.0, torch.float32, kind="sigmoid")
    pairs = pairs._replace(bias=torch.full_like(pairs.bias, -30.0))
    value, truth = found(pairs, given)[1], answer(pairs, given)
    torch.testing.assert_close(value.row, truth.row, rtol=1e-5, atol=0)
    torch.testing.assert_close(value.col, truth.col, rtol=1e-5, atol=0)


def test_bfloat16() -> None:
    pairs, given = problem(37, 101, 72, 14.3, torch.bfloat16, offset=23, masked=True)
    value = found(pairs, given, wide=False)[1]
    judge(value, answer(pairs, given), torch.bfloat16, 14.3)


def test_the_shipped_configurations_give_the_same() -> None:
    for dtype in (torch.float32, torch.float16):
        pairs, given = problem(40, 70, 80, 14.3, dtype, offset=30)
        judge(found(pairs, given, config=None)[1], answer(pairs, given), dtype, 14.3)


def test_small_gradients_do_not_underflow_in_half_precision() -> None:
    pairs, given = problem(64, 64, 48, 1.0, torch.float16)
    faint = given._replace(row=given.row * 1e-7, col=given.col * 1e-7, own=given.own * 1e-7)
    value, truth = found(pairs, faint)[1], answer(pairs, faint)
    assert distance(value.dy, truth.dy) < 6e-4 and abs(value.ds - truth.ds) < 6e-4 * abs(truth.ds)


def test_column_totals_may_be_larger_than_the_local_sums() -> None:
    pairs, given = problem(37, 50, 64, 14.3, torch.float32, offset=5)
    result = sums(pairs, config=SMALL)
    total = result.col + torch.linspace(0, 9, 50, dtype=torch.float64, device=result.col.device)
    dx, dy, ds = gradients(pairs, result._replace(col=total), given, config=SMALL)
    truth = answer(pairs, given, col=total)
    assert distance(dx, truth.dx) < 1e-6 and distance(dy, truth.dy) < 1e-6 and distance(ds, truth.ds) < 1e-6


@pytest.mark.parametrize(("need_x", "need_y"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(need_x: bool, need_y: bool) -> None:
    pairs, given = problem(37, 50, 64, 14.3, torch.float32, offset=5)
    result = sums(pairs, config=SMALL)
    dx, dy, ds = gradients(pairs, result, given, need_x, need_y, config=SMALL)
    truth = answer(pairs, given)
    assert dx.shape == (pairs.x.shape if need_x else (0,)) and dy.shape == (pairs.y.shape if need_y else (0,))
    assert not need_x or distance(dx, truth.dx) < 1e-6
    assert not need_y or distance(dy, truth.dy) < 1e-6
    assert distance(ds, truth.ds) < 1e-6 and ds.dtype == torch.float32
