"""kernels.score and its parts against plain definitions: cosine, top-k, history update."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.hashing import hash_ids
from pipeline.kernels import cosine, score, top_k, update_history

module = sys.modules["pipeline.kernels.score"]  # the attribute of that name is the function


def table(histories: list[float], visits: list[int] | None = None) -> dict[str, torch.Tensor]:
    seen = [1] * len(histories) if visits is None else visits
    return {"history": torch.tensor(histories), "visits": torch.tensor(seen, dtype=torch.uint8)}


class TestCosine:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_is_float32_of_the_values_given(self, dtype: torch.dtype) -> None:
        image, text = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = cosine(image, text)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.cosine_similarity(image.double(), text.double()), atol=3e-7, rtol=0)

    def test_ignores_norms_other_pairs_and_autocast(self) -> None:
        image, text = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
        found = cosine(image, text)
        torch.testing.assert_close(cosine(image * 1e-12, text * 1e12), found)
        assert torch.equal(cosine(image[3:7], text[3:7]), found[3:7])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cosine(image, text), found)

    def test_stays_within_one_and_gives_0_for_zeros(self) -> None:
        rows = torch.randn(500, 33, generator=torch.Generator().manual_seed(2))
        assert cosine(rows, rows).max() <= 1 and cosine(rows, -rows).min() >= -1
        assert cosine(torch.zeros(1, 4), torch.ones(1, 4)).item() == 0

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"one shape \[B, D\], found \(2, 3\) and \(3, 3\)"):
            cosine(torch.ones(2, 3), torch.ones(3, 3))


class TestTopK:
    @given(
        values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -7e-39, 3e38, float("inf"), -float("inf"), float("nan")]), min_size=1),
        data=st.data(),
    )
    def test_is_a_sort_by_validity_number_value_and_tie(self, values: list[float], data: st.DataObject) -> None:
        size = len(values)
        keep = data.draw(st.integers(1, size))
        valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        tie = hash_ids(data.draw(st.integers(0, 99)), torch.arange(size))
        order = data.draw(st.permutations(range(size)))
        value = torch.tensor(values)
        rows = top_k(value, keep, tie, torch.tensor(valid))
        assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == keep and rows.dtype == torch.int64

        def rank(i: int) -> tuple:
            number = values[i] == values[i]
            return (valid[i], valid[i] and number, values[i] if valid[i] and number else 0.0)

        chosen = set(rows.tolist())
        assert min(rank(i) for i in chosen) >= max((rank(i) for i in range(size) if i not in chosen), default=(False, False, 0.0))
        permuted = top_k(value[order], keep, tie[order], torch.tensor(valid)[order])
        assert {order[i] for i in permuted.tolist()} == chosen, "ties went by position"

    def test_without_ties_it_is_torch_topk(self) -> None:
        value = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        rows = top_k(value, 300, torch.zeros(1000, dtype=torch.int64))
        assert set(rows.tolist()) == set(value.topk(300).indices.tolist())

    def test_neighbouring_floats_are_told_apart(self) -> None:
        value = torch.tensor([1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)), -1.0, 1e-45])
        for tie in (torch.arange(4) << 60, (3 - torch.arange(4)) << 60):
            assert [top_k(value, keep, tie).tolist() for keep in (1, 2, 3)] == [[1], [0, 1], [0, 1, 3]]

    def test_ties_change_with_the_hash(self) -> None:
        choices = {tuple(top_k(torch.zeros(32), 8, hash_ids(seed, torch.arange(32))).tolist()) for seed in range(20)}
        assert len(choices) == 20

    @pytest.mark.parametrize("keep", [0, -1, 6])
    def test_refuses_a_count_that_is_not_there(self, keep: int) -> None:
        with pytest.raises(ValueError, match=f"cannot keep {keep} of 5 rows; expected 1 to 5"):
            top_k(torch.zeros(5), keep, torch.zeros(5, dtype=torch.int64))


def one_by_one(history: list[float], visits: list[int], rows: list[tuple[int, float, bool]], freeze: int | None) -> tuple[list, list]:
    """The rows as though they came one after the other; rule `last`."""
    history, visits = list(history), list(visits)
    for slot, current, valid in rows:
        if valid:
            if freeze is None or visits[slot] < freeze:
                history[slot] = current
            visits[slot] = min(visits[slot] + 1, 255)
    return history, visits


class TestUpdate:
    @settings(max_examples=300)
    @given(data=st.data())
    def test_agrees_with_one_row_after_the_other(self, data: st.DataObject) -> None:
        """Also for samples that stand in the group twice, with any rows invalid, at the edge of freezing and of 255."""
        size = data.draw(st.integers(1, 8))
        visits = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 254, 255]), min_size=size, max_size=size))
        freeze = data.draw(st.sampled_from([None, 1, 2, 3, 254]))
        slots = data.draw(st.permutations(list(range(size)) * 2))
        valid = data.draw(st.lists(st.booleans(), min_size=2 * size, max_size=2 * size))
        history, current = [float(-i) for i in range(size)], [float(i + 1) for i in range(2 * size)]
        expected = one_by_one(history, visits, list(zip(slots, current, valid)), freeze)
        found = table(history, visits)
        update_history(**found, slot=torch.tensor(slots), current=torch.tensor(current), valid=torch.tensor(valid), freeze=freeze)
        assert (found["history"].tolist(), found["visits"].tolist()) == expected

    def test_three_of_one_sample_count_three_visits(self) -> None:
        found = table([9.0, 9.0], [0, 0])
        update_history(**found, slot=torch.tensor([1, 1, 1]), current=torch.tensor([1.0, 2.0, 3.0]))
        assert found["history"].tolist() == [9, 3] and found["visits"].tolist() == [0, 3]

    def test_more_rows_than_visits_can_count(self) -> None:
        found = table([0.0], [0])
        update_history(**found, slot=torch.zeros(600, dtype=torch.int64), current=torch.arange(600.0))
        assert found["history"].tolist() == [599] and found["visits"].tolist() == [255]

    def test_momentum_and_mean(self) -> None:
        momentum, mean = table([0.0], [0]), table([0.0], [0])
        for current in (10.0, 20.0, 60.0):
            update_history(**momentum, slot=torch.tensor([0]), current=torch.tensor([current]), momentum=0.9)
            update_history(**mean, slot=torch.tensor([0]), current=torch.tensor([current]), mean=True)
        assert momentum["history"].item() == pytest.approx(0.9 * (0.9 * 10 + 0.1 * 20) + 0.1 * 60)
        assert mean["history"].item() == pytest.approx(30)

    @pytest.mark.parametrize("slot", [-1, 2])
    def test_a_slot_outside_is_an_error_and_changes_nothing(self, slot: int) -> None:
        found = table([1.0, 2.0])
        with pytest.raises(IndexError):
            update_history(**found, slot=torch.tensor([0, slot]), current=torch.zeros(2))
        assert found["history"].tolist() == [1, 2] and found["visits"].tolist() == [1, 1]


class TestScore:
    def test_differential_is_history_minus_clamped_score(self) -> None:
        found = score(torch.tensor([0.2, -0.5, 0.4]), slot=torch.tensor([2, 0, 1]), keep=1, **table([5.0, 30.0, 50.0]))
        assert found.current.tolist() == pytest.approx([20, 0, 40]) and found.history.tolist() == [50, 5, 30]
        assert found.differential.tolist() == pytest.approx([30, 5, -10]) and found.rows.tolist() == [0]

    def test_unknown_rows_take_the_lower_median_of_the_known(self) -> None:
        found = score(torch.zeros(6), slot=torch.arange(6), keep=2, **table([10.0, 20.0, 30.0, 40.0, 7.0, 7.0], [1, 1, 1, 1, 0, 0]))
        assert found.differential.tolist() == [10, 20, 30, 40, 20, 20] and found.rows.tolist() == [2, 3]

    def test_invalid_rows_do_not_shift_the_median(self) -> None:
        valid = torch.tensor([True, True, True, False, False])
        found = score(torch.zeros(5), slot=torch.arange(5), valid=valid, **table([1.0, 2.0, 3.0, 90.0, 91.0], [0, 1, 1, 1, 1]))
        assert found.differential[0] == 2

    def test_nan_is_not_written_not_counted_and_not_preferred(self) -> None:
        rows = table([50.0, 50.0, 50.0])
        found = score(torch.tensor([0.9, float("nan"), 0.8]), slot=torch.arange(3), keep=2, **rows)
        assert found.rows.tolist() == [0, 2]
        assert rows["visits"].tolist() == [2, 1, 2] and rows["history"].tolist() == [pytest.approx(90), 50, pytest.approx(80)]

    def test_without_keep_nothing_is_chosen(self) -> None:
        assert score(torch.zeros(3), slot=torch.arange(3), **table([0.0, 0, 0])).rows is None

    def test_refuses_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"cosine \[g\] and slot \[g\]"):
            score(torch.zeros(3), slot=torch.arange(2), **table([0.0, 0, 0]))

    def test_the_path_of_other_devices_asks_nothing_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No `.item()`, `.tolist()`, `bool()` or choice by mask: each would wait for a GPU."""
        for question in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy"):
            monkeypatch.setattr(torch.Tensor, question, lambda *_: pytest.fail("asked the device"))
        monkeypatch.setattr(module, "hash_ids", lambda seed, ids: ids)  # on the CPU it goes through numpy; its other path has a test
        rows, rule = torch.arange(8), {"momentum": None, "freeze": 2, "mean": False}
        found = module._score_torch(torch.zeros(8), rows, *table([0.0] * 8).values(), 3, rows, torch.ones(8, dtype=torch.bool), 0, rule)
        assert found.rows.shape == (3,)

    @settings(max_examples=200)
    @given(data=st.data())
    def test_numpy_and_torch_agree_bit_for_bit(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, 40))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
        cosine = (torch.rand(size, generator=generator) * 1.5 - 0.5).masked_fill_(torch.rand(size, generator=generator) < 0.1, torch.nan)
        slot = torch.randint(0, 60, (size,), generator=generator) if data.draw(st.booleans()) else torch.randperm(60)[:size]
        tables = [50 * torch.rand(60, generator=generator), torch.randint(0, 5, (60,), generator=generator).to(torch.uint8)]
        valid = data.draw(st.sampled_from([None, torch.rand(size, generator=generator) < 0.7]))
        rule = {"momentum": data.draw(st.sampled_from([None, 0.9])), "freeze": data.draw(st.sampled_from([None, 1, 3]))}
        rule["mean"] = data.draw(st.booleans())
        keep, results = data.draw(st.integers(1, size)), []
        for path in (module._score_torch, module._score_numpy):
            history, visits = (value.clone() for value in tables)
            found = path(cosine, slot, history, visits, keep, slot + 7, valid, 5, rule)
            # a sample that stands in the group twice with one value: either of its rows may be chosen
            results.append([slot[found.rows].sort().values, *found[1:], history, visits])
        for one, other in zip(*results):
            assert one.dtype == other.dtype and torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
