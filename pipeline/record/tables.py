"""The words and numbers of the report: headline, what was run, and the table that compares runs. No pictures, no HTML."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.record import systems
from pipeline.record.figures import count, percent, seconds
from pipeline.record.runs import Run, dig, number


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


def headline(runs: Sequence[Run]) -> list[str]:
    """What the first run reached, beside the others: sentences that hold for any numbers, good or bad."""
    main, rest = runs[0], runs[1:]
    sentences = [sentence for sentence in (_accuracy(main, rest), systems.sentence(main), _kept(main)) if sentence]
    if not sentences:
        steps = number(main.result.get("step")) or max((line["step"] for line in main.metrics), default=None)
        sentences.append(
            f"Run {main.label}: {count(steps)} steps, not evaluated yet." if steps else f"Run {main.label} has no figures yet."
        )
    return sentences


def _accuracy(main: Run, rest: Sequence[Run]) -> str:
    top1, chance, images, classes = (dig(main.result, f"zero_shot.{key}") for key in ("top1", "chance", "images", "classes"))
    if number(top1) is None:
        return ""
    text = f"Trained with {main.label}, the model names {percent(top1)} of {count(images)} held-out images right"
    text += f", with {count(classes)} captions to choose from"
    text += f": {_times(top1 / chance)} chance" if number(chance) else ""
    return " ".join(f"{sentence}." for sentence in (text, *(_other(main, other, top1) for other in rest)) if sentence)


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _other(main: Run, other: Run, top1: float) -> str:
    theirs = number(dig(other.result, "zero_shot.top1"))
    if theirs is None:
        return ""
    trained, other_trained = (number(dig(run.result, "samples.trained")) for run in (main, other))
    budget = ""
    if trained and other_trained:
        ratio = other_trained / trained
        budget = " on as many samples" if abs(ratio - 1) < 0.01 else f" on {ratio:.2g} times as many samples"
    text = f"With {other.label}{budget} it is {percent(theirs)}"
    errors = [number(dig(run.result, "zero_shot.top1_error")) for run in (main, other)]
    if None not in errors and abs(top1 - theirs) < 2 * math.hypot(*errors):
        text += ", no further away than the choice of test images explains"
    return text


def _kept(main: Run) -> str:
    precision, chance, first, last = (
        number(dig(main.quality or {}, key)) for key in ("precision", "chance", "precision_first", "precision_last")
    )
    if precision is None or chance is None:
        return ""
    text = f"After warm-up {percent(precision, 0)} of the pairs that {main.label} kept were clean"
    text += f", where a random choice gives {percent(chance, 0)}"
    if dig(main.quality or {}, "rises") and first is not None and last is not None and last > first:
        text += f"; the share rose from {percent(first, 0)} at the first visit to {percent(last, 0)} at the last"
    return f"{text}."


def comparison(runs: Sequence[Run]) -> list[Group]:
    """All figures side by side. A row that no run has is left out; a group without rows too."""
    recall = [
        (f"{name} R@{k}", f"retrieval.{key}.r{k}", percent, +1, f"retrieval.{key}.chance.r{k}")
        for name, key in (("image → text", "image_to_text"), ("text → image", "text_to_image"))
        for k in (1, 5, 10)
    ]
    groups: list[tuple[str, list[tuple[str, str, Callable[[Any], str], int, str]]]] = [
        (
            "Recognition, held-out images",
            [
                ("zero-shot top-1", "zero_shot.top1", percent, +1, "zero_shot.chance"),
                ("zero-shot top-5", "zero_shot.top5", percent, +1, "zero_shot.chance_top5"),
                ("linear probe", "linear_probe.top1", percent, +1, "linear_probe.chance"),
            ],
        ),
        *systems.rows(runs),
        ("Retrieval by caption, held-out images", recall),
        (
            "Selection after warm-up",
            [
                ("clean among the kept", "selection.precision", percent, +1, "selection.chance"),
                ("AUC clean/noisy", "selection.auc", lambda value: _plain(value, 3), +1, ""),
                ("never selected, all", "selection.never_selected.all", percent, 0, ""),
                ("never selected, clean", "selection.never_selected.clean", percent, 0, ""),
                ("never selected, noisy", "selection.never_selected.noisy", percent, 0, ""),
            ],
        ),
        (
            "Cost",
            [
                ("samples trained", "samples.trained", count, 0, ""),
                ("samples scored", "samples.scored", count, 0, ""),
                ("candidates a second", "rate", count, 0, ""),
                ("training and scoring, s", "work", lambda value: _plain(value, 0), 0, ""),
                ("whole training, s", "seconds.total", lambda value: _plain(value, 0), 0, ""),
            ],
        ),
    ]
    told = [_flat(run) for run in runs]
    shown = [Group(title, [row for spec in rows if (row := _row(told, *spec)) is not None]) for title, rows in groups]
    return [group for group in shown if group.rows]


def plain_text(runs: Sequence[Run]) -> str:
    """The comparison as a table for a terminal; an asterisk marks the best of a row."""
    lines = ["".ljust(26) + "chance".rjust(10) + "".join(run.label.rjust(14) for run in runs)]
    for group in comparison(runs):
        lines.append(group.title)
        for row in group.rows:
            cells = [f"{value}{'*' if best else ' '}".rjust(14) for value, best in zip(row.values, row.best)]
            lines.append(f"  {row.label}".ljust(26) + row.chance.rjust(10) + "".join(cells))
    return "\n".join(lines)


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
    texts, chances = [form(value) for value in values], [number(dig(result, chance)) for result in told if chance]
    if path == "zero_shot.top1":
        errors = [number(dig(result, "zero_shot.top1_error")) for result in told]
        texts = [f"{text.removesuffix(' %')} ± {100 * error:.1f} %" if error else text for text, error in zip(texts, errors)]
    there = [value for value in values if value is not None]
    best = max(there) if better and len(there) > 1 and len(set(there)) > 1 else None
    by_chance = 0.5 if path == "selection.auc" else next((value for value in chances if value is not None), None)
    return Row(label, form(by_chance) if by_chance is not None else "", texts, [best is not None and value == best for value in values])


def _plain(value: Any, digits: int) -> str:
    value = number(value)
    return "–" if value is None else f"{value:.{digits}f}"


def facts(runs: Sequence[Run]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """What was run: (label, text) of what all runs share, then (label, one text per run) of what differs; empty rows are left out."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("selector", _selector),
        ("training pairs", _pairs),
        ("held-out images", lambda run: count(dig(run.result, "zero_shot.images", "retrieval.images"))),
        ("held-out captions", lambda run: count(dig(run.result, "retrieval.texts", "zero_shot.classes"))),
        ("steps", lambda run: count(run.result.get("step") or max((line["step"] for line in run.metrics), default=None))),
        ("visits of each pair", lambda run: _plain(max((number(line.get("visit")) or 0 for line in run.metrics), default=None), 1)),
        ("candidates a step", lambda run: _batch(run.config)),
        ("model", _model),
        ("learning rate", lambda run: _setting(run, "optimizer.lr", "engine.lr", "engine.optimizer.lr", "lr")),
        ("seed", lambda run: _setting(run, "seed", "run.seed", "data.seed")),
        ("device", lambda run: str(run.result.get("device") or "–")),
        ("undecodable samples", _bad),
        ("wall time", _phases),
    ]
    same, differ = [], []
    for label, text in rows:
        texts = [text(run) for run in runs]
        if all(text == "–" for text in texts):
            continue
        if len(set(texts)) == 1:
            same.append((label, texts[0]))
        else:
            differ.append((label, texts))
    return same, differ


