"""The one test of a real Slurm that `make test` runs: two nodes, submitted, finished, and told about."""

import json
import subprocess
from pathlib import Path

from tests.runs import ROOT, losses
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launch, run, settled


def head() -> str | None:
    """The commit of this checkout; None where it is a plain copy."""
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def test_two_nodes_train_and_the_status_tells(cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    job = launch("visits=6")
    folder = tmp_path / "run"
    assert settled(cluster, job) == "COMPLETED", next(folder.glob("launch/*_0_log.out")).read_text()
    told = json.loads(run("slurm.status", str(folder), "--json").stdout)
    facts, launched = (json.loads((folder / name).read_text()) for name in ("facts.json", "launch.json"))
    steps = facts["steps"]
    assert (told["state"], told["restarts"], told["step"], told["saved"]) == ("complete", 0, steps, steps)
    assert facts["world_size"] == 2
    assert facts["commit"] == launched["commit"] == head(), "the code that ran is a copy without .git"
    assert [line[0] for line in losses(folder)] == list(range(1, steps + 1))
