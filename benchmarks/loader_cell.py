"""One measurement of one loader in a fresh process: `python -m benchmarks.loader_cell JSON` prints a line of JSON.

Every loader reads the same samples, stored its own way, and hands their bytes to the same decoders and the same collation. A peer is
imported only by its own cell, so that it may live in an environment of its own.
"""

import gc
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipeline.data.decode import Decoder, ImageDecoder, Resize, TextDecoder
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.loader import _Requests, batches
from pipeline.data.skip import SkipConfig
from pipeline.data.sources import DataConfig, SourceConfig, Sources
from pipeline.data.text import BpeTokenizer, train_bpe
from pipeline.data.walk import Walk

BATCH, WINDOW, LANES = 256, 4, 4


def decoders(tokenizer: Path, size: int) -> dict[str, Decoder]:
    """The fields of a small CLIP: a decoded and resized image, a tokenized caption."""
    return {"image": ImageDecoder(size, Resize(size)), "text": TextDecoder(BpeTokenizer(tokenizer, 16))}


def tokenizer(place: Path, path: Path) -> Path:
    """A tokenizer of the captions of our shards, made once."""
    train_bpe(Sources.open(DataConfig(sources=[SourceConfig(url=str(place))], batch=BATCH)).captions(), 2048, path)
    return path


def collate(fields: dict[str, Decoder], items: list[dict[str, bytes]]) -> dict[str, Any]:
    """Bytes -> batch for the loaders that have no place for a decoder."""
    made = {"image": [fields["image"](item["png"], "png", 0) for item in items]}
    made["text"] = [fields["text"](item["txt"], "txt", 0) for item in items]
    return {name: fields[name].collate(values) for name, values in made.items()}


def one_thread(_: int) -> None:
    """For workers of torch's DataLoader."""
    torch.set_num_threads(1)


class Ours:
    """This project's loader. `skip`: 80 % of the candidates were rejected before and are passed over."""

    package = None

    def __init__(self, cell: dict[str, Any], fields: dict[str, Decoder], skip: bool = False) -> None:
        self.cell, self.fields, self.skip = cell, fields, skip
        self.passed = 0  # samples that were skipped before the first batch
        if "://" in cell["place"]:
            importlib.import_module("s3fs")  # not on the clock, as the peers' are not

    def start(self, cache: Path, state: int | None) -> Iterator[Any]:
        """Batches from the beginning, or from a state on; `cache` is an empty folder for what is fetched."""
        config = DataConfig(sources=[SourceConfig(url=self.cell["place"])], batch=BATCH, cache=str(cache))
        sources, first = Sources.open(config), state or 0
        plan = layout(sources.shapes, BATCH, LANES, 1, WINDOW, seed=0)
        lanes, steps = RankLanes(plan, 0, 1), sources.num_samples // BATCH
        requests: Any = _Requests(lanes, first, first + steps)
        if self.skip:
            rule = SkipConfig(share=0.8, after_visits=1).rule(lanes, torch.device("cpu"))
            rule.rejected.fill_(1)
            walk = Walk(lanes, rule, torch.device("cpu"))
            self.passed = walk.begin(0)
            requests = (_next(walk, step) for step in range(steps))
        return iter(batches(Fetch(sources, self.fields, seed=0), requests, self.cell["workers"]))

    def state(self, done: int) -> int:
        """After so many batches; of a later visit, to which nobody reads in order."""
        return 40 * done + done


def _next(walk: Walk, step: int) -> Any:
    rows = walk.next()
    walk.advance(step)
    return rows


class WebDataset:
    """A stream that shuffles in a buffer as large as our window. It has no state: a resume reads what came before again, undecoded."""

    package = "webdataset"

    def __init__(self, cell: dict[str, Any], fields: dict[str, Decoder]) -> None:
        self.cell, self.fields, self.library = cell, fields, importlib.import_module("webdataset")

    def start(self, cache: Path, state: int | None) -> Iterator[Any]:
        """As of Ours."""
        workers, skip = self.cell["workers"], (state or 0) * BATCH // max(1, self.cell["workers"])
        data = self.library.WebDataset(self.cell["urls"], shardshuffle=len(self.cell["urls"]), nodesplitter=None, seed=0)
        data = data.shuffle(WINDOW * self.cell["shard_size"]).slice(skip, sys.maxsize)
        data = data.batched(BATCH, collation_fn=partial(collate, self.fields))
        return iter(DataLoader(data, batch_size=None, num_workers=workers, worker_init_fn=one_thread))

    def state(self, done: int) -> int:
        """How many batches to throw away."""
        return done


