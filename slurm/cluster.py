"""What a cluster offers and what a job asks of it: configs/cluster/*.yaml."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import Strict

REQUEUES = 1_000_000  # of submitit's own countdown, which ends a job after three time limits; ours looks at progress instead


@contextmanager
def clean_environment(**more: str) -> Iterator[None]:
    """Without what a surrounding job set, so that a job can be launched from a job. submitit's own drops SLURM_CONF, which says where
    Slurm is."""
    from submitit.helpers import clean_env, environment_variables

    kept = {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}
    with clean_env(), environment_variables(**kept, **more):
        yield


class ClusterConfig(Strict):
    """The resources of one job; one task is one rank."""

    partition: str | None = Field(None, description="None: the cluster's default")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="features that a node must have, for example a100")
    exclude: str | None = Field(None, description="nodes to avoid")
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="ranks on each node; with GPUs one for each of them")
    cpus_per_task: int = Field(1, ge=1, description="the rank itself and its data.workers")
    gpus_per_node: int = Field(0, ge=0)
    mem_gb: float | None = Field(None, gt=0, description="memory of a node; None: the partition's default")
    minutes: int = Field(60, ge=1, description="time limit of one start; a job that reaches it saves and is queued again")
    signal_delay: int = Field(
        120, ge=1, description="seconds before the time limit at which the ranks are told; more than a step and two saves take, for one may be under way"
    )
    crashes: int = Field(
        3, ge=0, description="how often in a row a job whose process was killed is started again without having reached a later checkpoint"
    )
    setup: list[str] = Field(default_factory=list, description="shell lines before the ranks start: modules, environment variables")
    extra: dict[str, str | int | bool] = Field(default_factory=dict, description="further sbatch options by their long name")
    srun: list[str] = Field(default_factory=list, description="further arguments of srun")
    array_parallelism: int = Field(16, ge=1, description="points of a sweep that run at a time")
    peak_tflops: float | None = Field(None, gt=0, description="dense bf16 TFLOP/s of one device, for the forecast of --dry-run")

    @property
    def world(self) -> int:
        """Ranks of a job."""
        return self.nodes * self.tasks_per_node

    def slurm(self, name: str, submissions: Path, dependency: str | None = None) -> dict[str, Any]:
        """The parameters of submitit.SlurmExecutor. `submissions`: the folder of scripts and logs, beside it the code."""
        optional = {key: getattr(self, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
        optional |= {"dependency": dependency, "gpus_per_node": self.gpus_per_node or None}
        extra = {"mem": f"{int(self.mem_gb * 1024)}M"} if self.mem_gb else {}
        # sbatch's variables are those of the first start; `scontrol update job=N NumNodes=1 NumTasks=8` makes the next one smaller
        tasks = f"export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * {self.tasks_per_node})) && export SLURM_NPROCS=$SLURM_NTASKS"
        ended = shlex.join([sys.executable, "-P", "-m", "slurm.job", str(submissions)])
        return {key: value for key, value in optional.items() if value is not None} | {
            "job_name": name,
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "signal_delay_s": self.signal_delay,
            "stderr_to_stdout": True,
            "array_parallelism": self.array_parallelism,
            "wckey": None,
            "setup": [
                f"export PYTHONPATH={shlex.quote(str(submissions.parent / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}",
                tasks,
                *self.setup,
            ],
            "teardown": ["code=$?", f"{ended} $code", "exit $code"],
            # srun does not take over sbatch's CPUs since Slurm 22.05, and by itself leaves the other ranks waiting when one dies
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}", *self.srun],
            # a job whose dependency failed goes, instead of waiting for ever
            "additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True} | extra | self.extra,
        }

    def local(self) -> dict[str, Any]:
        """The parameters of submitit.LocalExecutor: all ranks on this machine."""
        return {
            "tasks_per_node": self.world,
            "gpus_per_node": self.gpus_per_node,
            "timeout_min": self.minutes,
            "signal_delay_s": self.signal_delay,
            "stderr_to_stdout": True,
        }
