"""The words and numbers of the report: headline, what was run, and the table that compares runs. No pictures, no HTML."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa


@dataclass
class Run:
    """What a run folder holds, as far as it is there; `label` is unique among the runs of a report."""

    path: Path
    label: str
    number: int
    config: dict
    result: dict
    metrics: list[dict]  # training lines only, one a step, in order
    evaluations: list[dict]  # lines of metrics.jsonl with "eval"
    log: pa.Table | None
    truth: pa.Table | None
    quality: dict | None  # of evaluation.selection_quality
    notes: list[str] = field(default_factory=list)  # what could not be read, in sentences

    @property
    def selector(self) -> str:
        return str(dig(self.config, "selector.name") or dig(self.result, "config.selector.name", "config.selector", "config.name") or "unknown")

    @property
    def warmup_visits(self) -> int:
        known = dig(self.quality or {}, "warmup_visits")
        return int(known if known is not None else dig(self.config, "selector.warmup_visits") or 0)

    @property
    def sources(self) -> list[str]:
        return [str(source["url"]) for source in dig(self.config, "data.sources") or [] if isinstance(source, dict) and "url" in source]


class Row(NamedTuple):
    """One row of the comparison: texts, and which of them are the best of the row."""

    label: str
    chance: str
    values: list[str]
    best: list[bool]


class Group(NamedTuple):
    """Rows under one heading."""

    title: str
    rows: list[Row]


def dig(values: Any, *paths: str) -> Any:
    """The first of some dotted paths that leads to something that is not None."""
    for path in paths:
        place = values
        for part in path.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        if place is not None:
            return place
    return None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage, with more digits where one would leave a single figure."""
    value = number(value)
    if value is None:
        return "–"
    return f"{100 * value:.{digits if value == 0 or abs(value) >= 0.01 else digits + 1}f} %"


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands; from ten million on in millions."""
    value = number(value)
    if value is None:
        return "–"
    return f"{value / 1e6:,.1f} M" if abs(value) >= 1e7 else f"{value:,.0f}".replace(",", "\u202f")


def seconds(value: Any) -> str:
    """Wall time in the unit that reads best."""
    value = number(value)
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"


def headline(runs: Sequence[Run]) -> str:
    """What the first run reached, beside the others: sentences that hold for any numbers, good or bad."""
    main, rest = runs[0], runs[1:]
    sentences = []
    zero_shot = main.result.get("zero_shot") or {}
    top1, chance = number(zero_shot.get("top1")), number(zero_shot.get("chance"))
    if top1 is not None:
        text = f"{main.label} names {percent(top1)} of {count(zero_shot.get('images'))} held-out images right among {count(zero_shot.get('classes'))} captions"
        text += f", {_times(top1 / chance)} chance" if chance else ""
        text += _others(main, rest, top1)
        sentences.append(f"{text}.")
    precision, by_chance = number(dig(main.quality or {}, "precision")), number(dig(main.quality or {}, "chance"))
    if precision is not None and by_chance is not None:
        text = f"Of the pairs it kept after warm-up {percent(precision, 0)} were clean, where a random choice gives {percent(by_chance, 0)}"
        first, last = number(dig(main.quality, "precision_first")), number(dig(main.quality, "precision_last"))
        if dig(main.quality, "rises") and first is not None and last is not None and last > first:
            text += f"; it rose from {percent(first, 0)} to {percent(last, 0)} over its visits"
        sentences.append(f"{text}.")
    if not sentences:
        steps = max((line["step"] for line in main.metrics), default=None) or main.result.get("step")
        sentences.append(f"{main.label} trained {count(steps)} steps and has not been evaluated yet." if steps else f"{main.label} has no figures yet.")
    return " ".join(sentences)


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _others(main: Run, rest: Sequence[Run], top1: float) -> str:
    parts = []
    for other in rest:
        theirs = number(dig(other.result, "zero_shot.top1"))
        if theirs is None:
            continue
        text = f"{other.label} {percent(theirs)}"
        mine, other_trained = number(dig(main.result, "samples.trained")), number(dig(other.result, "samples.trained"))
        if mine and other_trained:
            same = abs(other_trained / mine - 1) < 0.01
            text += " with as many trained samples" if same else f" with {other_trained / mine:.2g} times the trained samples"
        errors = [number(dig(run.result, "zero_shot.top1_error")) for run in (main, other)]
        if None not in errors and abs(top1 - theirs) < 2 * math.hypot(*errors):
            text += " (no more apart than chance in the test images may bring)"
        parts.append(text)
    return f"; {', '.join(parts)}" if parts else ""


def comparison(runs: Sequence[Run]) -> list[Group]:
    """All figures side by side. A row that no run has is left out; a group without rows too."""
    recall = [
        (f"{name}, R@{k}", f"retrieval.{key}.r{k}", percent, +1, f"retrieval.{key}.chance.r{k}")
        for name, key in (("image to text", "image_to_text"), ("text to image", "text_to_image"))
        for k in (1, 5, 10)
    ]
    groups: list[tuple[str, list[tuple[str, str, Callable[[Any], str], int, str]]]] = [
        (
            "Recognition, held-out images",
            [
                ("zero-shot top-1", "zero_shot.top1", percent, +1, "zero_shot.chance"),
                ("zero-shot top-5", "zero_shot.top5", percent, +1, "zero_shot.chance_top5"),
                ("linear probe top-1", "linear_probe.top1", percent, +1, "linear_probe.chance"),
            ],
        ),
        ("Retrieval by caption, held-out images", recall),
        (
            "Selection after warm-up",
            [
                ("clean share of the kept pairs", "selection.precision", percent, +1, "selection.chance"),
                ("AUC, clean against noisy", "selection.auc", lambda value: _plain(value, 3), +1, ""),
                ("never selected: all pairs", "selection.never_selected.all", percent, 0, ""),
                ("never selected: clean pairs", "selection.never_selected.clean", percent, 0, ""),
                ("never selected: noisy pairs", "selection.never_selected.noisy", percent, 0, ""),
            ],
        ),
        (
            "Cost",
            [
                ("samples trained", "samples.trained", count, 0, ""),
                ("samples scored", "samples.scored", count, 0, ""),
                ("candidates per second, median", "rate", count, 0, ""),
                ("seconds of training and scoring", "work", lambda value: _plain(value, 0), 0, ""),
                ("seconds in all", "seconds.total", lambda value: _plain(value, 0), 0, ""),
            ],
        ),
    ]
    told = [_flat(run) for run in runs]
    shown = [Group(title, [row for spec in rows if (row := _row(told, *spec)) is not None]) for title, rows in groups]
    return [group for group in shown if group.rows]


def _flat(run: Run) -> dict:
    """The result with the selection figures (which the report may have worked out itself) and the rates of metrics.jsonl."""
    rates = sorted(rate for line in run.metrics if (rate := number(line.get("candidates_per_second"))) is not None)
    work = [number(dig(run.result, f"seconds.{phase}")) for phase in ("score", "train")]
    return run.result | {
        "selection": run.quality or {},
        "rate": rates[len(rates) // 2] if rates else None,
        "work": None if None in work else sum(work),
    }


def _row(told: Sequence[dict], label: str, path: str, form: Callable[[Any], str], better: int, chance: str) -> Row | None:
    values = [number(dig(result, path)) for result in told]
    if all(value is None for value in values):
        return None
    texts = [form(value) for value in values]
    if path == "zero_shot.top1":
        errors = [number(dig(result, "zero_shot.top1_error")) for result in told]
        texts = [f"{text} ± {100 * error:.1f}" if error else text for text, error in zip(texts, errors)]
    there = [value for value in values if value is not None]
    best = max(there) if better and len(there) > 1 and len(set(there)) > 1 else None
    by_chance = 0.5 if path == "selection.auc" else next((c for result in told if chance and (c := number(dig(result, chance))) is not None), None)
    return Row(label, form(by_chance) if by_chance is not None else "", texts, [best is not None and value == best for value in values])


def _plain(value: Any, digits: int) -> str:
    value = number(value)
    return "–" if value is None else f"{value:.{digits}f}"


def facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What was run: rows of (label, one text per run); a row that no run can fill is left out."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("selector", _selector),
        ("training pairs", lambda run: count(dig(run.result, "data.samples"))),
        ("of these mismatched on purpose", _noise),
        ("held-out images", lambda run: count(dig(run.result, "zero_shot.images", "retrieval.images"))),
        ("held-out captions", lambda run: count(dig(run.result, "retrieval.texts", "zero_shot.classes"))),
        ("steps", lambda run: count(run.result.get("step") or max((line["step"] for line in run.metrics), default=None))),
        ("visits of each pair", lambda run: _plain(max((number(line.get("visit")) or 0 for line in run.metrics), default=None), 1)),
        ("candidates a step", lambda run: _batch(run.config)),
        ("model", _model),
        ("learning rate, seed", _rate_and_seed),
        ("device", lambda run: str(run.result.get("device") or "–")),
        ("undecodable samples", _bad),
    ]
    phases = {phase: None for run in runs for phase in (dig(run.result, "seconds") or {})}
    rows += [(f"wall time: {phase}", lambda run, phase=phase: seconds(dig(run.result, f"seconds.{phase}"))) for phase in phases]
    filled = [(label, [text(run) for run in runs]) for label, text in rows]
    return [(label, texts) for label, texts in filled if any(text != "–" for text in texts)]


def _selector(run: Run) -> str:
    settings = dig(run.config, "selector") or {}
    if not isinstance(settings, dict):
        return run.selector
    parts = [f"{settings['variant']} variant"] if "variant" in settings else []
    if number(settings.get("rate")) is not None and run.selector != "keep_all":
        parts.append(f"keeps {percent(settings['rate'], 0)}")
    if "warmup_visits" in settings:
        parts.append(f"after {settings['warmup_visits']} visits of warm-up")
    return f"{run.selector}: {', '.join(parts)}" if parts else run.selector


def _noise(run: Run) -> str:
    noise = dig(run.result, "data.noise")
    share = number(dig(noise, "rate", "share") if isinstance(noise, dict) else noise)
    return percent(share, 0) if share is not None else "–"


def _batch(config: dict) -> str:
    batch, groups = dig(config, "data.batch"), dig(config, "data.groups")
    return "–" if batch is None else f"{batch} in {groups} groups" if groups else str(batch)


def _model(run: Run) -> str:
    size, pixels = number(dig(run.result, "model.parameters")), dig(run.result, "model.image_size")
    parts = [f"{size / 1e6:.1f} M parameters"] if size else []
    parts += [f"{pixels} px"] if pixels else []
    return ", ".join(parts) or "–"


def _rate_and_seed(run: Run) -> str:
    rate, seed = dig(run.config, "optimizer.lr", "engine.lr", "engine.optimizer.lr", "lr"), dig(run.config, "seed", "run.seed", "data.seed")
    parts = ([f"{rate:g}"] if number(rate) is not None else []) + ([f"seed {seed}"] if seed is not None else [])
    return ", ".join(parts) or "–"


def _bad(run: Run) -> str:
    bad = dig(run.result, "samples.bad")
    if not isinstance(bad, dict):
        return "–"
    return ", ".join(f"{cause} {count(times)}" for cause, times in bad.items()) or "none"
