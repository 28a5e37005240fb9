"""The report: one self-contained HTML page about one run or several, from what their folders hold."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from pipeline.config import ConfigError
from pipeline.record import plots
from pipeline.record.compared import read
from pipeline.record.curves import distillation_plots, evaluation_plots, series_of
from pipeline.record.figures import percent
from pipeline.record.images import contact_sheets, data_uri, load_pairs
from pipeline.record.plots import Plot, Series
from pipeline.record.runs import UNREADABLE, Run, dig, label, load_run, number, read_part
from pipeline.record.tables import comparison, facts, headline
from pipeline.record.warmup import warmup_plot

CAPTIONS_SHOWN, IMAGES_SHOWN = 8, 5
_NO_SELECTION = ("random", "keep_all", "info_batch")  # their sheets would show the luck of the draw, or nothing


def write_report(runs: list[Path], out: Path, compared: Sequence[Path] = ()) -> Path:
    """Writes the page about `runs` (the first is the subject, the others stand beside it) and returns `out`. `compared`: folders of
    tools.compare, a table of methods over seeds for each.

    Reads `resolved.yaml`, `metrics.jsonl`, `result.json`, `selection/` and `evaluation/examples.json` of each, and the few images it
    shows from the shards that these name. Whatever is missing or unreadable becomes a sentence on the page. Raises ConfigError when
    there is no run, or a folder holds none of the files. Needs matplotlib and jinja2 (extra [train]).
    """
    if not runs:
        raise ConfigError("report: name at least one run folder")
    loaded = [load_run(Path(path), place) for place, path in enumerate(runs)]
    label(loaded)
    same, differ = facts(loaded)
    templates = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html").render(
        title=" and ".join(run.label for run in loaded[:2]) + (f" and {len(loaded) - 2} more" if len(loaded) > 2 else ""),
        headline=headline(loaded),
        runs=loaded,
        same=same,
        differ=differ,
        comparison=comparison(loaded),
        plots=[plot._replace(svg=Markup(plot.svg)) for plot in _plots(loaded)],
        compared=[read(folder) for folder in compared],
        missing_plots=_missing_plots(loaded),
        missing_figures=_missing_figures(loaded),
        sheets=_sheets(loaded),
        retrieval=_retrieval(loaded),
        percent=percent,
        colours=plots.COLOURS,
        settings=lambda run: yaml.safe_dump(run.config, sort_keys=False, width=120),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    partial.write_bytes(page.encode("utf-8", "replace"))  # JSON may smuggle in half a surrogate pair, which is no UTF-8
    partial.replace(out)
    return out


def _plots(runs: Sequence[Run]) -> list[Plot]:
    found = [
        _loss_plot(runs),
        _precision_plot(runs),
        *_drift_plots(runs),
        warmup_plot(runs),
        _rate_plot(runs),
        *evaluation_plots(runs),
        *distillation_plots(runs),
    ]
    return [plot for plot in found if plot is not None]


def _loss_plot(runs: Sequence[Run]) -> Plot | None:
    series = series_of(runs, "loss")
    if not series:
        return None
    ends = ", ".join(f"{one.label} {one.y[-1]:.2f}" for one in series)
    caption = "Thin: as logged; thick: moving average. It is the loss of the rows trained, so its level says little across selectors."
    terms = {run.label: _sum_of(run) for run in runs if run.objectives}
    if len(set(terms.values())) > 1:
        caption += " ".join(["", *(f"{name}: {text}." for name, text in terms.items())])
    elif terms:
        caption += f" Loss: {next(iter(terms.values()))}."
    svg = plots.lines("loss", series, xlabel="step", ylabel="loss", smooth=True)
    return Plot("Training loss", svg, caption, f"Line chart of the training loss over steps. Last values: {ends}.")


def _sum_of(run: Run) -> str:
    """What a run's loss is the sum of: "clip + 0.5 soft (logit_kd)"."""
    terms = []
    for name, one in run.objectives.items():
        weight, kind = number(one.get("weight")), str(one.get("name", name))
        terms.append(("" if weight in (None, 1.0) else f"{weight:g} ") + (name if kind == name else f"{name} ({kind})"))
    return " + ".join(terms)


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
    return Plot(
        "Precision of the kept pairs",
        svg,
        caption,
        f"Line chart of the clean share per visit. At the last visit: {last}; chance {percent(chance, 0)}.",
    )


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
    series = series_of(runs, "candidates_per_second")
    if not series:
        return None
    medians = ", ".join(f"{one.label} {sorted(one.y)[len(one.y) // 2]:,.0f}" for one in series)
    waits = [number(line.get("data_wait_share")) for run in runs for line in run.metrics]
    waits = sorted(wait for wait in waits if wait is not None)
    caption = f"Candidates per second, trained or not. Median: {medians}."
    caption += f" Waiting for data took {percent(waits[len(waits) // 2])} of the time (median)." if waits else ""
    svg = plots.lines("rate", series, xlabel="step", ylabel="candidates per second", smooth=True, floor=0)
    return Plot("Throughput", svg, caption, f"Line chart of candidates per second over steps. Medians: {medians}.")


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


def _missing_figures(runs: Sequence[Run]) -> list[str]:
    """One sentence for each part of the evaluation that a run lacks."""
    parts = {
        "zero_shot": "no zero-shot figures",
        "retrieval": "no retrieval figures",
        "linear_probe": "no linear probe (it takes two classes of four held-out images)",
    }
    told = []
    for run in (run for run in runs if run.result and not {"segmentation", "related"} & run.result.keys()):
        lacks = [text for key, text in parts.items() if not isinstance(run.result.get(key), dict)]
        if lacks:
            told.append(f"{run.label} has {', '.join(lacks)}.")
    return told


def _sheets(runs: Sequence[Run]) -> list[dict]:
    """Contact sheets of the runs whose selector ranks, or the reason why there are none."""
    found = []
    choosing = [run for run in runs if run.log is not None and run.selector not in _NO_SELECTION]
    for run in choosing:
        try:
            sheets = contact_sheets(run.log, run.truth, run.sources, warmup_visits=run.warmup_visits)
            note = "" if sheets else f"{run.label} refused no pair after its warm-up, so there is nothing to show."
        except UNREADABLE as error:
            sheets, note = None, f"The pairs of {run.label} cannot be shown: {error}"
        found.append({"run": run, "sheets": sheets, "note": note})
    return found


def _retrieval(runs: Sequence[Run]) -> list[dict]:
    """Captions with the images that each run found: [{"caption", "strips": [{"label", "images": [...]}]}], at most CAPTIONS_SHOWN."""
    blocks: dict[str, list[dict]] = {}
    for run in runs:
        if not (run.path / "evaluation" / "examples.json").is_file():
            continue
        told = read_part(run, "evaluation/examples.json", json.loads)
        try:
            entries = [(str(entry["caption"]), entry["images"][:IMAGES_SHOWN]) for entry in told["retrieval"][:CAPTIONS_SHOWN]]
            pairs = iter(load_pairs(str(told["data"]), [image["row"] for _, images in entries for image in images]))
        except (*UNREADABLE, TypeError, IndexError) as error:
            run.notes.append(f"Its retrieval examples cannot be shown: {error}")
            continue
        for caption, images in entries:
            shown = [
                {"right": bool(i.get("right")), "caption": str(i.get("caption", "")), "uri": data_uri(next(pairs).image)} for i in images
            ]
            blocks.setdefault(caption, []).append({"label": run.label, "images": shown})
    return [{"caption": caption, "strips": strips} for caption, strips in list(blocks.items())[: CAPTIONS_SHOWN if len(runs) <= 2 else 6]]
