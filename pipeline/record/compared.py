"""A comparison of methods over paired seeds (tools.compare): mean and spread, and in how many seeds each beats the first."""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import ConfigError


class Cell(NamedTuple):
    """One figure of one method, in percent."""

    text: str  # mean and standard deviation over seeds
    wins: str  # "3/3": seeds in which it is above the first method; empty for the first
    best: bool  # the highest mean of the column


class Table(NamedTuple):
    """Rows are methods."""

    about: str
    seeds: list[int]
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def read(folder: Path) -> Table:
    """The table of FOLDER/compare.json. Raises ConfigError."""
    file = folder / "compare.json"
    try:
        return table(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{file}: is no comparison ({error!r}); tools.compare writes it") from None


def table(found: dict[str, Any]) -> Table:
    """Mean and spread of every figure, and wins against the first method seed by seed."""
    methods: dict[str, dict[str, list[float]]] = found["methods"]
    first = next(iter(methods.values()))
    means = {column: {name: statistics.mean(told[column]) for name, told in methods.items()} for column in first}
    rows = []
    for name, told in methods.items():
        cells = []
        for column, base in first.items():
            values = told[column]
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            wins = "" if told is first else f"{sum(a > b for a, b in zip(values, base))}/{len(values)}"
            cells.append(Cell(f"{100 * means[column][name]:.1f}{spread}", wins, means[column][name] == max(means[column].values())))
        rows.append((name, cells))
    return Table(str(found.get("about", "")), list(found["seeds"]), list(first), rows)


def plain_text(found: dict[str, Any]) -> str:
    """The table for a terminal."""
    shown = table(found)
    name_width = max(len(name) for name, _ in shown.rows) + 2
    lines = [" " * name_width + "".join(f"{column:>20}" for column in shown.columns)]
    for name, cells in shown.rows:
        lines.append(name.ljust(name_width) + "".join(f"{cell.text + (f'  {cell.wins}' if cell.wins else ''):>20}" for cell in cells))
    first = shown.rows[0][0]
    return "\n".join([*lines, f"percent, mean ± standard deviation over {len(shown.seeds)} seeds; n/m: seeds above {first}"])
