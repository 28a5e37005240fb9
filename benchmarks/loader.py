"""This loader beside webdataset, litdata and mosaicml-streaming, and beside itself with skip before decode.

    python -m benchmarks.loader [--data data/icons-large] [--repeats 3] [--storage local s3] [--mosaic VENV/bin/python] [--json FILE]
    python -m benchmarks.loader --peers --storage local --repeats 1 --shards 4         (this loader alone)

Images a second of a whole pass and after its first batch, seconds to the first batch cold and after a resume, memory; with 0 and 2
workers, from local disk and from an S3 server on loopback (moto). All read the same samples, stored each its own way, in one order of
shards, and decode and collate them alike. Each measurement is a fresh process; the loaders take turns, and what is printed are medians.
On a busy machine look at images per CPU second. litdata is in the extra `bench`; mosaicml-streaming needs numpy < 2.2 and
transformers < 5, so an environment of its own:

    python -m venv VENV && VENV/bin/pip install torch==... torchvision==... pyarrow pydantic tokenizers webdataset mosaicml-streaming
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common import installed, machine, save
from benchmarks.loader_cell import BATCH, LOADERS, WINDOW, tokenizer
from pipeline.data.sources import DataConfig, SourceConfig, Sources

SKIPPED = "ours, 80 % skipped"
WRITE_MOSAIC = """
import sys
import pyarrow as pa
from streaming import MDSWriter
with MDSWriter(out=sys.argv[1], columns={"png": "bytes", "txt": "bytes"}, size_limit=int(sys.argv[2])) as out:
    for item in pa.ipc.open_stream(sys.stdin.buffer).read_all().to_pylist():
        out.write(item)
"""


def arrow(items: list[dict[str, bytes]]) -> bytes:
    """Samples for a process of another environment."""
    table, sink = pa.Table.from_pylist(items), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def subset(data: Path, out: Path, shards: int) -> list[Path]:
    """The first shards of a data set as a data set, indexed where they lie."""
    from tools.make_shards import main as make_shards

    out.mkdir()
    paths = [Path(shutil.copy(path, out)) for path in sorted(data.glob("*.tar"))[:shards]]
    if len(paths) < shards or make_shards(["tars", str(out), "--shards", str(out / "*.tar"), "--workers", "1"]):
        raise SystemExit(f"{data}: holds no {shards} shards; make it with: python -m tools.make_shards icons data/icons-large --size 64")
    return paths


def samples(place: Path) -> list[dict[str, bytes]]:
    """The bytes of every sample, in the order of the index."""
    sources = Sources.open(DataConfig(sources=[SourceConfig(url=str(place))], batch=BATCH))
    return [{name: sources.members(i)[name] for name in ("png", "txt")} for i in range(sources.num_samples)]


def same(item: dict[str, bytes]) -> dict[str, bytes]:
    """litdata asks for a function, and sends it to another process."""
    return item


def write_litdata(items: list[dict[str, bytes]], out: Path, per_chunk: int) -> None:
    """Raises SystemExit where litdata is missing."""
    if not installed("litdata"):
        raise SystemExit(
            "litdata is not installed: pip install -c constraints.txt torch==2.13.0 -e '.[bench]', or leave it out with --peers webdataset"
        )
    from litdata import optimize

    optimize(fn=same, inputs=items, output_dir=str(out), chunk_size=per_chunk, num_workers=1, start_method="fork", verbose=False)


@contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """A real S3 server on loopback that holds `folder` as a public bucket; the variables that point every client at it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1"}
    keys |= {"AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}
    client = boto3.client("s3", endpoint_url=url, **{k.lower(): v for k, v in list(keys.items())[:2]}, region_name="us-east-1")
    client.create_bucket(Bucket="shards", ACL="public-read")
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "shards", str(path.relative_to(folder)), ExtraArgs={"ACL": "public-read"})
    try:
        yield keys
    finally:
        server.stop()


