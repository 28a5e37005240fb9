"""A teacher's outputs for every sample, once: python -m tools.cache_teacher CONFIG|RUN OUT [--teacher NAME | --tower NAME] [a.b=c ...].

CONFIG is a YAML file of training: its entry NAME of `teachers` (live or pretrained) looks at its data. RUN is a run folder: the tower NAME
of that run (default: student) looks at the data of that run, or at other shards with data.sources.0.url=... OUT is then what
`{name: cached, path: OUT}` reads. Nothing is augmented. The command goes on where it was stopped: each file of OUT is whole or not there.
One process does it: of several ranks the first alone.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config import ConfigError, load, parse, unknown
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.loader import batches
from pipeline.data.sources import DataConfig, Sources
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.comm import leads
from pipeline.distributed.engine import EngineConfig
from pipeline.run import RunConfig
from pipeline.teachers import live
from pipeline.teachers.base import Teacher, TeacherConfig, Teachers
from pipeline.teachers.cached import FORMAT, parts, read_facts, write_part
from pipeline.types import Batch

NAME = "teacher"


class Writer:
    """One teacher over one set of samples, into one folder."""

    def __init__(self, config: TeacherConfig, data: DataConfig, engine: EngineConfig, out: Path, dtype: str, batch: int) -> None:
        """Raises ConfigError, CheckpointError, DataError."""
        self.out, self.batch = out, batch
        self.sources = Sources.open(data)
        teacher = config.open(self.sources)
        self.sources.classes = None  # the rows need no labels: shards without them will do
        if teacher.rows is not None:
            raise ConfigError("this teacher is cached already; name a live or a pretrained one")
        self.fetch = Fetch(self.sources, config.decoders(), seed=None)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = engine
        self.teachers = Teachers({NAME: teacher}, {NAME: config.reads()})
        self.teachers.to(self.device, engine.dtype, self._autocast, None)
        self.facts = self._facts(teacher, dtype)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.precision != "fp32")

    @torch.no_grad()
    def _facts(self, teacher: Teacher, dtype: str) -> dict[str, Any]:
        """What every file says of itself; shapes as a batch of one has them."""
        one = self.fetch[self._rows(0, 1)]
        if isinstance(one, DataError):
            raise one
        with self._autocast():
            found = teacher(one.to(self.device).fields)
        facts = {"format": FORMAT, "index": self.sources.digest, "samples": self.sources.num_samples, "dtype": dtype}
        facts |= {"teacher": teacher.digest, "precision": self.precision.precision}
        facts["features"] = {name: list(value.shape[1:]) for name, value in found.items() if value.ndim > 1}
        return facts | {"constants": {name: value.float().tolist() for name, value in found.items() if value.ndim == 1}}

    @staticmethod
    def _rows(first: int, last: int) -> Rows:
        ids = np.arange(first, last)
        return Rows(ids, ids, np.zeros_like(ids))

    def missing(self, size: int) -> list[tuple[int, int]]:
        """(first, one past the last) of the files still to be written, of at most `size` rows. Raises ConfigError for another's files."""
        held = parts(self.out)
        if held:
            there = read_facts(self.out)
            if differing := [name for name in self.facts if there.get(name) != self.facts[name]]:
                name = differing[0]
                raise ConfigError(
                    f"{self.out}: holds rows of another teacher, of other samples or in another form: {name} is {there.get(name)!r} there and "
                    f"{self.facts[name]!r} now. Give an empty folder"
                )
        ends = [0, *(last for _, last, _ in held)]
        begins = [*(first for first, _, _ in held), self.sources.num_samples]
        return [(at, min(at + size, begin)) for end, begin in zip(ends, begins) for at in range(end, begin, size)]

    def write(self, size: int, workers: int) -> int:
        """Writes what is missing, `size` rows a file; gives the number of rows that the teacher has seen of those."""
        self.out.mkdir(parents=True, exist_ok=True)
        todo = self.missing(size)
        requests = [self._rows(at, min(at + self.batch, last)) for first, last in todo for at in range(first, last, self.batch)]
        found = batches(self.fetch, requests, workers)
        rows = sum(last - first for first, last in todo)
        total, seen = self.sources.num_samples, 0
        with tqdm(total=total, initial=total - rows, unit="row", desc=self.out.name, dynamic_ncols=True, file=sys.stderr) as bar:
            for first, last in todo:
                outputs, present = self._outputs(found, last - first, bar)
                write_part(self.out, first, outputs, present, self.facts)
                seen += int(present.sum())
        return seen

    def _outputs(self, found: Iterator[Batch], rows: int, bar: tqdm) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The features of the next `rows` rows, zeros where the teacher has seen nothing; and which it has seen."""
        dtype, have = self.facts["dtype"], 0
        columns = {name: np.zeros((rows, *shape), dtype) for name, shape in self.facts["features"].items()}
        present = np.zeros(rows, bool)
        while have < rows:
            batch = self.teachers(next(found).to(self.device))
            at = slice(have, have + len(batch))
            here = batch.teacher[f"{NAME}.present"].cpu().numpy()
            present[at] = here
            for name, column in columns.items():
                values = batch.teacher[f"{NAME}.{name}"].float().cpu().numpy()[here]
                with np.errstate(over="ignore"):
                    column[at][here] = values.astype(dtype)
                if not np.isfinite(column[at]).all():
                    most = np.abs(values).max()
                    raise ConfigError(f"{name}: values of up to {most:g} do not fit {dtype}, or are not finite; try --dtype float32")
            have += len(batch)
            bar.update(len(batch))
        return columns, present


def chosen(source: Path, overrides: list[str], teacher: str | None, tower: str | None, checkpoint: str) -> tuple[RunConfig, TeacherConfig]:
    """The configuration whose data are looked at, and the teacher that looks. Raises ConfigError."""
    folder = source.is_dir()
    config = load(RunConfig, source / "resolved.yaml" if folder else source, overrides)
    if tower is not None or (folder and teacher is None):
        if not folder:
            raise ConfigError(f"--tower {tower}: is of a run; give its folder instead of {source}")
        return config, parse(live.Config, {"run": str(source), "tower": tower or "student", "checkpoint": checkpoint}, str(source))
    names = list(config.teachers)
    if teacher is None and len(names) != 1:
        raise ConfigError(f"{source}: has {len(names)} teachers ({', '.join(names) or 'none'}); name one with --teacher")
    teacher = teacher or names[0]
    if teacher not in config.teachers:
        raise ConfigError(f"{source}: {unknown('teacher', teacher, names)}")
    return config, config.teachers[teacher]


def main(arguments: list[str] | None = None) -> int:
    """The command; what a user can mend is one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.cache_teacher", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a YAML file, or a run folder")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example data.sources.0.url=data/other")
    parser.add_argument("--teacher", help="a name under `teachers`; needless where there is one")
    parser.add_argument("--tower", help="a tower of the run folder (default: student)")
    parser.add_argument("--checkpoint", default="newest", help="of the run folder: newest, best, or a step")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--rows", type=int, default=16384, help="rows of a file: what is lost when this is stopped (default 16384)")
    parser.add_argument("--batch", type=int, default=256, help="rows that the teacher looks at together (default 256)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read and decode (default 2)")
    args = parser.parse_intermixed_args(arguments)
    if not leads():
        return 0
    began = time.perf_counter()
    try:
        config, teacher = chosen(args.source, args.overrides, args.teacher, args.tower, args.checkpoint)
        writer = Writer(teacher, config.data, config.engine, args.out, args.dtype, args.batch)
        seen = writer.write(args.rows, args.workers)
    except (ConfigError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for _, _, path in parts(args.out))
    features = ", ".join(f"{name} {shape}" for name, shape in writer.facts["features"].items())
    print(
        f"{args.out}: {writer.sources.num_samples} rows, {seen} seen by the teacher now; {features}; {size / 1e6:.1f} MB, {time.perf_counter() - began:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
