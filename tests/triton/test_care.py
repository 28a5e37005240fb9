"""What must never happen: underflow that goes unnoticed, memory that nobody wrote, results that differ from run to run."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.kernels.gpu import gradients, sums
from pipeline.kernels.gpu.launch import _strip
from pipeline.kernels.similarity import Gradients, Pairs
from tests.triton.problems import SMALL, answer, distance, found, moved, problem


@pytest.fixture
def poison() -> Iterator[None]:
    """Every tensor that torch allocates without a value is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def opposed(pairs: Pairs, rows: slice) -> Pairs:
    """The rows turned away from every column: cosines below -0.57."""
    generator = torch.Generator().manual_seed(9)
    axis = normalize(torch.randn(pairs.x.shape[1], generator=generator), dim=0)
    x, y = pairs.x.cpu().float(), normalize(axis + 0.5 * pairs.y.cpu().float(), dim=1)
    x[rows] = normalize(0.4 * x[rows] - axis, dim=1)
    assert (x[rows] @ y.T).max() < -0.57
    return moved(pairs._replace(x=x.to(pairs.x.dtype), y=y.to(pairs.y.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)], ids=["all", "one"])
@pytest.mark.parametrize("kind", ["softmax", "rows"])
def test_underflow_takes_the_careful_path(kind: str, rows: slice, dtype: torch.dtype, poison: None) -> None:
    pairs, given = problem(37, 50, 72, 100.0, dtype, kind=kind, offset=13)
    pairs = opposed(pairs, rows)
    result, value = found(pairs, given)
    truth = answer(pairs, given)
    assert result.shift.isnan()
    torch.testing.assert_close(value.row, truth.row, atol=3e-5, rtol=0)
    torch.testing.assert_close(value.col, truth.col, atol=3e-5, rtol=0)
    torch.testing.assert_close(value.cosine, truth.cosine, atol=2e-7, rtol=0)
    budget = 5e-6 if dtype == torch.float32 else 6e-4  # a float32 logit of 77 is known to 4e-6
    assert max(distance(value.dx, truth.dx), distance(value.dy, truth.dy), distance(value.ds, truth.ds)) < budget


def test_the_careful_path_knows_what_is_not_used(poison: None) -> None:
    pairs, given = problem(37, 50, 72, 100.0, torch.float32, offset=13, masked=True)
    pairs = opposed(pairs, slice(None))
    mask_x, mask_y = pairs.used_x[:, None], pairs.used_y[:, None]
    pairs = pairs._replace(x=pairs.x * mask_x, y=pairs.y * mask_y)
    result, value = found(pairs, given)
    truth = answer(pairs, given)
    assert result.shift.isnan() and torch.equal(value.row == -torch.inf, truth.row == -torch.inf)
    assert max(distance(value.dx, truth.dx), distance(value.dy, truth.dy), distance(value.ds, truth.ds)) < 2e-6
    assert not value.dx[~pairs.used_x.cpu()].any() and not value.dy[~pairs.used_y.cpu()].any()


def test_overflow_is_noticed_too() -> None:
    pairs, given = problem(20, 20, 64, 60.0, torch.float32)
    pairs = pairs._replace(x=pairs.x * 4)  # not unit rows: logits beyond what the shift allows for
    result, value = found(pairs, given)
    truth = answer(pairs, given)
    assert result.shift.isnan() and distance(value.row, truth.row) < 1e-6 and distance(value.dx, truth.dx) < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_alone_has_a_sum_of_nothing(rows: int) -> None:
    pairs, _ = problem(rows, rows, 64, 14.3, torch.float32)
    given = moved(Gradients(torch.ones(rows).double(), torch.ones(rows).double(), torch.ones(rows)))
    value, truth = found(pairs, given)[1], answer(pairs, given)
    torch.testing.assert_close(value.row, truth.row, atol=3e-6, rtol=0)
    torch.testing.assert_close(value.dx, truth.dx, atol=1e-6, rtol=1e-6)


def test_nothing_used_gives_no_gradient() -> None:
    pairs, given = problem(20, 20, 64, 14.3, torch.float32)
    nothing = torch.zeros(20, dtype=torch.bool, device=pairs.x.device)
    pairs = pairs._replace(x=pairs.x * 0, y=pairs.y * 0, used_x=nothing, used_y=nothing)
    value = found(pairs, moved(Gradients(*(torch.zeros_like(grad) for grad in given))))[1]
    assert (value.row == -torch.inf).all() and not value.dx.any() and not value.dy.any() and value.ds == 0


def test_a_nan_is_not_hidden() -> None:
    pairs, given = problem(20, 20, 64, 14.3, torch.float32)
    pairs.x[3, 5] = torch.nan
    result = sums(pairs, config=SMALL)
    assert result.row[3].isnan() and result.cosine[3].isnan() and result.col.isnan().any()
    assert gradients(pairs, result, given, config=SMALL)[2].isnan()


@pytest.mark.parametrize("kind", ["softmax", "rows", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_unwritten_is_read(kind: str, masked: bool, poison: None) -> None:
    pairs, given = problem(53, 101, 72, 14.3, torch.float32, kind=kind, offset=31, masked=masked)
    result, value = found(pairs, given)
    assert not any(part.isnan().any() for part in (*result[:4], *value))
    truth = answer(pairs, given)
    assert distance(value.dx, truth.dx) < 1e-6 and distance(value.dy, truth.dy) < 1e-6


def test_these_problems_take_several_strips_and_chunks() -> None:
    assert all(_strip(53, 101, tile, SMALL.partials) < 53 for tile in (SMALL.sums, SMALL.sigmoid))
    assert _strip(37, 50, SMALL.careful, SMALL.partials) < 37
    assert SMALL.chunk[0] < 53 and SMALL.chunk[1] < 101


@pytest.mark.parametrize("careful", [False, True])
def test_every_run_gives_the_same_bits(careful: bool) -> None:
    pairs, given = problem(53, 101, 72, 100.0, torch.float16, offset=31)
    pairs = opposed(pairs, slice(0, 1)) if careful else pairs
    first, value = found(pairs, given)
    for _ in range(2):
        again, values = found(pairs, given)
        assert all(torch.equal(a, b) for a, b in zip((*first[:3], *value), (*again[:3], *values)))
