"""The table of rho_loss: every training pair's contrastive loss under a model that was trained on other pairs.

    python -m tools.irreducible_loss RUN TABLE.parquet [--data URL ...] [--group 64] [--rounds 4]

RUN is a finished run of a small model on held-out pairs; --data names the shards that the table is for, in the order of the
data.sources of the run that will select (default: those that RUN was trained on, which measures memorising as well).
One process does it: of several ranks the first alone.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.loader import batches
from pipeline.data.sources import DataConfig, Sources
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.comm import leads
from pipeline.hashing import hash_ids
from pipeline.kernels import clip_loss
from pipeline.run import TrainedRun
from pipeline.selection.rho_loss import INDEX


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m tools.irreducible_loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("run", type=Path, help="the run folder of the reference model")
    top.add_argument("table", type=Path, help="the Parquet file to write")
    top.add_argument("--data", nargs="+", help="folders that hold index.parquet, any fsspec URL")
    top.add_argument("--group", type=int, default=64, help="pairs that are each other's negatives: the selection group's size")
    top.add_argument("--rounds", type=int, default=4, help="random groupings that are averaged")
    top.add_argument("--workers", type=int, default=2, help="loader processes")
    return top


@torch.inference_mode()
def losses(run: TrainedRun, sources: Sources, group: int, rounds: int, workers: int) -> np.ndarray:
    """float32 [N]: the mean loss of each sample over `rounds` random groupings; the mean over all where a sample cannot be decoded."""
    total, count = np.zeros(sources.num_samples), np.zeros(sources.num_samples)
    fetch = Fetch(sources, run.decoders, seed=None)
    for turn in range(rounds):
        order = np.argsort(hash_ids(turn, np.arange(sources.num_samples)), kind="stable")
        parts = np.array_split(order, max(1, len(order) // group))
        for batch in batches(fetch, [Rows(part, part, np.zeros_like(part)) for part in parts], workers):
            batch = batch.to(run.device)
            found = run.encode(batch)
            one = clip_loss(found["image"], found["text"], found["scale"], weights=batch.valid.float()).per_sample
            good = batch.valid.cpu().numpy() & np.isfinite(one.cpu().numpy())
            at = batch.sample.cpu().numpy()[good]
            total[at] += one.cpu().numpy()[good]
            count[at] += 1
    if not count.any():
        raise DataError("no sample could be decoded; look at the shards with tools.check_shards --decode")
    return np.where(count > 0, total / np.maximum(count, 1), total.sum() / count.sum()).astype(np.float32)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(arguments)
    if not leads():
        return 0
    try:
        run = TrainedRun(args.run)
        data = run.config.data
        if args.data:
            data = DataConfig.model_validate(data.model_dump() | {"sources": [{"url": url} for url in args.data]})
        sources = Sources.open(data)
        found = losses(run, sources, args.group, args.rounds, args.workers)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.table.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"sample": np.arange(len(found)), "loss": found}, metadata={INDEX: sources.digest})
    pq.write_table(table, args.table)
    print(f"{args.table}: {len(found)} samples, irreducible loss {found.mean():.3f} on average, {found.std():.3f} standard deviation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
