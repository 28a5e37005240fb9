"""One function over many items as a job array: what a benchmark needs of Slurm, with the cluster files of training runs."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, load
from slurm.cluster import ClusterConfig, clean_environment

POLL_S = 5.0


def parameters(cluster: ClusterConfig, folder: Path) -> dict[str, Any]:
    """Those of submitit.SlurmExecutor for the array in `folder`: a training job's, but for its own copy of the code and its word at the end."""
    root = Path(__file__).resolve().parents[1]
    setup = [f"cd {root}", f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}", *cluster.setup]
    return cluster.slurm(folder.parent.name, folder) | {"setup": setup, "teardown": None}


def one_rank(cluster: ClusterConfig) -> ClusterConfig:
    """Of what a cluster file asks for a node of training, the share of one of its ranks."""
    ranks = cluster.tasks_per_node
    share = {"gpus_per_node": -(-cluster.gpus_per_node // ranks), "mem_gb": cluster.mem_gb and cluster.mem_gb / ranks}
    return cluster.model_copy(update={"nodes": 1, "tasks_per_node": 1} | share)


def run_array(function: Callable[[Any], Any], items: Sequence[Any], folder: Path, cluster: str, executor: str = "slurm") -> Iterator[Any]:
    """Yields `function(item)` of each item as its job ends. Waits; one task a job, with a rank's share of what the cluster file asks for training.

    `function` is pickled, so it lives in a module that the nodes can import: the checkout has to be on a file system they share.
    `executor` local runs the jobs on this machine. Raises ConfigError where a job failed, after all others have ended.
    """
    import submitit

    asked = one_rank(load(ClusterConfig, cluster))
    if executor == "slurm":
        engine = submitit.SlurmExecutor(folder)
        engine.update_parameters(**parameters(asked, folder))
    else:
        engine = submitit.LocalExecutor(folder)
        engine.update_parameters(timeout_min=asked.minutes, stderr_to_stdout=True)
    with clean_environment(), engine.batch():
        jobs = [engine.submit(function, item) for item in items]
    waiting, failed = list(jobs), []
    while waiting:
        for job in [job for job in waiting if job.done()]:
            waiting.remove(job)
            if (trouble := job.exception()) is None:
                yield job.result()
            else:
                failed.append(f"job {job.job_id}: {str(trouble).strip().splitlines()[-1]} (its log: {job.paths.stdout})")
        if waiting:
            time.sleep(POLL_S)
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} jobs failed; start the same command again for these alone. " + "; ".join(failed[:3])
        )
