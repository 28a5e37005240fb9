"""Does selection help? A grid of real training runs: set x selector x rate x seed, every selector after the same warm-up.

    python -m benchmarks.selection benchmarks/grids/icons_small.yaml --json FILE [--figures DIR] [--jobs N]
    python -m benchmarks.selection GRID.yaml --json FILE --executor slurm --cluster configs/cluster/cpu.yaml
    python -m benchmarks.selection benchmarks/grids/icons_small.yaml seeds=[0] rates=[0.5]             (a part of it, tables only)

What a grid file may say is in class Grid; several results become one table with python -m benchmarks.selection_tables FILE...
A finished cell is kept: started again, the grid goes on, and a grid that has grown runs what is new. After the cells come the matched
ones: a selector without a scoring pass, given as many more visits as fit into the CPU seconds of another one in this very grid.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from benchmarks.common import machine, save
from benchmarks.selection_tables import plots, text
from pipeline.config import ConfigError, Strict, digest, dump, load, read_yaml
from pipeline.data.errors import DataError

PRELOADED = ["pipeline.__main__", "pipeline.run", "pipeline.evaluation.evaluate", "pipeline.objectives.clip", "accelerate.checkpointing"]


MATCHED = "+time"  # ends the name of a row that is given as much time as another one


class Grid(Strict):
    """What is compared. Every list of overrides is as on the command line of `python -m pipeline train`."""

    config: str = Field(description="the base configuration")
    out: str = Field(description="folder of the runs")
    overrides: list[str] = Field(default_factory=list)
    memory: bool = Field(False, description="runs of benchmarks/selection_memory.py instead of `python -m pipeline train`")
    sets: dict[str, list[str]] = Field(min_length=1, description="name of a data set: its overrides")
    selectors: dict[str, list[str]] = Field(min_length=1, description="name of a row: its overrides, at least selector.name=...")
    ours: list[str] = Field(default_factory=list, description="rows that are this project's own: the table tells their losses first")
    rates: list[float] = Field([0.5], min_length=1)
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    matched: dict[str, str] = Field(default_factory=dict, description="row: the row whose CPU seconds it is given, by visits")
    whole: list[str] = Field(default_factory=list, description="rows that train everything: one rate is enough")
    metric: Literal["top1", "t2i_r1", "t2i_r10"] = Field(
        "top1", description="what rows are compared by; retrieval where most names have one image"
    )


class Cell(NamedTuple):
    """One run. Travels to workers and jobs as JSON."""

    set: str
    selector: str
    rate: float
    seed: int
    config: str
    folder: str
    overrides: list[str]
    memory: bool = False

    @property
    def digest(self) -> str:
        """Of what the configuration says and the overrides; of a matched cell without the visits that measured seconds gave it."""
        path, overrides = Path(self.config), list(self.overrides)
        if self.selector.endswith(MATCHED):
            overrides.pop(max(place for place, one in enumerate(overrides) if one.startswith("visits=")))
        return digest([read_yaml(path.read_text(encoding="utf-8"), self.config) if path.is_file() else self.config, overrides])


def cells(grid: Grid) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted grid has whole seeds."""
    found = []
    for seed in grid.seeds:
        for name, data in grid.sets.items():
            for selector, chosen in grid.selectors.items():
                for rate in grid.rates[:1] if selector in grid.whole else grid.rates:
                    found.append(_cell(grid, name, selector, rate, seed, [*grid.overrides, *data, *chosen]))
    return found


def _cell(grid: Grid, name: str, selector: str, rate: float, seed: int, overrides: list[str]) -> Cell:
    folder = Path(grid.out) / name / f"{selector}-rate{rate:g}-seed{seed}"
    return Cell(name, selector, rate, seed, grid.config, str(folder), [*overrides, f"selector.rate={rate}", f"seed={seed}"], grid.memory)


def matched(grid: Grid, done: list[dict[str, Any]], visits: float) -> list[Cell]:
    """The rows of `grid.matched` again, their visits stretched by the median over seeds of the ratio of CPU seconds, with those of loading
    where all cells tell them: one measurement a run of the same work, so its median over the set stands for all."""
    found, told = [], all(c.get("loading_seconds") is not None for c in done)
    for row, like in grid.matched.items():
        for name, data in grid.sets.items():
            loading = statistics.median(c["loading_seconds"] for c in done if c["set"] == name) if told else 0
            for rate in grid.rates:
                here = {
                    (c["selector"], c["seed"]): c["cpu_seconds"] + loading
                    for c in done
                    if c["set"] == name and c["rate"] in (rate, grid.rates[0])
                }
                ratios = [here[like, seed] / here[row, seed] for seed in grid.seeds if (like, seed) in here and (row, seed) in here]
                if ratios:
                    more = [*grid.overrides, *data, *grid.selectors[row], f"visits={round(visits * statistics.median(ratios), 1)}"]
                    found += [_cell(grid, name, f"{row}{MATCHED}", rate, seed, more) for seed in grid.seeds]
    return found


