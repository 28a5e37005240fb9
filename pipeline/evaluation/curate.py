"""python -m pipeline curate: what a run learnt about its pairs, as a table, a list to leave out, and shards without them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import ConfigError, load
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.sources import Sources
from pipeline.distributed import checkpoint
from pipeline.evaluation.selection_quality import auc, read_log
from pipeline.record.images import load_truth
from pipeline.selection.blend import log_clean
from pipeline.selection.warmup import visits_of

CLEAN, NOISY, UNKNOWN = "clean", "noisy", "unknown"


@dataclass
class Verdicts:
    """One row a sample, in id order; arrays of length N."""

    score: np.ndarray  # float32, NaN where the sample was never scored
    visits: np.ndarray  # int32, scored visits behind it
    selected: np.ndarray  # int32, times trained after warm-up, as far as it was logged
    clean: np.ndarray  # float32, P(clean); NaN where unknown
    verdict: np.ndarray  # str
    about: str  # what `score` is
    apart: float  # how many pooled standard deviations lie between the means of the two classes


def judge(folder: Path, sources: Sources, share: float | None = None) -> Verdicts:
    """Reads a run's selection log and score table. `share`: the part of the scored pairs, lowest first, that is judged noisy; None: by the
    split of the scores in two classes, which finds two classes in any data. Raises ConfigError where nothing was scored."""
    from pipeline.run import RunConfig

    config = load(RunConfig, folder / "resolved.yaml")
    score, visits, selected, about = _history(folder, config, sources)
    known = np.isfinite(score)
    if known.sum() < 2:
        raise ConfigError(f"{folder}: {config.selector.name} scored no pairs; train with a selector that does (blend, dissect, clip_score)")
    clean = np.full(len(score), np.nan, np.float32)
    level = torch.from_numpy(score[known])
    clean[known] = log_clean(level, torch.ones(len(level), dtype=torch.bool)).exp().numpy()
    low = known & (clean < 0.5)
    if share is not None:
        low[:] = False
        low[np.flatnonzero(known)[np.argsort(score[known], kind="stable")[: round(share * known.sum())]]] = True
    verdict = np.where(known, np.where(low, NOISY, CLEAN), UNKNOWN)
    one, other = score[low], score[known & ~low]
    apart = 0.0
    if len(one) and len(other):
        apart = float((other.mean() - one.mean()) / max(np.sqrt((one.var() * len(one) + other.var() * len(other)) / known.sum()), 1e-6))
    return Verdicts(score, visits, selected, clean, verdict, about, apart)


def _history(folder: Path, config: Any, sources: Sources) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Scores, visits and times selected. Where every sample was logged, the mean over all its visits, warm-up's too: it separates best,
    whatever the selector's own history is. Scores rise from visit to visit, so each counts as its distance from the mean of its visit: a
    pair that was not scored at late ones is not low for that. Else the table of the newest checkpoint."""
    count, log = sources.num_samples, read_log(folder / "selection")
    score, visits, selected = np.full(count, np.nan, np.float32), np.zeros(count, np.int32), np.zeros(count, np.int32)
    if log is not None:
        sample, kept = log["sample"].to_numpy(), log["kept"].to_numpy()
        visit, warmup = log["visit"].to_numpy(), visits_of(folder, config.selector.warmup_visits)
        late = visit >= (math.inf if warmup is None else warmup)
        selected = np.bincount(sample[late & kept], minlength=count).astype(np.int32)
        logged = log["score"].to_numpy()
        there = np.isfinite(logged)
        sample, visit, logged = sample[there], visit[there], logged[there].astype(np.float64)
        times = np.bincount(sample, minlength=count)
        if len(np.unique(log["sample"])) == count and times.any():
            level = np.bincount(visit, logged) / np.maximum(np.bincount(visit), 1)
            mean = np.bincount(sample, logged - level[visit], count) / np.maximum(times, 1)
            about = "mean distance of the score from its visit's mean"
            return np.where(times > 0, mean, np.nan).astype(np.float32), times.astype(np.int32), selected, about
    found = checkpoint.newest(folder)
    if found is None:
        raise ConfigError(
            f"{folder}: has neither a selection log of all samples nor a finished checkpoint; start the training command again"
        )
    data = config.data
    lanes = RankLanes(layout(sources.shapes, data.pool, data.lanes, data.groups, data.window, config.seed), 0, 1)
    table = checkpoint.read_lanes(found[0], lanes)
    if config.selector.learns:  # its table holds losses, and rows with other negatives beside them at each visit
        return score, visits, selected, "nothing"
    visits[lanes.ids] = table["visits"].numpy()
    score[lanes.ids] = np.where(table["visits"].numpy() > 0, table["score"].numpy(), np.nan)
    return score, visits, selected, "the history in the newest checkpoint's score table"


