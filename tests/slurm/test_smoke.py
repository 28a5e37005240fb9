"""The one test of a real Slurm that `make test` runs: two nodes, submitted, finished, and told about."""

import json
from pathlib import Path

from tests.runs import losses
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launch, run, settled


def test_two_nodes_train_and_the_status_tells(cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    job = launch("visits=6")
    folder = tmp_path / "run"
    assert settled(cluster, job) == "COMPLETED", next(folder.glob("launch/*_0_log.out")).read_text()
    told = json.loads(run("slurm.status", str(folder), "--json").stdout)
    steps = json.loads((folder / "facts.json").read_text())["steps"]
    assert (told["state"], told["restarts"], told["step"], told["saved"]) == ("complete", 0, steps, steps)
    assert json.loads((folder / "facts.json").read_text())["world_size"] == 2
    assert [line[0] for line in losses(folder)] == list(range(1, steps + 1))