def run_cell(python: str, cell: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Raises SystemExit with what it said where it fails."""
    with tempfile.TemporaryDirectory(dir=cell["cache"]) as cache:
        command = [python, "-m", "benchmarks.loader_cell", json.dumps(cell | {"cache": cache})]
        quiet = {"LITDATA_DISABLE_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run(command, env=os.environ | quiet | environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"{cell['loader']}, {cell['storage']}, {cell['workers']} workers: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _mean_bytes(items: list[dict[str, bytes]], shards: int) -> int:
    """Of a shard that holds as many samples as ours, with some room for headers."""
    return 32 * len(items) // shards + sum(len(value) for item in items for value in item.values()) * 101 // 100 // shards


def cells(work: Path, names: list[str], count: int, shards: list[Path], args: argparse.Namespace, endpoint: str) -> list[dict[str, Any]]:
    """What is measured once in every round, loaders in turn."""
    folders = {"ours": "ours", SKIPPED: "ours", "webdataset": "ours", "litdata": "litdata", "mosaicml-streaming": "mosaic"}
    common = {
        "samples": count,
        "shard_size": count // len(shards),
        "size": args.size,
        "tokenizer": str(work / "tokenizer.json"),
        "cache": str(work),
    }
    made = []
    for storage in args.storage:
        for workers in (0, 2):
            for name in names:
                place = str(work / "data" / folders[name]) if storage == "local" else f"s3://shards/{folders[name]}"
                urls = [str(path) if storage == "local" else f"pipe:curl -sf {endpoint}/shards/ours/{path.name}" for path in shards]
                made.append({"loader": name, "storage": storage, "workers": workers, "place": place, "urls": urls} | common)
    return [cell for cell in made if cell["loader"] != SKIPPED or cell["storage"] == "local"]


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure of a cell."""
    names = [name for name, value in rounds[0].items() if isinstance(value, float)]
    return {name: statistics.median(found[name] for found in rounds) for name in names} | {"rounds": rounds}


def report(rows: list[dict[str, Any]]) -> str:
    """The table: medians, and the median over rounds of the ratio to this loader."""
    lines = [
        f"{'storage':8}{'workers':>8}  {'loader':20}{'images/s':>9}{'steady':>8}{'ours / it':>10}{'per CPU s':>10}{'ours / it':>10}"
        f"{'first s':>9}{'resumed':>9}{'MiB':>7}"
    ]
    for row in rows:
        resumed = row.get("resumed_first_batch_seconds")
        lines.append(
            f"{row['storage']:8}{row['workers']:8}  {row['loader']:20}{row['images_per_second']:9.0f}"
            f"{row['steady_images_per_second']:8.0f}{row['steady_ours_over_it']:10.2f}{row['images_per_cpu_second']:10.0f}{row['ours_over_it']:10.2f}"
            f"{row['first_batch_seconds']:9.2f}{resumed if resumed is None else format(resumed, '.2f')!s:>9}{row['memory_mib']:7.0f}"
        )
    return "\n".join(lines)


def together(wanted: list[dict[str, Any]], found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row a cell: medians over the rounds, and by how much this loader does more images per CPU second, and a second after the first
    batch, round by round."""
    rows = [{key: cell[key] for key in ("storage", "workers", "loader")} | medians(rounds) for cell, rounds in zip(wanted, found)]
    for row in rows:
        ours = next(r for r in rows if (r["storage"], r["workers"], r["loader"]) == (row["storage"], row["workers"], "ours"))
        for name, rate in (("ours_over_it", "images_per_cpu_second"), ("steady_ours_over_it", "steady_images_per_second")):
            row[name] = statistics.median(a[rate] / b[rate] for a, b in zip(ours["rounds"], row["rounds"]))
    return rows


def compare(work: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prepares the data and gives the result after each round."""
    data = work / "data"
    data.mkdir()
    shards = subset(Path(args.data), data / "ours", args.shards)
    items = samples(data / "ours")
    tokenizer(data / "ours", work / "tokenizer.json")
    names, pythons = ["ours", SKIPPED, *args.peers], dict.fromkeys(LOADERS, sys.executable)
    if "litdata" in names:
        write_litdata(items, data / "litdata", len(items) // len(shards))
    if args.mosaic:
        names, pythons["mosaicml-streaming"] = [*names, "mosaicml-streaming"], args.mosaic
        command = [args.mosaic, "-c", WRITE_MOSAIC, str(data / "mosaic"), str(_mean_bytes(items, len(shards)))]
        subprocess.run(command, input=arrow(items), check=True)
    settings = {"samples": len(items), "shards": len(shards), "size": args.size, "batch": BATCH, "window_shards": WINDOW}
    facts = {"benchmark": "loader", "machine": machine(["webdataset", "litdata", "pillow", "moto"]), "settings": settings}
    with object_store(data) as environment:
        wanted = cells(work, names, len(items), shards, args, environment["AWS_ENDPOINT_URL"])
        found: list[list[dict[str, Any]]] = [[] for _ in wanted]
        for turn in range(args.repeats):
            for cell, rounds in zip(wanted, found):
                rounds.append(run_cell(pythons[cell["loader"]], cell, environment))
            yield facts | {"repeats": turn + 1, "rows": together(wanted, found)}


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data/icons-large", help="made with: tools.make_shards icons data/icons-large --size 64")
    parser.add_argument("--shards", type=int, default=16, help="how many of its shards are read, of 1,000 samples each (default 16)")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side that images are resized to (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="times that each is measured (default %(default)s)")
    peers = ["webdataset", "litdata"]
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers, help="who else is measured (default both; empty: nobody)")
    parser.add_argument("--storage", nargs="+", default=["local", "s3"], choices=["local", "s3"], help="where shards lie (default both)")
    parser.add_argument("--mosaic", help="the python of an environment that has mosaicml-streaming; left out without it")
    parser.add_argument("--json", type=Path, help="write all figures there, after each round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for result in compare(Path(work), args):
            save(args.json, result)  # what there is of a run that is cut off
            print(f"after {result['repeats']} rounds\n{report(result['rows'])}", flush=True)


if __name__ == "__main__":
    main()
