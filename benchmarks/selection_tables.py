"""The grid of benchmarks/selection.py as text and as plots.

python -m benchmarks.selection_tables benchmarks/results/selection_{small,openclipart,iconify}_*.json   (one table of all their sets, as docs/evidence.md opens with)
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.record.compared import paired

COLUMNS = ("top1", "t2i_r1", "t2i_r10", "precision", "auc", "never_clean", "trained", "cost", "cpu_seconds", "loading_seconds")
DIGITS = {"auc": 3, "trained": 0, "cost": 0, "cpu_seconds": 0, "loading_seconds": 0}


def groups(cells: Iterable[dict[str, Any]]) -> dict[tuple[str, float, str], dict[int, dict[str, Any]]]:
    """(set, rate, selector) -> seed -> cell. A row that trains everything belongs to every rate of its set."""
    cells = list(cells)
    rates = {name: sorted({c["rate"] for c in cells if c["set"] == name}) for name in {c["set"] for c in cells}}
    seen = defaultdict(set)
    for cell in cells:
        seen[cell["set"], cell["selector"]].add(cell["rate"])
    found: dict[tuple[str, float, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for cell in cells:
        everywhere = len(seen[cell["set"], cell["selector"]]) == 1
        for rate in rates[cell["set"]] if everywhere else [cell["rate"]]:
            found[cell["set"], rate, cell["selector"]][cell["seed"]] = cell
    return dict(sorted(found.items()))


def mean_spread(values: Iterable[float | None]) -> tuple[float, float, int]:
    """Mean, standard deviation over seeds (NaN for one), how many; None is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return math.nan, math.nan, 0
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known)


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of our rows against every other of its set and rate by the grid's metric, the worst first: loses, ties, wins; nothing for a
    single seed."""
    found, ours, metric = groups(result["cells"]), set(result["grid"]["ours"]), result["grid"]["metric"]
    told = []
    for (name, rate, selector), mine in found.items():
        if selector not in ours:
            continue
        others = {other: cells for (n, r, other), cells in found.items() if (n, r) == (name, rate) and other not in ours}
        for other, theirs in others.items():
            both = [(mine[seed][metric], theirs[seed][metric]) for seed in sorted(mine.keys() & theirs.keys())]
            one = paired(a - b for a, b in both if a is not None and b is not None)
            if one.differences:
                values = {"set": name, "rate": rate, "ours": selector, "other": other, "difference": one.mean, "error": one.error}
                told.append(values | {"wins": one.wins, "of": len(one.differences), "verdict": one.verdict})
    order = {"loses": 0, "ties": 1, "": 2, "wins": 3}
    return sorted(told, key=lambda row: (order[row["verdict"]], row["difference"]))


def text(result: dict[str, Any]) -> str:
    """Markdown: what ours loses, ties and wins, then one table for each set and rate, the best by the grid's metric first."""
    metric = result["grid"]["metric"]
    lines = [f"Ours against the others, paired by seed, {metric} in points; losses and ties first", ""]
    lines += ["| set | rate | ours | other | difference | seeds ahead | |", "|---|---|---|---|---|---|---|"]
    for row in verdicts(result):
        lines.append(
            f"| {row['set']} | {row['rate']:g} | {row['ours']} | {row['other']} | {row['difference']:+.2f} ± {row['error']:.2f} "
            f"| {row['wins']} of {row['of']} | {row['verdict']} |"
        )
    found = groups(result["cells"])
    for name, rate in dict.fromkeys((name, rate) for name, rate, _ in found):
        rows = {selector: cells for (n, r, selector), cells in found.items() if (n, r) == (name, rate)}
        lines += ["", f"{name}, rate {rate:g}: mean ± standard deviation over seeds", ""]
        lines += ["| selector | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        for selector, seeds in sorted(rows.items(), key=lambda item: -mean_spread(c[metric] for c in item[1].values())[0]):
            lines.append(f"| {selector} | {len(seeds)} | " + " | ".join(_cell(seeds, key) for key in COLUMNS) + " |")
    return "\n".join(lines)


def overview(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each set and rate of all results, a column for each selector, the best in bold; where ours loses most first."""
    columns = list(dict.fromkeys(cell["selector"] for result in results for cell in result["cells"]))
    rows = []
    for result in results:
        found, metric, told = groups(result["cells"]), result["grid"]["metric"], verdicts(result)
        for name, rate in dict.fromkeys(key[:2] for key in found):
            means = {s: mean_spread(c[metric] for c in cells.values())[0] for (n, r, s), cells in found.items() if (n, r) == (name, rate)}
            values = {s: _cell(found[name, rate, s], metric) for s in means}
            values[max(means, key=means.__getitem__)] = f"**{values[max(means, key=means.__getitem__)]}**"
            here = [row for row in told if (row["set"], row["rate"]) == (name, rate)]
            which = [[row["other"] for row in here if row["verdict"] == verdict] for verdict in ("loses", "ties")]
            row = [name, f"{rate:g}", metric, *(values.get(s, "") for s in columns), *(", ".join(others) or "none" for others in which)]
            rows.append((-len(which[0]), -len(which[1]), name, "| " + " | ".join(row) + " |"))
    head = ["set", "rate", "metric %", *columns, "ours loses to", "ties with"]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(line for *_, line in sorted(rows))])


def _cell(seeds: dict[int, dict], key: str) -> str:
    mean, spread, count = mean_spread(cell.get(key) for cell in seeds.values())
    digits = DIGITS.get(key, 1)
    return "" if not count else f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if count > 1 and spread >= 0.5 * 10**-digits else "")


def plots(result: dict[str, Any], folder: Path) -> None:
    """selection_<set>.svg: accuracy against trained samples, cost and CPU seconds, with the standard error; and precision, AUC, coverage."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "selection"  # the same bytes from the same figures
    folder.mkdir(parents=True, exist_ok=True)
    found, metric = groups(result["cells"]), result["grid"]["metric"]
    panels = {
        "trained": "pairs trained",
        "cost": "thousand forwards (scored + 3 x trained)",
        "cpu_seconds": "CPU seconds of training",
        "precision": "clean share of kept pairs %",
        "never_clean": "clean pairs never selected %",
    }
    for name in dict.fromkeys(name for name, _, _ in found):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), sharey=True, layout="constrained")
        for number, ((_, rate, selector), seeds) in enumerate((key, cells) for key, cells in found.items() if key[0] == name):
            for axis, x in zip(axes, panels):
                _point(axis, seeds, x, metric, f"{selector} {rate:g}", number)
        axes[0].set_ylabel(f"{metric} %")
        for axis, label in zip(axes, panels.values()):
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
        figure.suptitle(name)
        figure.savefig(folder / f"selection_{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _point(axis: Any, seeds: dict[int, dict], x: str, y: str, label: str, number: int) -> None:
    (across, _, known), (up, spread, count) = (mean_spread(cell[key] for cell in seeds.values()) for key in (x, y))
    if known and count:
        marker: Callable[[int], str] = "osD^vP*X<>hp".__getitem__
        error = spread / math.sqrt(count) if count > 1 else None
        axis.errorbar(across, up, yerr=error, fmt=marker(number % 12), markersize=6, capsize=2, label=label)


if __name__ == "__main__":
    print(overview([json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]))
