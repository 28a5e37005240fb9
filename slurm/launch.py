"""python -m slurm.launch CONFIG [a.b=c ...] --cluster configs/cluster/X.yaml [--then CONFIG2] [--sweep key=v1,v2] [--executor ...] [--dry-run]"""

import argparse
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, load, read_yaml
from pipeline.data.errors import DataError
from pipeline.data.storage import is_local, local_path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m slurm.launch",
        description="Checks a run, makes its folder complete, and submits it as one Slurm job; one task is one rank.",
    )
    top.add_argument("config", help="a YAML file, for example configs/pretrain/vitb16_cc12m_dissect.yaml")
    top.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in `python -m pipeline train`")
    top.add_argument("--cluster", required=True, help="what to ask of which cluster, for example configs/cluster/h100.yaml")
    top.add_argument(
        "--resource", action="append", default=[], metavar="key=value", help="override of the cluster file, for example nodes=4"
    )
    top.add_argument("--then", metavar="CONFIG2", help="a second run that starts when the first is complete; it is dropped when that fails")
    top.add_argument("--then-set", action="append", default=[], metavar="key.path=value", help="overrides of CONFIG2")
    top.add_argument(
        "--sweep", action="append", default=[], metavar="key=v1,v2", help="one run for each value, as a job array; several multiply"
    )
    top.add_argument(
        "--executor",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="local: the same ranks on this machine; debug: in this process",
    )
    top.add_argument("--dry-run", action="store_true", help="print what would be submitted, and what the run would need; write nothing")
    top.add_argument(
        "--samples", type=lambda text: int(text.replace("_", "")), help="for --dry-run: how many samples, where the index is not at hand"
    )
    return top


def points(overrides: list[str], sweep: list[str]) -> dict[str, list[str]]:
    """Name of a run inside the sweep's folder -> all its overrides; one run with an empty name where nothing is swept. Raises ConfigError."""
    axes = []
    for text in sweep:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise ConfigError(f"--sweep {text}: is written key.path=value1,value2,...")
        axes.append([(key, value) for value in read_yaml(f"[{values}]", f"--sweep {text}")])
    found: dict[str, list[str]] = {}
    for chosen in itertools.product(*axes):
        name = "+".join(f"{key}={_as_name(value)}" for key, value in chosen)
        if name in found:
            raise ConfigError(f"--sweep: {name} comes twice; give each value once")
        found[name] = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in chosen)]
    return found


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", value if isinstance(value, str) else json.dumps(value)).strip("-")


def read_runs(
    config: str, overrides: list[str], sweep: list[str], world: int, before: dict[Path, Any] | None = None
) -> tuple[Path, dict[Path, Any]]:
    """The folder of a run or sweep, and run folder -> validated configuration; `before`: the same of the first stage. Raises ConfigError."""
    from pipeline.run import RunConfig
    from slurm.plan import check

    runs, top = {}, Path()
    for name, chosen in points(overrides, sweep).items():
        found = load(RunConfig, config, chosen)
        if not is_local(found.out):
            raise ConfigError(f"{config}: out: {found.out}: a job's folder has to lie on a file system that all nodes see")
        top = Path(local_path(found.out)).absolute()
        found = found.model_copy(update={"out": str(top / name)})
        check(found, world, before)
        runs[top / name] = found
    return top, runs


def refuse_queued(run: Path) -> None:
    """Raises ConfigError when a job of this folder is still in the queue."""
    from slurm.notes import read_launch
    from slurm.queue import look

    job = read_launch(run).get("job")
    found = (look([job]) or {}).get(job) if job else None
    if found and found.waits_or_runs:
        raise ConfigError(f"{run}: its job {job} is {found.state}. Wait for it, or end it with `scancel {job}`, then launch again")


