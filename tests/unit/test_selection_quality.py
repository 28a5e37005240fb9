"""Selection quality: a log small enough to count by hand, controls that must give chance, and what is missing."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.evaluation.selection_quality import LOG_SCHEMA, auc, read_log, selection_quality

NAN = float("nan")


def log_of(rows: list[tuple]) -> pa.Table:
    """(step, visit, sample, score, ranked_by, kept) rows."""
    return pa.Table.from_pylist([dict(zip(LOG_SCHEMA.names, row)) for row in rows], schema=LOG_SCHEMA)


def truth_of(noisy: list[bool]) -> pa.Table:
    return pa.table({"sample": pa.array(range(len(noisy)), pa.int64()), "noisy": noisy})


# samples 0, 1 clean, 2, 3 noisy; one visit of warm-up, then three visits
HAND = log_of(
    [
        (0, 0, 0, 30.0, NAN, True),
        (0, 0, 1, 20.0, NAN, True),
        (0, 0, 2, 10.0, NAN, True),
        (0, 0, 3, NAN, NAN, True),
        (1, 1, 0, 40.0, -1.0, False),
        (1, 1, 1, 30.0, 2.0, True),
        (1, 1, 2, 10.0, 1.0, True),
        (1, 1, 3, 10.0, -2.0, False),
        (2, 2, 0, 40.0, 3.0, True),
        (2, 2, 1, 20.0, 3.0, True),
        (2, 2, 2, 20.0, 3.0, False),
        (2, 2, 3, 20.0, -5.0, False),
        (3, 3, 3, 20.0, 9.0, False),
        (3, 3, 1, 30.0, 1.0, True),
        (3, 3, 2, 30.0, 0.0, True),
        (3, 3, 0, 30.0, -1.0, False),
    ]
)
TRUTH = truth_of([False, False, True, True])


def test_nothing_is_judged_of_a_warm_up_that_has_not_ended():
    result = selection_quality(HAND, TRUTH, warmup_visits=None)
    assert result["rows_after_warmup"] == 0 and result["precision"] is None and result["never_selected"]["all"] is None
    assert len(result["visits"]) == 4 and result["warmup_visits"] is None


def test_hand_computed_figures():
    result = selection_quality(HAND, TRUTH, warmup_visits=1)
    visits = result["visits"]
    assert [v["precision"] for v in visits] == [0.5, 0.5, 1.0, 0.5]
    assert [v["chance"] for v in visits] == [0.5] * 4
    # visit 1: clean -1, 2 against noisy 1, -2: three of four pairs; visit 2: ties count half: (.5 + 1) * 2 / 4
    assert [v["auc"] for v in visits] == [None, 0.75, 0.75, 0.25]
    assert [v["score_clean"] for v in visits] == [25.0, 35.0, 30.0, 30.0]
    assert [v["score_noisy"] for v in visits] == [10.0, 10.0, 20.0, 25.0]
    assert [v["gap"] for v in visits] == [15.0, 25.0, 10.0, 5.0]
    assert result["gap_peak_visit"] == 1
    assert result["precision"] == pytest.approx(2 / 3) and result["chance"] == 0.5
    assert result["auc"] == pytest.approx((0.75 + 0.75 + 0.25) / 3)
    assert result["slope"] == pytest.approx(0) and result["rises"] is False
    # sample 0 and 1 were kept, 2 was kept, 3 never after warm-up: what warm-up trained does not count
    assert result["never_selected"] == {"all": 0.25, "clean": 0.0, "noisy": 0.5}
    assert (result["rows"], result["rows_after_warmup"], result["samples"], result["rows_without_truth"]) == (16, 12, 4, 0)
    json.dumps(result, allow_nan=False)


def test_order_of_rows_and_relabelled_samples_change_nothing():
    order = np.random.default_rng(0).permutation(HAND.num_rows)
    assert selection_quality(HAND.take(order), TRUTH, warmup_visits=1) == selection_quality(HAND, TRUTH, warmup_visits=1)
    moved = HAND.set_column(2, "sample", pa.array(HAND["sample"].to_numpy() * 1000 + 7))
    truth = pa.table({"sample": pa.array([3007, 7, 2007, 1007], pa.int64()), "noisy": [True, False, True, False]})
    assert selection_quality(moved, truth, warmup_visits=1) == selection_quality(HAND, TRUTH, warmup_visits=1)


def synthetic(rank: np.ndarray, noisy: np.ndarray, visits: int, keep: float, seed: int = 0) -> pa.Table:
    """A log where every visit keeps the `keep` share with the largest `rank[visit]`."""
    count = len(noisy)
    kept = np.zeros((visits, count), bool)
    np.put_along_axis(kept, np.argsort(-rank, axis=1)[:, : int(keep * count)], True, axis=1)
    columns = [
        np.repeat(np.arange(visits), count),
        np.repeat(np.arange(visits), count),
        np.tile(np.arange(count), visits),
        np.full(visits * count, 20.0),
        rank.ravel(),
        kept.ravel(),
    ]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, LOG_SCHEMA)], schema=LOG_SCHEMA)


def test_a_random_choice_scores_chance_and_does_not_rise():
    rng = np.random.default_rng(0)
    noisy = rng.random(2000) < 0.4
    result = selection_quality(synthetic(rng.normal(size=(20, 2000)), noisy, 20, 0.5), truth_of(noisy.tolist()), warmup_visits=5)
    assert result["precision"] == pytest.approx(result["chance"], abs=0.015)
    assert result["auc"] == pytest.approx(0.5, abs=0.015)
    rising = [
        selection_quality(synthetic(rng.normal(size=(12, 400)), noisy[:400], 12, 0.5), truth_of(noisy[:400].tolist()), warmup_visits=0)
        for _ in range(20)
    ]
    assert sum(one["slope"] > 0 for one in rising) > 4 and sum(one["rises"] for one in rising) <= 3
    assert result["never_selected"]["all"] == pytest.approx(0.5**15, abs=0.002)
    assert result["never_selected"]["clean"] == pytest.approx(result["never_selected"]["noisy"], abs=0.002)


def test_a_selector_that_learns_rises_and_one_that_forgets_does_not():
    rng = np.random.default_rng(1)
    noisy = rng.random(2000) < 0.4
    strength = np.linspace(0, 3, 16)[:, None]
    rank = rng.normal(size=(16, 2000)) + strength * ~noisy
    table = truth_of(noisy.tolist())
    better = selection_quality(synthetic(rank, noisy, 16, 0.5), table, warmup_visits=0)
    worse = selection_quality(synthetic(rank[::-1], noisy, 16, 0.5), table, warmup_visits=0)
    assert better["rises"] is True and worse["rises"] is False
    assert better["slope"] == pytest.approx(-worse["slope"])
    assert better["precision_first"] == pytest.approx(0.6, abs=0.04) and better["precision_last"] > 0.9


def test_oracle_drift_control():
    """Clean pairs forgotten by 1.7, noisy ones memorised by 2.2 (read from figure 1 of arXiv 2507.12998), jitter 2, half noisy."""
    rng = np.random.default_rng(2)
    noisy = np.arange(4000) % 2 == 1
    rank = rng.normal(scale=2, size=(8, 4000)) + np.where(noisy, -2.2, 1.7)
    truth = truth_of(noisy.tolist())
    rates = {keep: selection_quality(synthetic(rank, noisy, 8, keep), truth, warmup_visits=0) for keep in (0.3, 0.5, 0.7)}
    assert rates[0.5]["precision"] == pytest.approx(0.835, abs=0.01)  # the threshold lies half way: Phi(1.95 / 2)
    assert rates[0.3]["precision"] > rates[0.5]["precision"] > rates[0.7]["precision"] > 0.6
    assert rates[0.3]["auc"] == pytest.approx(0.916, abs=0.01)  # P(N(3.9, 2 sqrt 2) > 0)


def test_visits_cut_short_weigh_by_their_rows():
    rows = [(0, v, s, 1.0, float(s), s >= 50) for v in range(4) for s in range(100)]
    noisy = [s % 2 == 0 for s in range(100)]
    base = selection_quality(log_of(rows), truth_of(noisy), warmup_visits=0)
    cut = selection_quality(log_of([*rows, (9, 4, 1, 1.0, 1.0, True)]), truth_of(noisy), warmup_visits=0)
    assert base["precision"] == 0.5
    assert cut["precision"] == pytest.approx((100 + 1) / 201)  # 100 of 200 clean, and one more clean row
    assert cut["slope"] < 0.05


def test_without_truth_only_what_needs_none_is_said():
    result = selection_quality(HAND, None, warmup_visits=1)
    assert result["precision"] is None and result["auc"] is None and result["chance"] is None and result["rises"] is None
    assert result["never_selected"] == {"all": 0.25, "clean": None, "noisy": None}
    assert [v["score"] for v in result["visits"]] == [20.0, 22.5, 25.0, 27.5]
    assert result["visits"][0]["gap"] is None and result["gap_peak_visit"] is None


def test_rows_unknown_to_the_truth_are_counted_and_left_out():
    extra = log_of([(4, 1, 77, 99.0, 99.0, True)])
    result = selection_quality(pa.concat_tables([HAND, extra]), TRUTH, warmup_visits=1)
    assert result["rows_without_truth"] == 1
    assert result | {"rows_without_truth": 0} == selection_quality(HAND, TRUTH, warmup_visits=1)


def test_a_run_that_ended_in_warm_up_has_no_figures_after_it():
    result = selection_quality(HAND, TRUTH, warmup_visits=9)
    assert result["precision"] is None and result["never_selected"] == {"all": None, "clean": None, "noisy": None}
    assert len(result["visits"]) == 4 and result["gap_peak_visit"] == 1


def test_one_kind_of_pairs_only_has_no_auc():
    result = selection_quality(HAND, truth_of([False] * 4), warmup_visits=1)
    assert result["precision"] == 1.0 and result["auc"] is None and result["gap_peak_visit"] is None
    assert selection_quality(HAND.slice(0, 0), TRUTH, warmup_visits=1)["visits"] == []


def test_auc_by_hand_and_by_symmetry():
    rng = np.random.default_rng(3)
    noisy = rng.random(300) < 0.3
    rank = np.round(rng.normal(size=300), 1).astype(np.float32)  # with ties
    pairs = rank[~noisy][:, None] - rank[noisy][None, :]
    assert auc(rank, noisy) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auc(-rank, noisy) == pytest.approx(1 - auc(rank, noisy))
    assert auc(np.zeros(300), noisy) == 0.5
    rank[:5] = NAN
    assert auc(rank, noisy) == pytest.approx(auc(rank[5:], noisy[5:]))


def test_log_parts_are_joined_and_a_resumed_step_counts_once(tmp_path: Path):
    pq.write_table(HAND.slice(0, 8), tmp_path / "step-00000002-rank0000.parquet")
    again = log_of([(1, 1, 3, 10.0, -2.0, True)])  # visit 1 of sample 3, written again after a resume
    pq.write_table(pa.concat_tables([again, HAND.slice(8)]), tmp_path / "step-00000004-rank0000.parquet")
    (tmp_path / "notes.txt").write_text("not a part")
    log = read_log(tmp_path)
    assert log.num_rows == HAND.num_rows and log.schema.names == LOG_SCHEMA.names
    rows = [row for row in log.to_pylist() if (row["sample"], row["visit"]) == (3, 1)]
    assert [row["kept"] for row in rows] == [True]
    assert read_log(tmp_path / "nothing") is None
