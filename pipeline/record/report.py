"""The report: one self-contained HTML page about one run or several, from what their folders hold."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from pipeline.config import ConfigError, read_yaml
from pipeline.data.errors import DataError
from pipeline.evaluation.selection_quality import read_log, selection_quality
from pipeline.record import plots
from pipeline.record.images import contact_sheets, data_uri, load_pairs, load_truth
from pipeline.record.plots import Plot, Series, finite
from pipeline.record.tables import Run, comparison, dig, facts, headline, number, percent

CAPTIONS_SHOWN, IMAGES_SHOWN = 8, 5
_UNREADABLE = (DataError, OSError, ValueError, KeyError, pa.ArrowException)  # what a moved, damaged or older folder gives
_NO_SELECTION = ("random", "keep_all")  # their sheets would show the luck of the draw


def write_report(runs: list[Path], out: Path) -> Path:
    """Writes the page about `runs` (the first one is the subject, the others stand beside it) and returns `out`.

    Reads `resolved.yaml`, `metrics.jsonl`, `result.json`, `selection/` and `evaluation/examples.json` of each, and the few images it
    shows from the shards that these name. Whatever is missing or unreadable becomes a sentence on the page. Raises ConfigError when
    there is no run, or a folder holds none of the files. Needs matplotlib and jinja2 (extra [train]).
    """
    if not runs:
        raise ConfigError("report: name at least one run folder")
    loaded = [_load(Path(path), place) for place, path in enumerate(runs)]
    _label(loaded)
    folder = Path(__file__).parent
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html").render(
        title=" and ".join(run.label for run in loaded[:2]) + (f" and {len(loaded) - 2} more" if len(loaded) > 2 else ""),
        headline=headline(loaded),
        runs=loaded,
        facts=facts(loaded),
        comparison=comparison(loaded),
        plots=[plot._replace(svg=Markup(plot.svg)) for plot in _plots(loaded)],
        missing_plots=_missing_plots(loaded),
        sheets=_sheets(loaded),
        retrieval=_retrieval(loaded),
        percent=percent,
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def _load(path: Path, place: int) -> Run:
    if not any((path / name).is_file() for name in ("resolved.yaml", "metrics.jsonl", "result.json")):
        raise ConfigError(f"{path}: no run folder: it holds neither resolved.yaml nor metrics.jsonl nor result.json. Name the folder that training wrote")
    run = Run(path, path.resolve().name, place, {}, {}, [], [], None, None, None)
    run.config = _read(run, "resolved.yaml", lambda text: read_yaml(text, str(path / "resolved.yaml")))
    run.result = _read(run, "result.json", json.loads)
    lines = _lines(path / "metrics.jsonl")
    run.metrics = list({line["step"]: line for line in lines if "loss" in line}.values())
    run.metrics.sort(key=lambda line: line["step"])
    run.evaluations = [line for line in lines if isinstance(line.get("eval"), dict)]
    try:
        run.log = read_log(path / "selection")
    except _UNREADABLE as error:
        run.notes.append(f"The selection log cannot be read: {error}.")
    try:
        run.truth = load_truth(run.sources) if run.log is not None else None
    except _UNREADABLE as error:
        run.notes.append(f"The truth about its pairs cannot be read: {error}")
    told = run.result.get("selection")
    if isinstance(told, dict) and told.get("visits"):
        run.quality = told
    elif run.log is not None:
        run.quality = selection_quality(run.log, run.truth, warmup_visits=run.warmup_visits)
    return run


def _read(run: Run, name: str, parse: Any) -> dict:
    file = run.path / name
    if not file.is_file():
        run.notes.append(f"There is no {name}" + (": the run has not been evaluated." if name == "result.json" else "."))
        return {}
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except ValueError as error:  # a broken JSON or YAML file, or one that is not UTF-8
        run.notes.append(f"{name} cannot be read: {error}.")
        return {}
    return values if isinstance(values, dict) else {}


def _lines(path: Path) -> list[dict]:
    """The lines of metrics.jsonl that have a step; the last one of a run that was killed may be cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and number(line.get("step")) is not None:
            lines.append(line)
    return lines


