"""Methods side by side over paired seeds: python -m tools.compare PLAN --out FOLDER [--seeds 3] [--jobs 2].

PLAN is a YAML with `base` (a run's configuration without `out` and `seed`) and `methods`: by name what each changes in it. The first
method is the one that the others are compared with; a method may use an earlier one's run by `{NAME}`, its folder for the same seed.
Every run is an ordinary one (`python -m pipeline train`), in FOLDER/NAME-SEED, resumed or skipped where it is there; FOLDER/compare.json
holds the figures of all, which `python -m pipeline report --compare FOLDER` shows.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, parse, read_yaml
from pipeline.data.errors import DataError
from pipeline.data.storage import is_local, local_path
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.evaluation.student import classifies
from pipeline.run import RunConfig
from pipeline.task import MAIN

FILE = "compare.json"


def read_plan(path: Path) -> dict[str, Any]:
    """The plan's mapping. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such plan")
    plan = read_yaml(path.read_text(encoding="utf-8"), str(path))
    wrong = not isinstance(plan, dict) or set(plan) - {"about", "base", "methods"} or not isinstance(plan.get("base"), dict)
    if wrong or not isinstance(plan.get("methods"), dict) or not all(isinstance(m, dict) for m in plan["methods"].values()):
        raise ConfigError(f"{path}: expected about (a sentence), base (a mapping) and methods (a mapping of mappings), nothing else")
    return plan


def merged(base: Any, change: Any) -> Any:
    """`base` with the keys of `change` put in, mapping by mapping; what is no mapping is replaced."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    return base | {key: merged(base.get(key), value) for key, value in change.items()}


def configs(plan: dict[str, Any], out: Path, seed: int, where: str = "the plan") -> dict[str, RunConfig]:
    """By method, the configuration of one seed. Raises ConfigError."""
    folders = {name: str(out / f"{re.sub('[^a-z0-9]+', '_', name.lower())}-{seed}") for name in plan["methods"]}

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list):
            return [named(item) for item in value]
        return folders.get(value[1:-1], value) if isinstance(value, str) and value[:1] + value[-1:] == "{}" else value

    found = {}
    for name, change in plan["methods"].items():
        values = named(merged(plan["base"], change)) | {"out": folders[name], "seed": seed}
        found[name] = _measured(parse(RunConfig, values, f"{where}: methods.{name}"), f"{where}: methods.{name}")
    return found


def _measured(config: RunConfig, where: str) -> RunConfig:
    """The same configuration. Raises ConfigError where no figure could be told of the run when it is trained."""
    if config.evaluation.data is None:
        raise ConfigError(f"{where}: evaluation.data: methods are compared on held-out shards; name them")
    if config.data.classes is None or MAIN not in config.towers or not classifies(config.towers):
        raise ConfigError(f"{where}: methods are compared by accuracy; name data.classes, and give towers.{MAIN} as many classes")
    return config


def folder_of(out: str) -> Path:
    """The folder of all runs. Raises ConfigError for one in an object store."""
    if not is_local(out):
        raise ConfigError(f"--out {out}: the runs of a comparison lie in a folder; give a local one")
    return Path(local_path(out))


def run_seed(plan: dict[str, Any], out: Path, seed: int) -> None:
    """Trains and evaluates what is missing of one seed, in the plan's order. Raises ConfigError, DataError, CheckpointError."""
    from pipeline.distributed.launch import shutdown
    from pipeline.evaluation.evaluate import write_result
    from pipeline.evaluation.student import measure_student
    from pipeline.run import TrainedRun, build

    try:
        for name, config in configs(plan, out, seed).items():
            trainer, home = build(config)
            with home:
                complete = trainer.fit()
            p = trainer.progress
            if not complete:
                raise ConfigError(f"{config.out}: stopped at step {p.step}; the same command goes on")
            if "recognition" not in read_result(Path(config.out)):
                figures = measure_student(TrainedRun(Path(config.out)), config.evaluation.data, workers=0)
                write_result(trainer.folder, {"run": name, "seed": seed, "step": p.step, "complete": True, "seconds": p.seconds} | figures)
    finally:
        shutdown()


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of a run, empty where it is not there."""
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def figures(plan: dict[str, Any], out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """What all runs reached: {"about", "seeds", "methods": {name: {figure: [one share for each seed]}}}."""
    methods: dict[str, dict[str, list[float]]] = {name: {} for name in plan["methods"]}
    for seed in seeds:
        for name, config in configs(plan, out, seed).items():
            result = read_result(Path(config.out))
            told = {"accuracy": result["recognition"]["accuracy"], "macro-F1": result["recognition"]["macro_f1"]}
            told |= {"R@1": result["class_retrieval"]["r1"], "mAP": result["class_retrieval"]["map"]}
            for figure, value in told.items():
                methods[name].setdefault(figure, []).append(value)
    return {"about": plan.get("about", ""), "seeds": list(seeds), "methods": methods}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; what a user can mend is one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time, each in a process (default 1)")
    args = parser.parse_args(arguments)
    try:
        plan, seeds, out = read_plan(args.plan), range(args.first, args.first + args.seeds), folder_of(args.out)
        configs(plan, out, args.first, str(args.plan))  # errors before anything starts
        if args.jobs == 1:
            for seed in seeds:
                run_seed(plan, out, seed)
        else:
            _in_processes(plan, out, seeds, args.jobs)
        found = figures(plan, out, seeds)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (out / FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
    from pipeline.record.compared import plain_text

    print(plain_text(found))
    return 0


def _in_processes(plan: dict[str, Any], out: Path, seeds: Sequence[int], jobs: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    context, waiting, running = multiprocessing.get_context("spawn"), list(seeds), []
    while waiting or running:
        while waiting and len(running) < jobs:
            process = context.Process(target=_logged, args=(plan, out, waiting.pop(0)))
            process.start()
            running.append(process)
        multiprocessing.connection.wait([process.sentinel for process in running])
        done = [process for process in running if process.exitcode is not None]
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in done):
            for process in running:
                process.terminate()  # a run that is asked to stop saves first
            raise ConfigError(f"a seed failed; see {out}/seed-*.log")


def _logged(plan: dict[str, Any], out: Path, seed: int) -> None:
    with (out / f"seed-{seed}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run_seed(plan, out, seed)


if __name__ == "__main__":
    sys.exit(main())
