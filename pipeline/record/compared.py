"""Methods over paired seeds: what a difference seed by seed says, and the table of tools.compare."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import ConfigError


class Paired(NamedTuple):
    """One way beside another, seed by seed: initial weights, noise and order are the same in both."""

    differences: list[float]
    mean: float  # NaN without a seed
    error: float  # standard error of the mean; NaN for one seed
    wins: int  # seeds in which it is ahead

    @property
    def verdict(self) -> str:
        """loses, ties or wins; empty for a single seed. A difference lost or won is one outside of the 95 % interval of Student's t: with
        three seeds 4.3 standard errors, with ten 2.3."""
        from scipy.stats import t as student

        if len(self.differences) < 2:
            return ""
        bound = self.error * student.ppf(0.975, len(self.differences) - 1)
        return "loses" if self.mean < -bound else "wins" if self.mean > bound else "ties"


def paired(differences: Iterable[float], margin: float = 0.0) -> Paired:
    """What the differences of two ways say, one for each seed; ahead is what is so by more than `margin`."""
    each = list(differences)
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Paired(each, statistics.mean(each) if each else math.nan, error, sum(difference > margin for difference in each))


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
            wins = "" if told is first else f"{paired(a - b for a, b in zip(values, base)).wins}/{len(values)}"
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
