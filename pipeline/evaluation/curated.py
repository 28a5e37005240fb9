"""What curate writes beside its table: a page of examples, and shards without the pairs judged noisy."""

import hashlib
import html
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import digest
from pipeline.data.errors import BadSample
from pipeline.data.index_format import FILE, ShardInfo, write_index
from pipeline.data.sources import Sources
from pipeline.record.images import data_uri, load_samples

SHOWN = 24
_PAGE = """<!doctype html><meta charset="utf-8"><title>Curated pairs</title><style>body{{font:15px sans-serif;margin:2em;max-width:70em}}
figure{{display:inline-block;width:104px;margin:4px;vertical-align:top;font-size:12px}}img{{max-width:96px}}</style><h1>Curated pairs</h1>{body}"""


def write_examples(path: Path, found: Any, truth: pa.Table | None, urls: list[str]) -> None:
    """examples.html: the lowest scores, both sides of the cut, the highest. `found`: Verdicts. Raises DataError."""
    known = np.flatnonzero(np.isfinite(found.score))
    order = known[np.argsort(found.score[known], kind="stable")]
    noisy = order[found.verdict[order] == "noisy"]
    clean = order[found.verdict[order] == "clean"]
    parts = {
        "judged noisy, the surest": noisy[:SHOWN],
        "judged noisy, the least sure": noisy[::-1][:SHOWN],
        "judged clean, the least sure": clean[:SHOWN],
        "judged clean, the surest": clean[::-1][:SHOWN],
    }
    told = dict(zip(truth["sample"].to_pylist(), truth["noisy"].to_pylist())) if truth is not None else {}
    body = []
    for title, samples in parts.items():
        body.append(f"<h2>{title}</h2>")
        for sample, pair in zip(samples.tolist(), load_samples(urls, samples.tolist())):
            really = {True: "<br>in truth noisy", False: "<br>in truth clean"}.get(told.get(sample), "")
            text = f"{html.escape(pair.caption)}<br>score {found.score[sample]:.1f}, trained {found.selected[sample]} times{really}"
            body.append(f'<figure><img src="{data_uri(pair.image)}" alt=""><figcaption>{text}</figcaption></figure>')
    path.write_text(_PAGE.format(body="".join(body)), encoding="utf-8")


def write_shards(out: Path, sources: Sources, left_out: np.ndarray) -> str:
    """Copies the members of every other sample, byte for byte, shard by shard; an index is written last. `left_out`: bool [N]."""
    out.mkdir(parents=True)
    infos, tables, bad = [], [], 0
    for source, index in enumerate(sources.indices):
        for number in range(len(index.shards)):
            first, last = (int(index.shard_start[number + i]) for i in (0, 1))
            rows = [row for row in range(first, last) if not left_out[sources.bases[source] + row]]
            path = out / f"{len(infos):06d}.tar"
            table, extensions, lost = _copy(path, sources.readers[source], rows, index.keys(rows), f"{source:02d}-" if source else "")
            bad += lost
            if table is None:
                path.unlink()
                continue
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            infos.append(ShardInfo(path.name, os.path.getsize(path), sha256, table.num_rows, extensions))
            tables.append(table)
    build = digest([sources.digest, hashlib.sha256(np.packbits(left_out).tobytes()).hexdigest()])
    write_index(str(out / FILE), infos, tables, build)
    return f"{out}: {sum(info.samples for info in infos)} samples in {len(infos)} shards" + (f"; {bad} could not be read" if bad else "")


def _copy(path: Path, reader: Any, rows: list[int], keys: list[str], prefix: str) -> tuple[pa.Table | None, tuple[str, ...], int]:
    """One shard: its rows of the index (None: no sample is left), its extensions, and how many samples could not be read."""
    found, lost = [], 0
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for row, key in zip(rows, keys):
            try:
                members = reader.read(row)
            except BadSample:
                lost += 1
                continue
            values, crc = {"key": prefix + key}, 0
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{prefix}{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
                values[f"{extension}.size"] = len(data)
                values[f"{extension}.offset"] = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                crc = zlib.crc32(data, crc)
            found.append(values | {"crc": crc})
    if not found:
        return None, (), lost
    extensions = sorted({name.removesuffix(".size") for values in found for name in values if name.endswith(".size")})
    columns: dict[str, pa.Array] = {
        "key": pa.array([values["key"] for values in found]),
        "crc": pa.array([values["crc"] for values in found], pa.uint32()),
    }
    for extension in extensions:
        columns[f"{extension}.offset"] = pa.array([values.get(f"{extension}.offset", -1) for values in found], pa.int64())
        columns[f"{extension}.size"] = pa.array([values.get(f"{extension}.size", -1) for values in found], pa.int64())
    return pa.table(columns), tuple(extensions), lost