def finished(cell: Cell) -> dict[str, Any] | None:
    """What a cell gave, if it was run with these settings; a matched cell keeps the visits of its first time."""
    path = Path(cell.folder) / "cell.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found["digest"] == cell.digest else None


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains and evaluates in this process; writes cell.json last, which means "done". Raises RuntimeError with the end of the log."""
    cell, folder = Cell(*cell), Path(cell[5])
    if (known := finished(cell)) is not None:
        return known
    result, spent = in_memory(cell, folder) if cell.memory else on_disk(cell, folder)
    values = cell._asdict() | {"digest": cell.digest, "cpu_seconds": spent} | figures(result)
    partial = folder / "cell.part"
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    partial.replace(folder / "cell.json")
    return values


def in_memory(cell: Cell, folder: Path) -> tuple[dict[str, Any], float]:
    """(result, CPU seconds) of a run whose samples are decoded once."""
    from benchmarks.selection_memory import run
    from pipeline.run import RunConfig

    return run(load(RunConfig, cell.config, [f"out={folder}", *cell.overrides]))


def on_disk(cell: Cell, folder: Path) -> tuple[dict[str, Any], float]:
    """(result, CPU seconds) of `python -m pipeline train` and `evaluate`. Raises RuntimeError with the end of the log."""
    from pipeline.__main__ import main

    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("w", encoding="utf-8")
    before, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), log, log
    try:
        began = time.process_time()
        code = main(["train", cell.config, f"out={folder}", *cell.overrides])
        spent = time.process_time() - began
        code = code or main(["evaluate", str(folder), "--quiet"])
    finally:
        sys.stdout, sys.stderr = before
        log.close()
    if code:
        raise RuntimeError(f"{folder}: ended with {code}:\n{(folder / 'log.txt').read_text(encoding='utf-8')[-2000:]}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), spent


def figures(result: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that are compared, shares in percent; `cost` in forwards of a thousand samples, a trained one costing three."""
    selection, samples = result.get("selection") or {}, result["samples"]

    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    never = selection.get("never_selected") or {}
    return {
        "top1": percent(result["zero_shot"]["top1"]) if "zero_shot" in result else None,
        "t2i_r1": percent(result["retrieval"]["text_to_image"]["r1"]),
        "t2i_r10": percent(result["retrieval"]["text_to_image"]["r10"]),
        "i2t_r1": percent(result["retrieval"]["image_to_text"]["r1"]),
        "precision": percent(selection.get("precision")),
        "precision_last": percent(selection.get("precision_last")),
        "auc": selection.get("auc"),
        "never": percent(never.get("all")),
        "never_clean": percent(never.get("clean")),
        "trained": samples["trained"],
        "loading_seconds": result.get("loading_seconds"),  # of memory: true, whose cpu_seconds leave them out
        "cost": (samples["scored"] + 3 * samples["trained"]) / 1000,
    }


def in_processes(left: list[Cell], jobs: int) -> Iterable[dict[str, Any]]:
    """Each cell in a fresh process, forked from one that has imported everything: a start costs a tenth of a second, not five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(run_cell, tuple(cell)) for cell in left]):
            yield future.result()


def in_slurm(left: list[Cell], folder: Path, cluster: str) -> Iterable[dict[str, Any]]:
    """The same function as one job array; waits for it. A cell that a time limit cut off goes on from its checkpoint when started again."""
    from slurm.array import run_array

    yield from run_array(run_cell, [tuple(cell) for cell in left], folder, cluster)


def go(todo: list[Cell], args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Runs what is not finished, prints each as it ends, gives all."""
    left = [cell for cell in todo if finished(cell) is None]
    print(f"{len(todo)} cells, {len(todo) - len(left)} finished before", flush=True)
    runs = in_slurm(left, folder / "submissions", args.cluster) if args.executor == "slurm" else in_processes(left, args.jobs)
    for number, values in enumerate(runs if left else [], 1):
        told = ", ".join(f"{key} {values[key]:.1f}" for key in ("top1", "t2i_r1", "precision", "cpu_seconds") if values[key] is not None)
        print(
            f"[{number}/{len(left)}] {values['set']} {values['selector']} rate {values['rate']} seed {values['seed']}: {told}", flush=True
        )
    return [found for cell in todo if (found := finished(cell)) is not None]


def run(grid: Grid, args: argparse.Namespace) -> dict[str, Any]:
    """The whole grid and its summary."""
    from pipeline.run import RunConfig

    base = load(RunConfig, grid.config, grid.overrides)
    for cell in (every := cells(grid)):
        load(RunConfig, cell.config, cell.overrides)  # a mistake is found before the first hour
    done = go(every, args, Path(grid.out))
    if grid.matched:
        if base.visits is None:
            raise ConfigError(f"{grid.config}: matched rows are given more visits; give the length of the run in visits, not in steps")
        done += go(matched(grid, done, base.visits), args, Path(grid.out))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"grid": dump(grid), "cells": done, "commit": commit, "machine": machine(["accelerate"])}


def main(arguments: list[str] | None = None) -> int:
    """Runs the grid, prints the tables, writes what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", help="a YAML file, for example benchmarks/grids/icons_small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the grid, for example seeds=[0]")
    parser.add_argument("--json", type=Path, help="write every cell and the grid there")
    parser.add_argument("--figures", type=Path, help="folder for the plots")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="cells at a time in processes here (default %(default)s)"
    )
    parser.add_argument(
        "--executor", choices=("processes", "slurm"), default="processes", help="where cells run (default %(default)s); slurm: a job array"
    )
    parser.add_argument(
        "--cluster", default="configs/cluster/cpu.yaml", help="for --executor slurm, what one cell asks for (default %(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        grid = load(Grid, args.grid, args.overrides)
        result = run(grid, args)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(result))
    save(args.json, result)
    if args.figures:
        plots(result, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