def curate(folder: Path, out: Path, share: float | None, write: bool) -> str:
    """Writes samples.parquet, noisy.txt, examples.html and, if asked, shards; what was found in words. Raises ConfigError, DataError."""
    from pipeline.evaluation.curated import write_examples, write_shards
    from pipeline.run import RunConfig

    if not (folder / "resolved.yaml").is_file():
        raise ConfigError(f"{folder}: is no run folder, it has no resolved.yaml; give the `out` of a run that was trained")
    config = load(RunConfig, folder / "resolved.yaml")
    sources = Sources.open(config.data)
    found = judge(folder, sources, share)
    urls = [source.url for source in config.data.sources]
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty; name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    keys = [key for index in sources.indices for key in index.keys(range(index.num_samples))]
    names = [index.shard_names[index.shard_of(row)] for index in sources.indices for row in range(index.num_samples)]
    source = np.repeat(np.arange(len(sources.indices), dtype=np.int16), [index.num_samples for index in sources.indices])
    columns = {"sample": np.arange(len(keys)), "source": source, "shard": pa.array(names).dictionary_encode(), "key": keys}
    columns |= {name: getattr(found, name) for name in ("score", "visits", "selected", "clean", "verdict")}
    pq.write_table(pa.table(columns), out / "samples.parquet", compression="zstd")
    bad = np.flatnonzero(found.verdict == NOISY)
    (out / "noisy.txt").write_text("".join(f"{urls[source[i]]}\t{names[i]}\t{keys[i]}\n" for i in bad), encoding="utf-8")
    truth = load_truth(urls)
    write_examples(out / "examples.html", found, truth, urls)
    lines = [
        f"{out}: {len(bad)} of {len(keys)} pairs judged noisy by the {found.about}"
        + (f", the lowest {share:.0%}" if share is not None else "")
        + f"; {int((found.verdict == UNKNOWN).sum())} never scored. The two classes lie {found.apart:.1f} standard deviations apart"
        + (": one bell cut in two gives 2.6, so look at examples.html first" if found.apart < 3 else ""),
    ]
    if truth is not None:
        lines.append(against(found, truth))
    if write:
        lines.append(write_shards(out / "shards", sources, found.verdict == NOISY))
    return "\n".join(lines)


def against(found: Verdicts, truth: pa.Table) -> str:
    """How right the verdicts are, where the truth is known (sample int64, noisy bool)."""
    ids, noisy = truth["sample"].to_numpy(), truth["noisy"].to_numpy()
    known = np.isfinite(found.score[ids])
    ids, noisy = ids[known], noisy[known]
    judged = found.verdict[ids] == NOISY
    hit = int((judged & noisy).sum())
    area = auc(found.score[ids], noisy)
    return (
        f"against the truth: {hit / max(judged.sum(), 1):.1%} of those judged noisy are, {hit / max(noisy.sum(), 1):.1%} of the noisy were found, "
        f"AUC {'unknown' if area is None else f'{area:.3f}'}"
    )