def _label(runs: Sequence[Run]) -> None:
    """The selector's name where that tells the runs apart, else the folder's, else numbered."""
    for names in ([run.selector for run in runs], [run.path.resolve().name for run in runs]):
        if len(set(names)) == len(runs) and "unknown" not in names:
            break
    else:
        names = [f"{run.path.resolve().name} ({place + 1})" for place, run in enumerate(runs)]
    for run, name in zip(runs, names):
        run.label = name


def _plots(runs: Sequence[Run]) -> list[Plot]:
    found = [_loss_plot(runs), _precision_plot(runs), *_drift_plots(runs), _rate_plot(runs), _evaluation_plot(runs)]
    return [plot for plot in found if plot is not None]


def _series(runs: Sequence[Run], key: str) -> list[Series]:
    series = []
    for run in runs:
        lines = [line for line in run.metrics if number(line.get(key)) is not None]
        if lines:
            after = [line["step"] for line in lines if (number(line.get("visit")) or 0) >= run.warmup_visits]
            end = min(after) if run.warmup_visits and after else None
            series.append(Series(run.label, [line["step"] for line in lines], finite([line[key] for line in lines]), run.number, end))
    return series


def _loss_plot(runs: Sequence[Run]) -> Plot | None:
    series = _series(runs, "loss")
    if not series:
        return None
    ends = ", ".join(f"{one.label} {one.y[-1]:.2f}" for one in series)
    caption = "Thin: as logged; thick: moving average. The loss is that of the pairs trained, with the negatives among them, so its level says little across selectors."
    svg = plots.lines("loss", series, xlabel="step", ylabel="contrastive loss", smooth=True)
    return Plot("Training loss", svg, caption, f"Line chart of the training loss over steps. Last values: {ends}.")


def _precision_plot(runs: Sequence[Run]) -> Plot | None:
    series, chances = [], []
    for run in runs:
        visits = [visit for visit in (run.quality or {}).get("visits", []) if number(visit.get("precision")) is not None]
        if visits:
            end = run.warmup_visits - 0.5 if run.warmup_visits else None
            series.append(Series(run.label, [v["visit"] for v in visits], [v["precision"] for v in visits], run.number, end))
            chances += [v["chance"] for v in visits]
    if not series:
        return None
    last = ", ".join(f"{one.label} {percent(one.y[-1], 0)}" for one in series)
    chance = sum(chances) / len(chances)
    svg = plots.lines("precision", series, xlabel="visit", ylabel="clean share of kept pairs", percent=True, chance=chance)
    caption = "Share of clean pairs among those kept, visit by visit. Dotted: the share among all pairs, which a random choice keeps to."
    return Plot("Precision of the kept pairs", svg, caption, f"Line chart of the clean share per visit. At the last visit: {last}; chance {percent(chance, 0)}.")


def _drift_plots(runs: Sequence[Run]) -> list[Plot]:
    scored = [run for run in runs if any(number(visit.get("score")) is not None for visit in (run.quality or {}).get("visits", []))]
    limits = plots.score_limits([run.quality["visits"] for run in scored])
    found = []
    for run in scored:
        visits, peak = run.quality["visits"], run.quality.get("gap_peak_visit")
        known = number(visits[-1].get("gap")) is not None
        svg = plots.drift(f"drift{run.number}", visits, warmup=run.warmup_visits - 0.5 if run.warmup_visits else None, limits=limits)
        caption = f"{run.label}. Mean score of the pairs at each visit."
        caption += f" Clean and noisy are furthest apart at visit {peak}." if peak is not None else " Which pairs are noisy is not known."
        alt = f"Line chart of mean scores of {run.label} per visit."
        if known:
            alt += f" At the last visit clean pairs {visits[-1]['score_clean']:.1f}, noisy pairs {visits[-1]['score_noisy']:.1f}."
        found.append(Plot(f"Score drift, {run.label}" if len(scored) > 1 else "Score drift", svg, caption, alt))
    return found


