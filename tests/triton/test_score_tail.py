"""The fused tail of selection against the torch path of `pipeline.kernels.score`, bit for bit."""

import sys

import pytest
import torch

import pipeline.kernels.score  # noqa: F401
from pipeline.kernels.gpu import cosine, score
from tests.triton.problems import DEVICE

plain = sys.modules["pipeline.kernels.score"]  # the attribute of that name is the function
RULES = ({}, {"momentum": 0.9}, {"mean": True}, {"freeze": 2}, {"freeze": 1, "mean": True}, {"freeze": 3, "momentum": 0.3})


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is b) if a is None or b is None else torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_is_score_bit_for_bit(seed: int, rule: dict) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, total = (70, 40) if seed % 2 else (200, 1000)  # with and without many rows of one sample
    value = torch.rand(rows, generator=g) * 2 - 1
    value[torch.rand(rows, generator=g) < 0.1] = torch.nan
    history, visits = torch.rand(total, generator=g) * 100, torch.randint(0, 4, (total,), generator=g, dtype=torch.uint8)
    visits[::7] = 255
    if seed == 3:
        visits.zero_()
    valid = torch.rand(rows, generator=g) < 0.8 if seed > 1 else None
    slot, sample = torch.randint(0, total, (rows,), generator=g), torch.randint(0, 10**9, (rows,), generator=g)
    value, history, visits, slot, sample = (v.to(DEVICE) for v in (value, history, visits, slot, sample))
    valid = None if valid is None else valid.to(DEVICE)
    tables = history.clone(), visits.clone()
    whole = {"momentum": None, "freeze": None, "mean": False} | rule
    truth = plain._score_torch(value, slot, *tables, rows // 3, sample, valid, 5, whole)
    found = score(value, slot=slot, history=history, visits=visits, keep=rows // 3, sample=sample, valid=valid, seed=5, **rule)
    assert all(same(a, b) for a, b in zip(truth, found))
    assert torch.equal(tables[0], history) and torch.equal(tables[1], visits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cosines_of_rows_of_any_norm(dtype: torch.dtype) -> None:
    image, text = torch.randn(2, 37, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    image[3], text[5, 2] = 0, torch.nan
    value, truth = cosine(image, text), plain.cosine(image, text)
    assert value[3] == 0 and value[5].isnan()
    torch.testing.assert_close(value, truth, atol=1e-7, rtol=0, equal_nan=True)
    if dtype == torch.float32:
        torch.testing.assert_close(cosine(image * 1e-12, text * 1e12), truth, atol=1e-7, rtol=0, equal_nan=True)


def test_refuses_what_does_not_fit() -> None:
    table = {"history": torch.zeros(4, device=DEVICE), "visits": torch.zeros(4, dtype=torch.uint8, device=DEVICE)}
    slot = torch.tensor([0, 3, 1], device=DEVICE)
    with pytest.raises(ValueError, match="expected cosine .* found"):
        score(torch.zeros(2, device=DEVICE), slot=slot, **table)
    with pytest.raises(ValueError, match="cannot keep 4 of 3 rows"):
        score(torch.zeros(3, device=DEVICE), slot=slot, keep=4, **table)
    with pytest.raises(ValueError, match="one shape"):
        cosine(torch.zeros(2, 3, device=DEVICE), torch.zeros(3, 3, device=DEVICE))
    if DEVICE.type == "cpu":  # a GPU stops with an assertion of its own
        with pytest.raises(IndexError, match="numbered from 0 to 3"):
            score(torch.zeros(3), slot=slot + 9, **table)