def _selector(run: Run) -> str:
    settings = dig(run.config, "selector") or {}
    if not isinstance(settings, dict):
        return run.selector
    parts = [f"{settings['variant']} variant"] if "variant" in settings else []
    if number(settings.get("prune")) is not None:
        parts.append(f"passes over {percent(settings['prune'], 0)} of the easy pairs")
    elif number(settings.get("rate")) is not None and run.selector != "keep_all":
        parts.append(f"keeps {percent(settings['rate'], 0)}")
    elif isinstance(settings.get("rate"), dict):
        start, end, visits = (settings["rate"].get(key) for key in ("start", "end", "visits"))
        parts.append(f"keeps {percent(start, 0)} to {percent(end, 0)} over {visits:g} visits")
    if "warmup_visits" in settings:
        automatic = ", found automatically" if settings["warmup_visits"] == "auto" else ""
        visits = run.warmup_visits if automatic else settings["warmup_visits"]
        parts.append("in warm-up, whose end is not found yet" if visits is None else f"after {visits} visits of warm-up{automatic}")
    return f"{run.selector}: {', '.join(parts)}" if parts else run.selector


def _pairs(run: Run) -> str:
    noise = dig(run.result, "data.noise")
    share = number(dig(noise, "rate", "share", "noisy") if isinstance(noise, dict) else noise)
    if share is None and run.truth is not None and run.truth.num_rows:
        share = pc.mean(run.truth["noisy"].cast(pa.int8())).as_py()
    pairs = count(dig(run.result, "data.samples"))
    return pairs if share is None or pairs == "–" else f"{pairs}, {percent(share, 0)} of them mismatched"


def _batch(config: dict) -> str:
    batch, groups = dig(config, "data.batch"), dig(config, "data.groups")
    batch = batch and batch * (dig(config, "data.candidates") or 1)
    return "–" if batch is None else f"{batch} in {groups} groups" if groups else str(batch)


def _model(run: Run) -> str:
    towers = [tower for tower in (dig(run.config, "towers") or {}).values() if isinstance(tower, dict)]
    names = [model for tower in towers if isinstance(model := tower.get("model"), str)]
    size = number(dig(run.result, "model.parameters"))
    pixels = dig(run.result, "model.image_size") or next((p for tower in towers if (p := dig(tower, "model.vision_cfg.image_size"))), None)
    parts = [
        *names,
        f"{f'{size / 1e6:.3g} M' if size >= 1e6 else count(size)} parameters" if size else "",
        f"{pixels} px" if pixels else "",
    ]
    return ", ".join(part for part in parts if part) or "–"


def _setting(run: Run, *paths: str) -> str:
    value = dig(run.config, *paths)
    return f"{value:g}" if number(value) is not None else "–"


def _phases(run: Run) -> str:
    phases = dig(run.result, "seconds")
    told = [f"{name} {seconds(value)}" for name, value in phases.items() if number(value)] if isinstance(phases, dict) else []
    return ", ".join(told) or "–"


def _bad(run: Run) -> str:
    bad = dig(run.result, "samples.bad")
    if not isinstance(bad, dict):
        return "–"
    return ", ".join(f"{cause} {count(times)}" for cause, times in bad.items()) or "none"
