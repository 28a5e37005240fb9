"""python -m pipeline train CONFIG | evaluate RUN | guide CONFIG | report RUN... | curate RUN OUT   [key.path=value ...]; the same under `accelerate launch -m pipeline`."""

import argparse
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, load, names_in
from pipeline.data.errors import DataError, StorageError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    registries = {name: ", ".join(names_in(f"pipeline.{name}")) for name in ("towers", "selection", "objectives", "teachers")}
    known = "\n".join(f"  {name}: {names}" for name, names in registries.items())
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="CLIP pretraining with sample selection.",
        epilog=f"components by name:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a configuration; the same command resumes it",
        epilog=f"components by name:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", help="a YAML file, for example configs/pretrain/icons.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example selector.name=random optimizer.lr=5e-4")
    evaluate = commands.add_parser("evaluate", help="zero-shot, retrieval, linear probe and selection quality of a run")
    evaluate.add_argument("run", help="a run folder, or its URL")
    evaluate.add_argument("--data", help="webdataset shards with an index, any fsspec URL; default: evaluation.data of the run")
    evaluate.add_argument("--classes", help="'seen', 'all', or a file of class names for shards with .cls members")
    evaluate.add_argument("--templates", help="file of prompts with {}, one a line")
    evaluate.add_argument("--checkpoint", default="newest", help="newest, best, or a step")
    evaluate.add_argument("--quiet", action="store_true", help="write result.json without printing it")
    guide = commands.add_parser("guide", help="several modalities: distil from uni-modal teachers (UMT) or average their models (UME)?")
    guide.add_argument("config", help="the joint run: a fusion student with an input for each modality")
    guide.add_argument("overrides", nargs="*", metavar="key.path=value")
    guide.add_argument("--rule", choices=("probe", "val", "both"), default="probe", help="what decides; at chance probe gives way to val")
    guide.add_argument(
        "--delta", default="0", help="by how much the probe must win: a share, or 'error' for one standard error (default 0)"
    )
    guide.add_argument("--validation", help="held-out shards to choose on; default: evaluation.data")
    guide.add_argument("--weight", type=float, default=0.1, help="of each teacher in UMT (default 0.1)")
    curate = commands.add_parser(
        "curate",
        help="what a run learnt about its pairs: a table, a list of noisy ones, shards without them",
        epilog="for example  python -m pipeline curate runs/icons curated --write  and then\n"
        "python -m pipeline train configs/pretrain/icons.yaml out=runs/icons_curated data.sources.0.url=curated/shards",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    curate.add_argument("run", help="a run folder, or its URL")
    curate.add_argument("out", type=Path, help="a new folder: samples.parquet, noisy.txt, examples.html")
    curate.add_argument("--share", type=float, help="judge this share noisy, lowest scores first; default: split the scores in two classes")
    curate.add_argument("--write", action="store_true", help="write OUT/shards without the pairs judged noisy")
    report = commands.add_parser("report", help="one HTML page about one or more runs")
    report.add_argument("runs", nargs="+", help="run folders, or their URLs")
    report.add_argument("--out", type=Path, help="default: report.html in the folder that holds the first run; here, where that is a URL")
    report.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders of tools.compare: methods over seeds"
    )
    return top


