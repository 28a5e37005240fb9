"""What the selector did, read from its log, and how right it was where the truth about the pairs is known."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

LOG_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("visit", pa.int16()),
        ("sample", pa.int64()),
        ("score", pa.float32()),  # 100 cos clamped at 0; NaN when not scored at this visit
        ("ranked_by", pa.float32()),  # what the selector ranked by, larger is kept; NaN when nothing was ranked
        ("kept", pa.bool_()),
    ]
)


def read_log(folder: Path) -> pa.Table | None:
    """All parts of the selection log (`LOG_SCHEMA`), each (sample, visit) once; None when there is no part.

    A run that resumes writes the steps since its last checkpoint a second time, hence the de-duplication: the later part is kept.
    Costs one sort and about 60 bytes a row at the peak (0.8 M rows: 50 MB).
    """
    parts = sorted(folder.glob("step-*.parquet"))
    if not parts:
        return None
    log = ds.dataset(parts, schema=LOG_SCHEMA).to_table()
    newest = np.arange(log.num_rows)[::-1]
    key = (log["sample"].to_numpy() << 16 | log["visit"].to_numpy().astype(np.int64))[newest]
    return log.take(np.sort(newest[np.unique(key, return_index=True)[1]]))


def selection_quality(log: pa.Table, truth: pa.Table | None, *, warmup_visits: int | None) -> dict:
    """Judges a selection log (`LOG_SCHEMA`) against `truth` (sample int64, noisy bool); without truth only what needs none is filled in.

    Visits from `warmup_visits` on count as after warm-up (None: it is not over, so none). A visit is judged within itself, for scores drift between visits: `precision`
    is the clean share of the kept rows, `chance` the clean share of all its rows, `auc` the chance that a clean row was ranked above a
    noisy one (ties half; rows without rank left out). Rows of samples that `truth` does not list are left out and counted.

    Returns shares in [0, 1], scores on the 100 cos scale, None for what cannot be said:
    `visits`: per visit `visit rows kept precision chance auc score score_clean score_noisy gap` (gap = clean - noisy);
    after warm-up `precision`, `chance` (pooled rows), `auc` (visits weighted by their clean x noisy pairs), `precision_first`,
    `precision_last`, `slope` (of precision per visit, least squares weighted by kept rows), `slope_error` (its standard error),
    `rises` (slope above twice its error: the precision of a random choice has a slope above 0 half of the time),
    `never_selected` {all, clean, noisy} (of the samples offered after warm-up); and over all visits `gap_peak_visit`.
    Costs a sort per visit.
    """
    truth = truth if truth is not None and truth.num_rows else None
    columns = {name: log[name].to_numpy() for name in ("visit", "sample", "score", "ranked_by", "kept")}
    noisy, known = _noisy(columns["sample"], truth)
    unknown = 0 if truth is None else int((~known).sum())
    if unknown:
        columns, noisy = {name: column[known] for name, column in columns.items()}, noisy[known]
    order = np.argsort(columns["visit"], kind="stable")
    columns, noisy = {name: column[order] for name, column in columns.items()}, noisy[order]
    numbers, starts = np.unique(columns["visit"], return_index=True)
    bounds = [*starts, len(noisy)]
    visits = []
    for number, first, last in zip(numbers, bounds, bounds[1:]):
        part = {name: column[first:last] for name, column in columns.items()}
        visits.append(_visit(int(number), part, noisy[first:last], judged=truth is not None))
    over = math.inf if warmup_visits is None else warmup_visits
    late = [visit for visit in visits if visit["visit"] >= over]
    gaps = [visit for visit in visits if visit["gap"] is not None]
    after = columns["visit"] >= over
    result = {
        "warmup_visits": warmup_visits,
        "rows": len(noisy),
        "rows_after_warmup": int(after.sum()),
        "samples": len(np.unique(columns["sample"])),
        "rows_without_truth": unknown,
        "gap_peak_visit": max(gaps, key=lambda visit: visit["gap"])["visit"] if gaps else None,
        "never_selected": _never(columns["sample"][after], columns["kept"][after], noisy[after], judged=truth is not None),
        "visits": visits,
    }
    return result | _after_warmup(late)


def auc(ranked_by: np.ndarray, noisy: np.ndarray) -> float | None:
    """P(a clean row ranks above a noisy one), ties half (Mann-Whitney U over mid-ranks), of float [n] and bool [n]; rows whose rank is
    NaN are left out; None when a side is empty."""
    ranked = ~np.isnan(ranked_by)
    values, bad = ranked_by[ranked], noisy[ranked]
    clean_count, noisy_count = int((~bad).sum()), int(bad.sum())
    if not clean_count or not noisy_count:
        return None
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(count) - (count - 1) / 2
    above = mid_rank[place][~bad].sum() - clean_count * (clean_count + 1) / 2
    return float(above / (clean_count * noisy_count))


def _noisy(samples: np.ndarray, truth: pa.Table | None) -> tuple[np.ndarray, np.ndarray]:
    """Per row: whether the pair is noisy, and whether the truth knows it. bool [n] each."""
    if truth is None:
        return np.zeros(len(samples), bool), np.zeros(len(samples), bool)
    ids, flags = truth["sample"].to_numpy(), truth["noisy"].to_numpy()
    order = np.argsort(ids, kind="stable")
    ids, flags = ids[order], flags[order]
    place = np.searchsorted(ids, samples).clip(max=len(ids) - 1)
    return flags[place], ids[place] == samples


def _visit(number: int, rows: dict[str, np.ndarray], noisy: np.ndarray, *, judged: bool) -> dict:
    kept, scores = rows["kept"], rows["score"]
    clean_score, noisy_score = (_mean(scores[~noisy]), _mean(scores[noisy])) if judged else (None, None)
    return {
        "visit": number,
        "rows": len(kept),
        "kept": int(kept.sum()),
        "precision": float((kept & ~noisy).sum() / kept.sum()) if judged and kept.any() else None,
        "chance": float((~noisy).mean()) if judged else None,
        "pairs": int((~noisy).sum()) * int(noisy.sum()) if judged else 0,
        "auc": auc(rows["ranked_by"], noisy) if judged else None,
        "score": _mean(scores),
        "score_clean": clean_score,
        "score_noisy": noisy_score,
        "gap": None if clean_score is None or noisy_score is None else clean_score - noisy_score,
    }


def _after_warmup(late: list[dict]) -> dict:
    """Figures over the visits after warm-up; a visit that the end of the run cut short weighs by the rows it has."""
    judged = [visit for visit in late if visit["precision"] is not None]
    ranked = [visit for visit in late if visit["auc"] is not None]
    kept = np.array([visit["kept"] for visit in judged], float)
    precision = np.array([visit["precision"] for visit in judged], float)
    slope, error = _slope(np.array([visit["visit"] for visit in judged], float), precision, np.sqrt(kept))
    return {
        "precision": float(np.average(precision, weights=kept)) if judged else None,
        "chance": float(np.average([visit["chance"] for visit in judged], weights=[visit["rows"] for visit in judged])) if judged else None,
        "auc": float(np.average([visit["auc"] for visit in ranked], weights=[visit["pairs"] for visit in ranked])) if ranked else None,
        "precision_first": judged[0]["precision"] if judged else None,
        "precision_last": judged[-1]["precision"] if judged else None,
        "slope": slope,
        "slope_error": error,
        "rises": None if slope is None else slope > max(2 * (error or 0.0), 1e-6),
    }


def _slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float | None, float | None]:
    """Slope of the weighted least-squares line and its standard error, which takes three points."""
    if len(x) < 2:
        return None, None
    if len(x) < 3:
        return float(np.polyfit(x, y, 1, w=weights)[0]), None
    line, covariance = np.polyfit(x, y, 1, w=weights, cov=True)
    return float(line[0]), float(np.sqrt(covariance[0, 0]))


def _never(samples: np.ndarray, kept: np.ndarray, noisy: np.ndarray, *, judged: bool) -> dict[str, float | None]:
    """Share of the samples offered that were kept at none of their visits."""
    ids, place = np.unique(samples, return_inverse=True)
    never = np.bincount(place, weights=kept, minlength=len(ids)) == 0
    bad = np.zeros(len(ids), bool)
    bad[place] = noisy
    share = {"all": _mean(never.astype(float)), "clean": None, "noisy": None}
    return share | ({"clean": _mean(never[~bad].astype(float)), "noisy": _mean(never[bad].astype(float))} if judged else {})


def _mean(values: np.ndarray) -> float | None:
    """Mean of what is not NaN in float64; None when nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean(dtype=np.float64)) if len(values) else None
