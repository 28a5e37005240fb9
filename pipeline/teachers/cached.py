"""The outputs of a teacher, computed once by tools.cache_teacher, read with the samples by the loader's workers.

A folder of Arrow files (IPC, memory-mapped) `rows-<first>-<last>.arrow`: one row for each sample in the order of the ids, a list of fixed
length for each feature, and `present`. Each file's metadata says of which teacher, samples and shapes it is, so none can be mixed up.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import ConfigError, digest
from pipeline.data.errors import DataError
from pipeline.data.sources import Sources
from pipeline.teachers.base import Teacher, TeacherConfig

KEY = b"teacher"
FORMAT = 2  # since 2 the facts name the teacher that wrote them


class Config(TeacherConfig):
    """Rows of samples that could not be decoded, or that the teacher has seen nothing of, are zeros and False in `<teacher>.present`."""

    path: str = Field(description="the folder that tools.cache_teacher wrote")

    def gives(self) -> tuple[str, ...]:
        facts = read_facts(Path(self.path))
        return (*facts["features"], *facts["constants"])

    def is_cached(self) -> bool:
        return True

    def open(self, sources: Sources) -> "Cached":
        folder = Path(self.path)
        facts = read_facts(folder)
        if facts["samples"] != sources.num_samples or facts["index"] != sources.digest:
            raise DataError(
                f"teachers: {folder}: was made for other samples: {facts['samples']} of index {facts['index'][:12]}, and data.sources hold "
                f"{sources.num_samples} of index {sources.digest[:12]}. Write it again with tools.cache_teacher for these shards"
            )
        files = parts(folder)
        held = sum(last - first for first, last, _ in files)
        if held != facts["samples"]:
            raise DataError(f"teachers: {folder}: holds {held} of {facts['samples']} rows; start tools.cache_teacher again, it goes on")
        return Cached(CachedRows(files, facts), digest(facts), facts["teacher"])


class Cached(Teacher):
    """Nothing runs: its rows come with the samples."""

    def __init__(self, rows: "CachedRows", digest: str, writer: str) -> None:
        super().__init__()
        self.rows, self.digest, self.writer = rows, digest, writer  # writer: the digest of the teacher that looked at the samples


def parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(first sample, one past the last, file), in order."""
    return sorted((*map(int, path.stem.split("-")[1:]), path) for path in folder.glob("rows-*-*.arrow"))


def read_facts(folder: Path) -> dict[str, Any]:
    """What the files say of themselves; all of them the same. Raises ConfigError."""
    files = parts(folder)
    if not files:
        raise ConfigError(f"teachers: {folder}: holds no rows of a teacher; write them with python -m tools.cache_teacher CONFIG {folder}")
    found = {}
    for _, _, path in files:
        try:
            with pa.memory_map(str(path)) as source:
                found[path] = json.loads(pa.ipc.open_file(source).schema.metadata[KEY])
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"teachers: {path}: is no file of tools.cache_teacher ({error}); delete it and start that again") from None
    facts = next(iter(found.values()))
    if facts["format"] != FORMAT:
        raise ConfigError(f"teachers: {folder}: has format {facts['format']}, this version reads format {FORMAT}; write it again")
    for path, other in found.items():
        if other != facts:
            name = next(name for name in facts if other.get(name) != facts[name])
            raise ConfigError(f"teachers: {path}: is of another teacher or of other samples than the files beside it: its {name} differs")
    return facts


class CachedRows:
    """Sample ids -> rows; opened by each worker for itself, so that it can be handed to one. The files stay memory-mapped."""

    def __init__(self, files: list[tuple[int, int, Path]], facts: dict[str, Any]) -> None:
        self.files, self.facts = files, facts
        self.first = np.array([first for first, _, _ in files])
        self._open: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, sample: np.ndarray) -> dict[str, Tensor]:
        """Feature -> [b, ...] in the precision of the file; `present` bool [b]."""
        shapes = {"present": []} | self.facts["features"]
        out = {name: np.zeros((len(sample), *shape), bool if name == "present" else self.facts["dtype"]) for name, shape in shapes.items()}
        place = np.searchsorted(self.first, sample, side="right") - 1
        for file in np.unique(place):
            here = place == file
            for name, values in self._columns(int(file)).items():
                out[name][here] = values[sample[here] - self.first[file]]
        constants = {name: torch.tensor(values).expand(len(sample), -1) for name, values in self.facts["constants"].items()}
        return {name: torch.from_numpy(values) for name, values in out.items()} | constants

    def _columns(self, file: int) -> dict[str, np.ndarray]:
        """Views of a file's columns [rows, ...]; nothing is copied but `present`, which Arrow packs in bits."""
        if file not in self._open:
            batch = pa.ipc.open_file(pa.memory_map(str(self.files[file][2]))).get_batch(0)
            columns = {"present": batch.column("present").to_numpy(zero_copy_only=False)}
            for name, shape in self.facts["features"].items():
                flat = batch.column(name).values.to_numpy(zero_copy_only=True)
                columns[name] = flat.reshape(len(batch), *shape)
            self._open[file] = columns
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "facts": self.facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def write_part(folder: Path, first: int, features: dict[str, np.ndarray], present: np.ndarray, facts: dict[str, Any]) -> Path:
    """One file of rows `first` and on; whole or not at all."""
    columns = {"present": pa.array(present)}
    for name, values in features.items():
        width = math.prod(facts["features"][name])
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    batch = pa.record_batch(columns).replace_schema_metadata({KEY: json.dumps(facts)})
    path = folder / f"rows-{first:012d}-{first + len(present):012d}.arrow"
    partial = path.with_suffix(".part")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)
    return path