def train(args: argparse.Namespace) -> int:
    """Trains or resumes; 0 when the run is complete or was asked to stop and saved."""
    from pipeline.distributed.launch import shutdown
    from pipeline.evaluation.evaluate import write_result
    from pipeline.run import RunConfig, build

    config = load(RunConfig, args.config, args.overrides)
    try:
        trainer, home = build(config)
        with trainer.stop, home:  # what is left to write after the last step is written
            complete = trainer.fit()
            if trainer.engine.comm.rank == 0:
                p = trainer.progress
                samples = {"offered": p.offered, "scored": p.scored, "trained": p.trained, "bad": dict(trainer.data.counted)}
                home.refresh("result.json")
                write_result(
                    trainer.folder,
                    {"run": trainer.folder.name, "step": p.step, "complete": complete, "samples": samples, "seconds": p.seconds},
                )
                if not complete:
                    print(
                        f"{config.out}: stopped by {trainer.stop.received or 'another rank'} at step {p.step} of {trainer.steps}, saved; the same command goes on",
                        flush=True,
                    )
    finally:
        shutdown()
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Writes result.json of the run (or evaluation/<name>.json for other data) and prints it."""
    from pipeline.data.sources import Sources
    from pipeline.evaluation.evaluate import HeldOut, judge_selection, measure, own_measure, write_result
    from pipeline.run import TrainedRun
    from pipeline.selection.warmup import visits_of

    began = time.perf_counter()
    run = TrainedRun(args.run, args.checkpoint)
    given = {key: value for key in ("data", "classes", "templates") if (value := getattr(args, key))}
    if args.data and not args.classes:
        given["classes"] = "all"
    config = run.config.evaluation.model_copy(update=given)
    sources = Sources.open(run.config.data)
    result: dict[str, Any] = {}
    examples = None
    own = own_measure(run.config.towers)
    if config.data and own:
        result = own(run, config.data, batch=config.batch, workers=config.workers)
    elif config.data:
        held = HeldOut.open(config, run.config.data, lambda: set(sources.captions()))
        result, examples = measure(held, config, run.decoders, run.encode, run.device)
    (run.folder / "evaluation").mkdir(exist_ok=True)
    if args.data:
        name = "".join(c if c.isalnum() else "-" for c in args.data).strip("-")
        (run.folder / "evaluation" / f"{name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        run.view.push()
        print(json.dumps(result, indent=1))
        return 0
    if examples is not None:
        (run.folder / "evaluation" / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    run.view.pull("selection/*", "result.json", "warmup.json")
    quality = judge_selection(
        run.folder, sources, [s.url for s in run.config.data.sources], visits_of(run.folder, run.config.selector.warmup_visits)
    )
    facts = json.loads((run.folder / "facts.json").read_text(encoding="utf-8"))
    done = json.loads((run.folder / "result.json").read_text(encoding="utf-8")) if (run.folder / "result.json").is_file() else {}
    seconds = done.get("seconds", {}) | {"evaluate": time.perf_counter() - began}
    described = {
        "model": {"parameters": facts["parameters"]},
        "device": facts["device"],
        "data": {k: facts[k] for k in ("samples", "lanes", "groups")},
    }
    result |= described | {"config": {"selector": run.config.selector.name}, "selection": quality, "seconds": seconds}
    write_result(run.folder, result)
    run.view.push()
    if not args.quiet:
        print(json.dumps({key: value for key, value in result.items() if key != "selection"}, indent=1))
    return 0


def guide(args: argparse.Namespace) -> int:
    """Trains the uni-modal runs, chooses, and says why and what to start next."""
    from pipeline.distributed.launch import shutdown
    from pipeline.evaluation.guided import guide
    from pipeline.run import RunConfig

    try:
        delta = args.delta if args.delta == "error" else float(args.delta)
    except ValueError:
        raise ConfigError(f"--delta {args.delta}: expected a share such as 0.01, or 'error'") from None
    config = load(RunConfig, args.config, args.overrides)
    try:
        choice, path = guide(config, args.rule, validation=args.validation, delta=delta, weight=args.weight)
    finally:
        shutdown()
    print(f"{choice.method.upper()}: {choice.reason}\nnext: python -m pipeline train {path}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Writes the page, says where, and prints the comparison."""
    from pipeline.distributed.views import View
    from pipeline.record.report import write_report
    from pipeline.record.runs import label, load_run
    from pipeline.record.tables import plain_text

    views = [View(run) for run in args.runs]
    for view in views:
        view.pull("selection/*", "evaluation/*")
    folders = [view.folder for view in views]
    page = write_report(folders, args.out or (Path() if views[0].store else folders[0].parent) / "report.html", args.compare)
    runs = [load_run(path, place) for place, path in enumerate(folders)]
    label(runs)
    print(f"{page}\n\n{plain_text(runs)}")
    return 0


def curate(args: argparse.Namespace) -> int:
    """Writes the folder and says what was found."""
    from pipeline.distributed.views import View
    from pipeline.evaluation.curate import curate

    if args.share is not None and not 0 < args.share < 1:
        raise ConfigError(f"--share {args.share}: expected a share between 0 and 1")
    view = View(args.run)
    view.pull("selection/*", "warmup.json")
    view.weights("newest", ("run.json", "lanes-*"))
    print(curate(view.folder, args.out, args.share, args.write))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; what a user can mend is one message and exit code 2, not a traceback; storage that does not answer is 75.

    Of several ranks all train, and guide, which trains; the first alone does the rest.
    """
    args = parser().parse_args(arguments)
    try:
        from pipeline.distributed.comm import leads

        if args.command not in ("train", "guide") and not leads():
            return 0
        return {"train": train, "evaluate": evaluate, "guide": guide, "report": report, "curate": curate}[args.command](args)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("pipeline", "tools"):
            raise
        print(f"error: {error}. Install the extra that brings it: pip install 'dissect-pipeline[train]'", file=sys.stderr)
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL  # a launcher may start it again
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}. Make room, then start the same command again; it goes on from the newest checkpoint", file=sys.stderr)
    except Exception as error:
        if not {"CheckpointError", "NotFinite"} & {kind.__name__ for kind in type(error).__mro__}:  # their modules import torch
            raise
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
