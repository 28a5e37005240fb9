"""python -m slurm.shards --cluster FILE --folder LOGS --tasks N -- SOURCE OUT [options of tools.make_shards]: shards made by a job array.

Task I makes every N-th shard; a last job, which starts when all of them are through, makes what is missing and writes the index. A task
that is preempted or dies is started again by Slurm, or by the same command, and goes on with the shards that are left.
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from submitit.helpers import DelayedSubmission

from pipeline.config import ConfigError, load
from pipeline.data.errors import DataError


class ShardJob:
    """`tools.make_shards` with these arguments; picklable. submitit's own handler fits here: one process, and nothing to save."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> None:
        """Returns when the shards are made, else exits by an error code."""
        from tools.make_shards import main

        if code := main(self.arguments):
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        """After a preemption or a time limit: what is finished stays, the rest is made by the next start."""
        return DelayedSubmission(self)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m slurm.shards", description="Makes shards by a job array.")
    top.add_argument("--cluster", required=True, help="the resources of one task; nodes and tasks_per_node count as 1")
    top.add_argument("--folder", type=Path, required=True, help="where scripts, logs and the code are kept; all nodes must see it")
    top.add_argument("--tasks", type=int, required=True, help="tasks of the array")
    top.add_argument(
        "shards", nargs="+", metavar="SOURCE OUT ...", help="after --, as for tools.make_shards; workers default to cpus_per_task"
    )
    return top


def launch(args: argparse.Namespace) -> list[str]:
    """Submits the array and the job that writes the index; gives their numbers. Raises ConfigError."""
    import submitit
    from submitit.core.utils import FailedJobError

    from slurm.cluster import REQUEUES, ClusterConfig, clean_environment
    from slurm.folder import snapshot
    from tools.make_shards import parser as options

    cluster = load(ClusterConfig, args.cluster).model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0})
    chosen = [
        *args.shards,
        *([] if any(word.startswith("--workers") for word in args.shards) else ["--workers", str(cluster.cpus_per_task)]),
    ]
    options().parse_args(chosen)
    if not shutil.which("sbatch"):
        raise ConfigError("there is no sbatch here; launch from a login node, or run tools.make_shards on this machine")
    folder = args.folder.absolute()
    submissions = folder / "launch"
    submissions.mkdir(parents=True, exist_ok=True)
    snapshot(folder / "code")
    numbers: list[str] = []
    with clean_environment():
        for tasks in ([[*chosen, "--part", f"{part}/{args.tasks}"] for part in range(args.tasks)], [chosen]):
            engine = submitit.SlurmExecutor(submissions, max_num_timeout=REQUEUES, python=f"{shlex.quote(sys.executable)} -P")
            # after all have ended, well or not: the last job makes what is missing, or says why it cannot be made
            engine.update_parameters(
                **cluster.slurm(folder.name, submissions, f"afterany:{numbers[0]}" if numbers else None) | {"teardown": None}
            )
            try:
                with engine.batch():
                    jobs = [engine.submit(ShardJob(task)) for task in tasks]
            except FailedJobError as error:
                raise ConfigError(f"sbatch refused the job: {str(error).strip()}") from None
            numbers.append(jobs[0].job_id.split("_")[0])
    (submissions / "shards.json").write_text(json.dumps({"array": numbers[0], "index": numbers[1], "arguments": chosen}), encoding="utf-8")
    return numbers


def main(arguments: list[str] | None = None) -> int:
    """Launches; what a user can mend is one message and exit code 2."""
    args = parser().parse_args(arguments)
    try:
        array, index = launch(args)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: array {array} of {args.tasks} tasks makes shards, job {index} writes the index after it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
