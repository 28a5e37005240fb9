"""Images a second of this loader against webdataset on the same shards: same decoders, same collation, same workers, same shuffle.

    python -m benchmarks.loader [--data data/icons-large] [--workers 2] [--repeats 7] [--json FILE]

Both read every sample once per repeat, from the page cache, in turn. Also: the first batch after a resume deep in an epoch against
the first batch of a cold start, each in a fresh set of workers.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks.common import machine, save
from pipeline.data.decode import Decoder, ImageDecoder, Resize, TextDecoder
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.loader import _Requests, batches
from pipeline.data.sources import DataConfig, SourceConfig, Sources
from pipeline.data.text import BpeTokenizer, train_bpe

BATCH, WINDOW, LANES = 256, 4, 4


def decoders(sources: Sources, folder: Path, size: int) -> dict[str, Decoder]:
    """The fields of a small CLIP: a decoded and resized image, a tokenized caption."""
    tokenizer = folder / "benchmark-tokenizer.json"
    if not tokenizer.exists():
        train_bpe(sources.captions(), 2048, tokenizer)
    return {"image": ImageDecoder(size, Resize(size)), "text": TextDecoder(BpeTokenizer(tokenizer, 16))}


def ours(sources: Sources, fields: dict[str, Decoder], workers: int, start: int, steps: int) -> Iterator[Any]:
    """The batches of this project's loader from step `start` on."""
    plan = layout(sources.shapes, BATCH, LANES, 1, WINDOW, seed=0)
    return iter(batches(Fetch(sources, fields, seed=0), _Requests(RankLanes(plan, 0, 1), start, steps), workers))


def theirs(sources: Sources, fields: dict[str, Decoder], workers: int) -> Iterator[Any]:
    """webdataset: stream, shuffle in a buffer as large as our window, decode and collate with the very same decoders."""
    urls = [str(shard) for index in sources.indices for shard in index.shards]
    buffer = WINDOW * sources.num_samples // len(urls)

    def decode(sample: dict) -> dict:
        return {name: fields[name](sample[ext], ext, 0) for name in fields for ext in fields[name].extensions if ext in sample}

    def collate(items: list[dict]) -> dict:
        return {name: fields[name].collate([item[name] for item in items]) for name in fields}

    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, seed=0)
        .shuffle(buffer)
        .map(decode)
        .batched(BATCH, collation_fn=collate)
    )
    return iter(DataLoader(data, batch_size=None, num_workers=workers, worker_init_fn=lambda _: torch.set_num_threads(1)))


def in_turn(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every measure once per repeat, after one round that is thrown away: noise of the machine then meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(-1, repeats):
        for name, measure in measures.items():
            value = measure()
            if turn >= 0:
                found[name].append(value)
    return found


def images_per_second(make: Callable[[], Iterator[Any]]) -> float:
    """One pass over all samples, the start of the workers included; batches are counted by their rows."""
    began, rows = time.perf_counter(), 0
    for batch in make():
        rows += len(batch["image"] if isinstance(batch, dict) else batch)
    return rows / (time.perf_counter() - began)


def first_batch_seconds(make: Callable[[], Iterator[Any]]) -> float:
    """From nothing to the first batch: lanes, workers, reading, decoding."""
    gc.collect()
    began = time.perf_counter()
    iterator = make()
    next(iterator)
    seconds = time.perf_counter() - began
    del iterator
    return seconds


def main() -> None:
    """Prints the table and writes the JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", default="data/icons-large", help="made with: tools.make_shards icons data/icons-large --size 64")
    arguments.add_argument("--size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--json", type=Path)
    args = arguments.parse_args()
    sources = Sources.open(DataConfig(sources=[SourceConfig(url=args.data)], batch=BATCH))
    fields = decoders(sources, Path(args.data), args.size)
    steps = sources.num_samples // BATCH
    speeds = in_turn(
        {
            "ours": lambda: images_per_second(lambda: ours(sources, fields, args.workers, 0, steps)),
            "webdataset": lambda: images_per_second(lambda: theirs(sources, fields, args.workers)),
        },
        args.repeats,
    )
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["webdataset"])]
    deep = 40 * steps + steps * 3 // 4
    starts = in_turn(
        {
            "cold": lambda: first_batch_seconds(lambda: ours(sources, fields, args.workers, 0, steps)),
            "resume": lambda: first_batch_seconds(lambda: ours(sources, fields, args.workers, deep, deep + steps)),
        },
        args.repeats,
    )
    middle = {name: sorted(values)[len(values) // 2] for name, values in (speeds | starts).items()}
    result = {
        "images_per_second": speeds,
        "ratio_to_webdataset": {"median": sorted(ratios)[len(ratios) // 2], "smallest": min(ratios), "all": ratios},
        "first_batch_seconds": starts,
        "resume_over_cold": middle["resume"] / middle["cold"],
        "settings": {"samples": sources.num_samples, "size": args.size, "workers": args.workers, "batch": BATCH, "window_shards": WINDOW},
    }
    print(
        f"ours {middle['ours']:.0f} images/s, webdataset {middle['webdataset']:.0f}; ratio median {result['ratio_to_webdataset']['median']:.2f}, smallest {min(ratios):.2f}"
    )
    print(
        f"first batch: cold {middle['cold']:.3f} s, resumed at step {deep} {middle['resume']:.3f} s, ratio {result['resume_over_cold']:.2f}"
    )
    save(args.json, result | machine(["webdataset", "pillow"]))


if __name__ == "__main__":
    main()
