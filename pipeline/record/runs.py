"""What the report reads of a run folder, tolerant to whatever is missing."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError, read_yaml
from pipeline.data.errors import DataError
from pipeline.evaluation.selection_quality import read_log, selection_quality
from pipeline.record.images import load_truth
from pipeline.selection.warmup import FILE as WARMUP_FILE

UNREADABLE = (DataError, OSError, ValueError, KeyError, pa.ArrowException)  # what a moved, damaged or older folder gives


@dataclass
class Run:
    """What a run folder holds, as far as it is there; `label` is unique among the runs of a report."""

    path: Path
    label: str
    number: int
    config: dict
    result: dict
    metrics: list[dict]  # training lines only, one for each logged step, in order
    evaluations: list[dict]  # lines of metrics.jsonl with "eval"
    log: pa.Table | None
    truth: pa.Table | None
    quality: dict | None  # of evaluation.selection_quality
    watched: dict = field(default_factory=dict)  # of an automatic warm-up: visits, spread of the scores at each
    notes: list[str] = field(default_factory=list)  # what could not be read, in sentences

    @property
    def selector(self) -> str:
        name = dig(self.config, "selector.name") or dig(self.result, "config.selector.name", "config.selector", "config.name")
        return name if isinstance(name, str) else "unknown"

    @property
    def objectives(self) -> dict[str, dict]:
        """Their settings by name, in the order of the run."""
        given = dig(self.config, "objectives")
        return {str(name): one for name, one in given.items() if isinstance(one, dict)} if isinstance(given, dict) else {}

    @property
    def warmup_visits(self) -> int | None:
        """None: an automatic warm-up that has not ended."""
        known = dig(self.quality or {}, "warmup_visits")
        if known is not None:
            return int(known)
        configured = dig(self.config, "selector.warmup_visits")
        return dig(self.watched, "visits") if configured == "auto" else int(configured or 0)

    @property
    def sources(self) -> list[str]:
        return [str(source["url"]) for source in dig(self.config, "data.sources") or [] if isinstance(source, dict) and "url" in source]


def load_run(path: Path, place: int) -> Run:
    """Reads what a run folder holds; what is missing or unreadable becomes a note. Raises ConfigError for no run folder."""
    if not any((path / name).is_file() for name in ("resolved.yaml", "metrics.jsonl", "result.json")):
        raise ConfigError(
            f"{path}: is no run folder, it holds neither resolved.yaml nor metrics.jsonl nor result.json; give the `out` of a run"
        )
    run = Run(path, path.resolve().name, place, {}, {}, [], [], None, None, None)
    run.config = read_part(run, "resolved.yaml", lambda text: read_yaml(text, str(path / "resolved.yaml")))
    run.result = read_part(run, "result.json", json.loads)
    if (path / WARMUP_FILE).is_file():
        run.watched = read_part(run, WARMUP_FILE, json.loads)
    lines = _lines(path / "metrics.jsonl")
    run.metrics = list({line["step"]: line for line in lines if "loss" in line}.values())
    run.metrics.sort(key=lambda line: line["step"])
    run.evaluations = [line for line in lines if isinstance(line.get("eval"), dict)]
    try:
        run.log = read_log(path / "selection")
    except UNREADABLE as error:
        run.notes.append(f"The selection log cannot be read: {error}.")
    try:
        run.truth = load_truth(run.sources) if run.log is not None else None
    except UNREADABLE as error:
        run.notes.append(f"The truth about its pairs cannot be read: {error}")
    told = run.result.get("selection")
    if isinstance(told, dict) and told.get("visits"):
        run.quality = told
    elif run.log is not None and run.log.num_rows:
        run.quality = selection_quality(run.log, run.truth, warmup_visits=run.warmup_visits)
    return run


def read_part(run: Run, name: str, parse: Callable[[str], Any]) -> dict:
    """One JSON or YAML file of the folder; an empty dict and a note where it is missing or broken."""
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


def label(runs: Sequence[Run]) -> None:
    """The selector's name where that tells the runs apart, else the folder's, else numbered."""
    for names in ([run.selector for run in runs], [run.path.resolve().name for run in runs]):
        if len(set(names)) == len(runs) and "unknown" not in names:
            break
    else:
        names = [f"{run.path.resolve().name} ({place + 1})" for place, run in enumerate(runs)]
    for run, name in zip(runs, names):
        run.label = name


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
