"""Shards that tests write by hand, and what there is in those that tools.make_shards has written."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.data.cache import ShardCache
from pipeline.data.index import Index
from pipeline.data.read import Reader
from tools.make_shards import build, parser
from tools.make_shards import main as make_shards


def by_hand(folder: Path, rows: Iterable[Mapping[str, bytes]]) -> Path:
    """One tar with a sample for each row, its members by extension, indexed in place."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000.tar", "w") as tar:
        for number, members in enumerate(rows):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert make_shards(["tars", str(folder), "--shards", str(folder / "*.tar"), "--workers", "1"]) == 0
    return folder


def make(*arguments: object) -> str:
    """tools.make_shards with one worker; what it says. Raises what it raises."""
    return build(parser().parse_args([str(argument) for argument in (*arguments, "--workers", 1)]))


def samples(folder: Path) -> list[dict[str, bytes]]:
    """All members of all samples, in the order of the index."""
    index = Index.open(folder)
    reader = Reader(index, ShardCache(None))
    return [reader.read(row) for row in range(index.num_samples)]