def submit(top: Path, runs: dict[Path, Any], cluster: Any, executor: str, after: str | None, then: Path | None = None) -> list[Any]:
    """Makes the folders complete and submits one job or array. Gives submitit's jobs, in the order of `runs`."""
    import submitit

    from slurm.cluster import REQUEUES, clean_environment
    from slurm.folder import check_free, prepare
    from slurm.job import TrainJob
    from slurm.notes import read_launch, write_launch

    for run, config in runs.items():
        check_free(config)
        if executor == "slurm":
            refuse_queued(run)
    facts = {
        "executor": executor,
        "cluster": cluster.model_dump(),
        "world": cluster.world,
        "job": None,
        "after": after,
        "then": str(then) if then else None,
    }
    submissions = prepare(top, runs, cluster.crashes, facts)
    tasks = [TrainJob(run) for run in runs]
    if executor == "debug":
        engine = submitit.DebugExecutor(submissions)
        return [engine.submit(task) for task in tasks]
    kinds = {"slurm": submitit.SlurmExecutor, "local": submitit.LocalExecutor}
    engine = kinds[executor](submissions, max_num_timeout=REQUEUES, python=f"{shlex.quote(sys.executable)} -P")
    dependency = f"afterok:{after}" if after else None
    engine.update_parameters(**(cluster.slurm(top.name, submissions, dependency) if executor == "slurm" else cluster.local()))
    code = {"PYTHONPATH": os.pathsep.join(filter(None, [str(top / "code"), os.environ.get("PYTHONPATH")]))}  # on Slurm the script says it
    # Ctrl-C is for the ranks, which save; submitit's local controller would pass it on a second time and kill them a second later
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with clean_environment(**code if executor == "local" else {}), engine.batch():  # one job, or an array where there are several
            jobs = [engine.submit(task) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, interrupt)
    for run, job in zip(runs, jobs):
        write_launch(run, read_launch(run) | {"job": job.job_id})
    return jobs


def wait(job: Any, run: Path, executor: str) -> bool:
    """Runs a debug job, or waits for a local one; whether it trained to its end."""
    if executor == "debug":
        try:
            job.results()
            return True
        except SystemExit as stop:
            return stop.code == 0
    while not job.done():
        try:
            time.sleep(0.2)
        except KeyboardInterrupt:
            print(f"{run}: the ranks were asked to save and stop", file=sys.stderr, flush=True)
    if all(job.task(rank).paths.result_pickle.exists() for rank in range(job.num_tasks)):
        return True
    print(f"{run}: did not come to its end; its log: {job.task(0).paths.stdout}", file=sys.stderr)
    return False


def launch(args: argparse.Namespace) -> int:
    """Validates everything, then submits; 0 when that worked."""
    from submitit.core.utils import FailedJobError

    from slurm.cluster import ClusterConfig
    from slurm.plan import describe

    cluster = load(ClusterConfig, args.cluster, args.resource)
    if args.sweep and (args.then or args.executor != "slurm"):
        raise ConfigError(
            "--sweep is one job array on Slurm; it goes neither with --then nor with another --executor. Launch each of its points by itself: "
            "the second stage needs the folder of its own first one"
        )
    world = 1 if args.executor == "debug" else cluster.world
    top, runs = read_runs(args.config, args.overrides, args.sweep, world)
    stages = [(top, runs)]
    if args.then:
        stages.append(read_runs(args.then, args.then_set, [], world, runs))
        if stages[1][0] == top:
            raise ConfigError(f"--then {args.then}: both runs would train in {top}; give the second another folder with --then-set out=...")
    if args.dry_run:
        for number, (folder, found) in enumerate(stages):
            describe(folder, found, cluster, args.samples, "afterok:<the first job>" if number else None)
        return 0
    if args.executor == "slurm" and not shutil.which("sbatch"):
        raise ConfigError(
            "there is no sbatch here; launch from a login node of the cluster, or train on this machine with --executor local"
        )
    after = None
    for number, (folder, found) in enumerate(stages):
        following = stages[1][0] if args.then and not number else None
        try:
            jobs = submit(folder, found, cluster, args.executor, after, following)
        except FailedJobError as error:
            raise ConfigError(f"sbatch refused the job: {str(error).strip()}") from None
        for run, job in zip(found, jobs):
            print(f"{run}: job {job.job_id}" + (f", after job {after} is complete" if after else ""), flush=True)
        if args.executor == "slurm":
            after = jobs[0].job_id
        elif not wait(jobs[0], folder, args.executor):
            return 1
    if args.executor == "slurm":
        print(f"python -m slurm.status {' '.join(str(run) for _, found in stages for run in found)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Launches; what a user can mend is one message and exit code 2."""
    args = parser().parse_intermixed_args(arguments)
    try:
        return launch(args)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("pipeline", "slurm"):
            raise
        print(f"error: {error}. Install the extras: pip install 'dissect-pipeline[train,slurm]'", file=sys.stderr)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}. Make room, then launch again", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