def _rate_plot(runs: Sequence[Run]) -> Plot | None:
    series = _series(runs, "candidates_per_second")
    if not series:
        return None
    medians = ", ".join(f"{one.label} {sorted(one.y)[len(one.y) // 2]:,.0f}" for one in series)
    waits = [number(line.get("data_wait_share")) for run in runs for line in run.metrics]
    waits = sorted(wait for wait in waits if wait is not None)
    caption = f"Candidates per second, trained or not. Median: {medians}."
    caption += f" Waiting for data took {percent(waits[len(waits) // 2])} of the time (median)." if waits else ""
    svg = plots.lines("rate", series, xlabel="step", ylabel="candidates per second", smooth=True, floor=0)
    return Plot("Throughput", svg, caption, f"Line chart of candidates per second over steps. Medians: {medians}.")


def _evaluation_plot(runs: Sequence[Run]) -> Plot | None:
    series = []
    for run in runs:
        points = [(line["step"], number(dig(line["eval"], "zero_shot.top1", "top1"))) for line in run.evaluations]
        points = [(step, top1) for step, top1 in points if top1 is not None]
        if len(points) > 1:
            series.append(Series(run.label, [step for step, _ in points], [top1 for _, top1 in points], run.number))
    if not series:
        return None
    last = ", ".join(f"{one.label} {percent(one.y[-1])}" for one in series)
    svg = plots.lines("evaluation", series, xlabel="step", ylabel="zero-shot top-1", percent=True, floor=0)
    return Plot("Zero-shot accuracy on the way", svg, f"On held-out images. Last: {last}.", f"Line chart of zero-shot top-1 over steps. Last: {last}.")


def _missing_plots(runs: Sequence[Run]) -> list[str]:
    """One sentence for each curve that a run lacks."""
    told = []
    for run in runs:
        if not run.metrics:
            told.append(f"{run.label} has no metrics.jsonl, so no loss and no throughput.")
        if run.quality is None:
            told.append(f"{run.label} kept no selection log, so no precision and no score drift.")
        elif number(dig(run.quality, "precision")) is None:
            why = "no visit came after its warm-up" if dig(run.quality, "rows_after_warmup") == 0 else "which pairs are noisy is not known"
            told.append(f"{run.label} has no precision after warm-up: {why}.")
        if run.quality is not None and not any(number(visit.get("score")) is not None for visit in run.quality.get("visits", [])):
            told.append(f"{run.label} scored no pairs, so it has no score drift.")
    return told


def _sheets(runs: Sequence[Run]) -> list[dict]:
    """Contact sheets of the runs whose selector ranks, or the reason why there are none."""
    found = []
    choosing = [run for run in runs if run.log is not None and run.selector not in _NO_SELECTION]
    for run in choosing:
        try:
            sheets = contact_sheets(run.log, run.truth, run.sources, warmup_visits=run.warmup_visits)
            note = "" if sheets else f"{run.label} refused no pair after its warm-up, so there is nothing to show."
        except _UNREADABLE as error:
            sheets, note = None, f"The pairs of {run.label} cannot be shown: {error}"
        found.append({"run": run, "sheets": sheets, "note": note})
    return found


def _retrieval(runs: Sequence[Run]) -> list[dict]:
    """Captions with the images that each run found: [{"caption", "strips": [{"label", "images": [...]}]}], at most CAPTIONS_SHOWN."""
    blocks: dict[str, list[dict]] = {}
    for run in runs:
        told = _read(run, "evaluation/examples.json", json.loads) if (run.path / "evaluation" / "examples.json").is_file() else {}
        for entry in (told.get("retrieval") or [])[:CAPTIONS_SHOWN]:
            images = [dict(image) for image in entry.get("images", [])[:IMAGES_SHOWN]]
            try:
                pairs = load_pairs(str(told["data"]), [image["row"] for image in images])
            except (*_UNREADABLE, IndexError) as error:
                run.notes.append(f"Its retrieval examples cannot be shown: {error}")
                break
            for image, pair in zip(images, pairs):
                image["uri"] = data_uri(pair.image)
            blocks.setdefault(str(entry.get("caption")), []).append({"label": run.label, "images": images})
    return [{"caption": caption, "strips": strips} for caption, strips in list(blocks.items())[:CAPTIONS_SHOWN]]