class Streaming:
    """What the two libraries of streaming datasets have in common: a loader that tells where it is."""

    def begin(self, data: Any, state: dict | None) -> Iterator[Any]:
        """Batches of their loader over `data`, from `state` on."""
        given = {"batch_size": BATCH, "num_workers": self.cell["workers"], "collate_fn": partial(collate, self.fields)}
        self.loader = self.library.StreamingDataLoader(data, **given)
        if state:
            self.loader.load_state_dict(state)
        return iter(self.loader)

    def state(self, done: int) -> dict:
        """What its loader says of itself."""
        return self.loader.state_dict()


class LitData(Streaming):
    """StreamingDataset and StreamingDataLoader over optimised chunks of as many samples as our shards; shuffles inside chunks."""

    package = "litdata"

    def __init__(self, cell: dict[str, Any], fields: dict[str, Decoder]) -> None:
        self.cell, self.fields, self.library = cell, fields, importlib.import_module("litdata")
        downloads = importlib.import_module("litdata.streaming.downloader")
        downloads._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it speaks HTTPS only, without an option for a server on loopback

    def start(self, cache: Path, state: dict | None) -> Iterator[Any]:
        """As of Ours."""
        remote = {"cache_dir": str(cache)} if "://" in self.cell["place"] else {}
        # its state names the cache folder, and refuses another one unless told so
        data = self.library.StreamingDataset(self.cell["place"], shuffle=True, seed=0, force_override_state_dict=True, **remote)
        return self.begin(data, state)


class Mosaic(Streaming):
    """StreamingDataset and StreamingDataLoader over MDS shards of the size of ours."""

    package = "mosaicml-streaming"

    def __init__(self, cell: dict[str, Any], fields: dict[str, Decoder]) -> None:
        self.cell, self.fields, self.library = cell, fields, importlib.import_module("streaming")

    def start(self, cache: Path, state: dict | None) -> Iterator[Any]:
        """As of Ours."""
        place = self.cell["place"]
        where = {"remote": place, "local": str(cache)} if "://" in place else {"local": place}
        data = self.library.StreamingDataset(**where, shuffle=True, shuffle_seed=0, batch_size=BATCH)
        return self.begin(data, state)


LOADERS: dict[str, Callable[..., Any]] = {
    "ours": Ours,
    "ours, 80 % skipped": partial(Ours, skip=True),
    "webdataset": WebDataset,
    "litdata": LitData,
    "mosaicml-streaming": Mosaic,
}


def memory() -> int:
    """Bytes of this process and its children; a page that several share is shared out among them (PSS)."""
    mine, total = {os.getpid()}, 0
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda found: int(found.name)):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if int(path.name) in mine or parent in mine:
                mine.add(int(path.name))
                lines = (path / "smaps_rollup").read_text().splitlines()
                total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue  # it has ended
    return total


def cpu(who: int = resource.RUSAGE_SELF) -> float:
    """CPU seconds of this process, or of those of its children that have ended."""
    return sum(resource.getrusage(who)[:2])


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """One pass: seconds to the first batch, images/s by the clock (all in all, and after the first batch) and by CPU time, memory; then
    the first batch after a resume at 3/4."""
    loader = LOADERS[cell["loader"]](cell, decoders(Path(cell["tokenizer"]), cell["size"]))
    steps, caches = cell["samples"] // BATCH, [Path(cell["cache"]) / name for name in ("cold", "resumed")]
    for folder in caches:
        folder.mkdir(parents=True)
    gc.collect()
    before, spent, began = memory(), cpu(), time.perf_counter()
    iterator, rows, highest, first, early, state = loader.start(caches[0], None), 0, 0, 0.0, 0, None
    for done, batch in enumerate(iterator, 1):
        rows += len(batch["image"]) if isinstance(batch, dict) else len(batch) + batch.skipped
        if done == 1:
            first, early = time.perf_counter() - began, rows
        if done in (steps // 2, 3 * steps // 4):
            highest = max(highest, memory())
        if done == 3 * steps // 4:
            state = loader.state(done)
    seconds, used = time.perf_counter() - began, cpu() - spent
    del iterator, batch
    gc.collect()  # workers end, and are counted
    used, began = used + cpu(resource.RUSAGE_CHILDREN), time.perf_counter()
    steady = (rows - early) / (seconds - first)
    if "skipped" in cell["loader"]:
        rows, resumed = rows + loader.passed, None
    else:
        iterator = loader.start(caches[1], state)
        next(iterator)
        resumed = time.perf_counter() - began
    found = {"images_per_second": rows / seconds, "steady_images_per_second": steady, "images_per_cpu_second": rows / used}
    found |= {"first_batch_seconds": first, "rows": rows}
    version = importlib.metadata.version(loader_package) if (loader_package := getattr(loader, "package", None)) else None
    return found | {"resumed_first_batch_seconds": resumed, "memory_mib": (highest - before) / 2**20, "version": version}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # threads of a loader that is not read to its end may wait for ever
