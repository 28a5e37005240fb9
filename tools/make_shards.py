"""Writes webdataset shards and their index: python -m tools.make_shards SOURCE OUT [options]. Started again, it does what is left."""

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import pyarrow as pa
from tqdm import tqdm

from pipeline.config import digest
from pipeline.data import storage
from pipeline.data.errors import DataError
from pipeline.data.index_format import FILE, read_build, write_index
from tools import sources
from tools.noise import swapped
from tools.shards import PARTS, Output, Stats, Task, make, part_bytes, rows_of
from tools.sources import tars
from tools.sources.base import Source

FORMAT = 1  # of the shards; a change that alters their bytes counts it up
TRUTH = "truth.parquet"
_MODULES = {m.name: importlib.import_module(f"tools.sources.{m.name}") for m in pkgutil.iter_modules(sources.__path__)}
MADE = {name: module for name, module in _MODULES.items() if name != "base" and hasattr(module, "Source")}
_WINDOW = 8  # shards within which a large table is shuffled


def outside(name: str) -> None:
    """Adds the source of a module that is no part of this project, by its dotted name. Raises DataError."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise DataError(f"{name}: there is no module {error.name!r}; is the folder that holds it on PYTHONPATH?") from None
    if not hasattr(module, "Source"):
        raise DataError(f"{name}: the module has no class Source (tools/sources/base.py)")
    MADE[name] = module


def parser() -> argparse.ArgumentParser:
    """The command line, one sub-command per source."""
    whole = argparse.ArgumentParser(prog="python -m tools.make_shards", description=__doc__)
    commands = whole.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, module in {**MADE, "tars": tars}.items():
        one = commands.add_parser(name, help=(module.__doc__ or "").split(".")[0], description=module.__doc__)
        one.add_argument("out", metavar="OUT", help="folder or URL of the data set")
        one.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
        one.add_argument(
            "--part",
            type=_part,
            metavar="I/N",
            help="make only every N-th shard, from the I-th (0 to N-1); the index is left to a run without",
        )
        if module is tars:
            tars.add_arguments(one)
            continue
        one.add_argument("--shard-size", type=int, default=module.Source.shard_size, help="samples per shard (default %(default)s)")
        one.add_argument("--seed", type=int, default=0, help="of the order, the subset and the noise (default 0)")
        one.add_argument(
            "--noise",
            type=float,
            default=0.0,
            metavar="RATE",
            help=f"share of samples that get another name's caption; the truth goes to {TRUTH}",
        )
        one.add_argument(
            "--max-bad-fraction", type=float, default=0.01, help="stop when more than this share of rows cannot be used (default 0.01)"
        )
        module.Source.add_arguments(one)
    return whole


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 0 to N-1")
    return int(part), int(parts)


def build(options: argparse.Namespace) -> str:
    """Makes the data set of parsed options; returns what was done, in one line. Raises DataError."""
    if options.source == "tars":
        shards = tars.find(options.shards)
        out = _output(options, tars.fingerprint(shards), in_place=True)
        tasks = [Task(number, url=url) for number, url in enumerate(shards)]
        return _already(out) or _run(out, tasks, None, options)
    if options.shard_size < 1 or not 0 <= options.noise <= 1:
        raise DataError(f"--shard-size {options.shard_size}, --noise {options.noise}: expected at least 1, and a share from 0 to 1")
    source: Source = MADE[options.source].Source(options)
    common = {"format": FORMAT, "shard_size": options.shard_size, "seed": options.seed, "noise": options.noise}
    out = _output(options, common | source.fingerprint(), in_place=False)
    return _already(out) or _write_all(out, source, options)


def _output(options: argparse.Namespace, fingerprint: dict, in_place: bool) -> Output:
    url = options.out.rstrip("/")
    url = os.path.abspath(storage.local_path(url)) if storage.is_local(url) else url
    return Output(url, digest(fingerprint), fingerprint, in_place)


def _already(out: Output) -> str:
    """What to say when everything is there; empty when something is to be done. Raises DataError where OUT holds something else."""
    found = read_build(storage.join(out.url, FILE))
    if found is None:
        return ""
    build, shards = found
    if build != out.build:
        done = _finished(out, [int(name.split(".")[0]) for name, _ in shards if name[:6].isdigit()][:1])
        raise DataError(_other(out, next(iter(done.values())).options if done else {}))
    if not out.in_place:
        sizes = storage.sizes_in(out.url)
        if any(sizes.get(name) != size or name.replace(".tar", ".stats.json") not in sizes for name, size in shards):
            return ""
        if (out.options["noise"] or out.options.get("natural")) and TRUTH not in sizes:
            return ""
    return f"{out.url}: nothing to do, all {len(shards)} shards are there"


def _other(out: Output, theirs: dict) -> str:
    differ = [
        f"{key}: {theirs.get(key)!r} there, {value!r} asked" for key, value in out.options.items() if theirs and theirs.get(key) != value
    ]
    return f"{out.url}: was made with other options ({'; '.join(differ) or 'its digest differs'}). Name another folder, or remove this one"


def _write_all(out: Output, source: Source, options: argparse.Namespace) -> str:
    plan = source.plan(options.seed, options.noise > 0, _WINDOW * options.shard_size)
    count, given, noisy = len(plan.rows), plan.given, plan.noisy
    if options.noise:
        assert plan.captions is not None
        usable = [at for at, caption in enumerate(plan.captions) if caption.strip()]
        given = list(plan.captions)
        try:
            for at, other in zip(usable, swapped([plan.captions[at] for at in usable], options.noise, options.seed)):
                given[at] = plan.captions[usable[other]]
        except ValueError as error:
            raise DataError(str(error)) from None
        noisy = [a != b for a, b in zip(plan.captions, given)]
    tasks = []
    for number, start in enumerate(range(0, count, options.shard_size)):
        end = min(start + options.shard_size, count)
        tasks.append(Task(number, start, plan.rows[start:end], given and given[start:end]))
    said = _run(out, tasks, source, options)
    if options.part:
        return said
    if given is not None:
        storage.write_bytes(storage.join(out.url, TRUTH), _truth(out, plan.captions, given, noisy))
    if notice := source.notice():
        storage.write_bytes(storage.join(out.url, "NOTICE.txt"), notice.encode())
    return f"{said}\n{about}" if (about := source.about()) else said


def _truth(out: Output, captions: list[str], given: list[str], noisy: list[bool | None]) -> bytes:
    """truth.parquet: which samples of the index have a wrong caption, those left out of which nobody knows. A key is the position in the plan."""
    keys = storage.read_parquet(storage.join(out.url, FILE), ["sample", "key"])
    at = [int(key) for key in keys["key"].to_pylist()]
    true, told = [captions[i] for i in at], [given[i] for i in at]
    wrong = pa.array([noisy[i] for i in at], pa.bool_())
    table = keys.append_column("noisy", wrong).append_column("caption", pa.array(true)).append_column("given", pa.array(told))
    return part_bytes(table.filter(wrong.is_valid()))


def _run(out: Output, tasks: Sequence[Task], source: Source | None, options: argparse.Namespace) -> str:
    storage.make_folder(storage.join(out.url, PARTS))
    storage.sweep(out.url)
    done = _finished(out, [task.number for task in tasks])
    for stats in done.values():
        if stats.build != out.build:
            raise DataError(_other(out, stats.options))
    part, parts = options.part or (0, 1)
    left = [task for task in tasks if task.number not in done and task.number % parts == part]
    unit, total = ("samples", sum(len(task.rows) for task in tasks)) if source else ("shards", len(tasks))
    with tqdm(total=total, unit=f" {unit}", smoothing=0.1, disable=None, file=sys.stderr) as bar:
        bar.update(sum(_amount(tasks[number], done[number], source) for number in done))
        for number, stats in _make_each(left, source, out, options.workers):
            done[number] = stats
            bar.update(_amount(tasks[number], stats, source))
            _check_bad(done, total, options)
    if options.part:
        return f"{out.url}: part {part} of {parts}, {len(left)} shards made now. {_causes(done)}"
    numbers = sorted(number for number in done if done[number].samples)
    if not numbers:
        raise DataError(f"{out.url}: no sample could be used. {_causes(done)}")
    infos = [done[number].info for number in numbers]
    write_index(storage.join(out.url, FILE), infos, (rows_of(done[number], number, out) for number in numbers), out.build)
    storage.remove_folder(storage.join(out.url, PARTS))
    return f"{out.url}: {sum(info.samples for info in infos)} samples in {len(infos)} shards ({len(left)} made now). {_causes(done)}"


def _amount(task: Task, stats: Stats, source: Source | None) -> int:
    return len(task.rows) if source and task.rows is not None else 1


def _finished(out: Output, numbers: Sequence[int]) -> dict[int, Stats]:
    """Statistics of the shards that are complete: the file is there, and its shard has the size that it says."""
    wanted = {out.stats(number): number for number in numbers}
    folder = storage.join(out.url, PARTS) if out.in_place else out.url
    sizes = storage.sizes_in(folder)
    found = {}
    for url, data in storage.read_many([url for url in wanted if url.rsplit("/", 1)[-1] in sizes]).items():
        try:
            stats = Stats.parse(data)
        except (ValueError, TypeError, KeyError):
            continue  # not ours, or cut off: the shard is made again
        if out.in_place or not stats.samples or sizes.get(stats.name) == stats.bytes:
            found[wanted[url]] = stats
    return found


def _check_bad(done: dict[int, Stats], total: int, options: argparse.Namespace) -> None:
    bad = sum(sum(stats.failures.values()) for stats in done.values())
    if bad and bad > options.max_bad_fraction * total:
        raise DataError(
            f"{options.out}: {bad} of {total} rows could not be used, --max-bad-fraction is {options.max_bad_fraction}. {_causes(done)}"
        )


def _causes(done: dict[int, Stats]) -> str:
    causes: Counter[str] = Counter()
    for stats in done.values():
        causes.update(stats.failures)
    return "Left out: " + ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items())) if causes else "Nothing left out"


def _make_each(tasks: Sequence[Task], source: Source | None, out: Output, workers: int) -> Iterator[tuple[int, Stats]]:
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from ((task.number, make(task, source, out)) for task in tasks)
        return
    # a fork server that has imported everything: forking this process would copy its threads' locks, spawning would import torch per worker
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.shards", "webdataset.writer"])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = iter(tasks)
        running = {}
        try:
            while True:
                for task in waiting:  # a few ahead of the workers, so that the tasks of a large table are not all pickled at once
                    running[pool.submit(make, task, source, out)] = task.number
                    if len(running) >= 2 * workers:
                        break
                if not running:
                    return
                finished = wait(running, return_when="FIRST_COMPLETED").done
                for future in finished:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        if words and "." in words[0]:
            outside(words[0])
        print(build(parser().parse_args(words)))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a worker was killed, perhaps for memory. What is finished stays: start again, with fewer --workers", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
