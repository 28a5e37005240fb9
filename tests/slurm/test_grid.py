"""A grid of selection cells on Slurm gives what it gives in processes here, and a finished one asks for no job."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import DEBUG
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import FILE, run

pytestmark = pytest.mark.slurm
ROWS = {"dissect": ["selector={name: dissect, warmup_visits: 1}"], "random": ["selector={name: random, warmup_visits: 1}"]}
SECONDS = ("cpu_seconds", "loading_seconds")


def grid(data: Path, out: Path) -> Path:
    """Writes a grid of two cells, 12 steps each."""
    overrides = [f"data.sources=[{{url: {data}}}]", f"evaluation.data={data}", "evaluation.probe=false", "engine.threads=1", "visits=4"]
    values = {"config": str(DEBUG), "out": str(out), "memory": True, "overrides": overrides}
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(values | {"sets": {"icons": []}, "selectors": ROWS, "rates": [0.5], "seeds": [0]}), encoding="utf-8")
    return path


def figures(told: Path) -> list[dict[str, Any]]:
    """What a grid's cells gave, apart from seconds and places."""
    found = json.loads(told.read_text(encoding="utf-8"))["cells"]
    return [{key: value for key, value in cell.items() if key not in (*SECONDS, "folder")} for cell in found]


def test_a_grid_on_slurm_equals_the_same_in_processes_and_runs_once(cluster: Cluster, icons_small: Path, tmp_path: Path) -> None:
    here, there, again = (tmp_path / name for name in ("here.json", "there.json", "again.json"))
    done = run("benchmarks.selection", str(grid(icons_small, tmp_path / "processes")), "--json", str(here), "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    on_slurm = [str(grid(icons_small, tmp_path / "slurm")), "--executor", "slurm", "--cluster", str(FILE)]
    try:
        done = run("benchmarks.selection", *on_slurm, "--json", str(there))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 cells, 0 finished before" in done.stdout and "[2/2] icons" in done.stdout
        assert figures(there) == figures(here) and all(cell["precision"] and cell["trained"] for cell in figures(there))
        submitted = sorted((tmp_path / "slurm" / "submissions").iterdir())
        done = run("benchmarks.selection", *on_slurm, "--json", str(again))
        assert done.returncode == 0 and "2 cells, 2 finished before" in done.stdout, done.stdout + done.stderr
        assert figures(again) == figures(here) and sorted((tmp_path / "slurm" / "submissions").iterdir()) == submitted
    finally:
        cluster.clear()
