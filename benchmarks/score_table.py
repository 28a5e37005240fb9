"""The score table at scale: a rank's share of 1e8 samples on 8 ranks, updated by a batch, saved and read back.

    python -m benchmarks.score_table [--samples 100_000_000] [--ranks 8] [--batch 4096] [--json FILE]

One group of `batch` rows at random places of the table is the worst case: a rank's real groups are smaller, and their rows lie in a few windows
of shards. Bar: update (history look-up, choice and write) in at most 5 ms of CPU.
"""

import argparse
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import interleave, machine, save, summary
from pipeline.data.lanes import RankLanes, SourceShape, layout
from pipeline.data.skip import Rejections, SkipConfig
from pipeline.data.walk import RING, Walk
from pipeline.distributed import checkpoint
from pipeline.distributed.host import Host
from pipeline.selection.base import Candidates, Selector

BAR_MS = 5.0
SHARD, LANES, TURNS = 10_000, 1024, 64


def update(selector: Selector, batch: int, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of a whole choice (which updates the table), and of the update alone."""
    make = torch.Generator().manual_seed(1)
    slots = [torch.randint(len(selector.scores), (batch,), generator=make) for _ in range(TURNS)]
    for slot in slots:
        slot[-batch // 64 :] = slot[: batch // 64]  # twice in a batch, as where a visit ends and the next begins
    groups = [Candidates(slot, torch.rand(len(slot), generator=make), batch // 5, sample=slot, step=i) for i, slot in enumerate(slots)]
    turn = iter(range(10**9))
    calls = {
        "choice and update": lambda: selector.select(groups[next(turn) % TURNS]),
        "update alone": lambda: _write(selector, groups[next(turn) % TURNS]),
    }
    return {name: summary(seconds) for name, seconds in interleave(calls, rounds, warmup=4).items()}


def _write(selector: Selector, group: Candidates) -> None:
    selector.scores.update(group.slot, 100 * group.cosine, momentum=0.9)


def saved(lanes: RankLanes, columns: dict[str, torch.Tensor]) -> dict[str, float]:
    """MB on disk, seconds that training waits for the copy, that the writer's thread works, and that a resume reads."""
    host = Host(keep=True)
    checkpoint.lanes_file(lanes, columns, host)  # its memory is held from save to save
    began = time.perf_counter()
    ((name, write),) = checkpoint.lanes_file(lanes, columns, host).items()
    seconds = {"copy_seconds": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        began = time.process_time()
        write(path)
        seconds["write_cpu_seconds"], began = time.process_time() - began, time.process_time()
        again = checkpoint.read_lanes(Path(folder), lanes)
        seconds["read_cpu_seconds"] = time.process_time() - began
        assert all(torch.equal(again[key], value) for key, value in columns.items())
        return {"mb": path.stat().st_size / 1e6, "bytes_a_sample": path.stat().st_size / lanes.num_samples} | seconds


def _as_if_trained(rule: Rejections, walk: Walk) -> None:
    """Rejections in a row from 0 to 20, the fewer the longer, a tenth of the samples never; and bits of eight visits, each of its own draw."""
    make, count = torch.Generator().manual_seed(2), len(rule.rejected)
    rule.rejected.copy_((1 + torch.empty(count).exponential_(1 / 5, generator=make)).clamp_(max=20))
    rule.rejected[torch.rand(count, generator=make) < 0.1] = 0
    often = rule.rejected >= rule.config.after_visits
    for bit in range(RING):
        skipped = (often & (torch.rand(count, generator=make) < 1 - 1 / rule.config.rescore_visits)).numpy()
        walk.bits |= skipped.astype(np.uint8) << np.uint8(bit)


def run(samples: int, ranks: int, batch: int, rounds: int) -> dict[str, Any]:
    """The figures of rank 0."""
    edges = np.append(np.arange(0, samples, SHARD), samples)
    began = time.process_time()
    lanes = RankLanes(layout([SourceShape(edges, 1.0)], LANES * 32, LANES, ranks, 4, seed=0), 0, ranks)
    result: dict[str, Any] = {
        "benchmark": "score_table",
        "machine": machine(),
        "samples": samples,
        "ranks": ranks,
        "rows": lanes.num_samples,
    }
    result["lanes_cpu_seconds"] = time.process_time() - began
    selector = importlib.import_module("pipeline.selection.dissect").Config(variant="momentum").build(num_samples=lanes.num_samples)
    selector.scores.visits.fill_(3)
    selector.scores.score.normal_(30, 8, generator=torch.Generator().manual_seed(0))
    result |= {"batch": batch, "bar_ms": BAR_MS, "times": update(selector, batch, rounds)}
    result["checkpoint"] = saved(lanes, selector.state_dict())
    rule = SkipConfig().rule(lanes, torch.device("cpu"))
    walk = Walk(lanes, rule, torch.device("cpu"))
    _as_if_trained(rule, walk)
    began = time.process_time()
    walk.begin(0)
    result["skip"] = {
        "enter_a_visit_cpu_seconds": time.process_time() - began,
        "skipped_share": 1 - float(walk._count[0].sum()) / lanes.num_samples,
    }
    selector.scores.visits.random_(3, 21, generator=torch.Generator().manual_seed(3))  # a sample that is skipped is scored less often
    steps = interleave({"a step": lambda: (walk.next(), walk.advance(0))}, min(rounds, 50))
    result["skip"] |= {"step": summary(steps["a step"]), "checkpoint": saved(lanes, selector.state_dict() | walk.columns())}
    return result


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_table", description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args.samples, args.ranks, args.batch, args.rounds)
    print(f"{result['rows']:,} rows, {args.batch} updated: CPU ms, median (p20 to p80); bar {BAR_MS}")
    for name, row in result["times"].items():
        print(f"  {name:20s} {row['p50_ms']:8.3f} ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})")
    for name, found in (("checkpoint", result["checkpoint"]), ("with skip bits", result["skip"]["checkpoint"])):
        print(f"  {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()))
    print(
        f"  skip: entering a visit of all lanes {result['skip']['enter_a_visit_cpu_seconds']:.1f} s, a step {result['skip']['step']['p50_ms']:.2f} ms"
    )
    save(args.json, result)


if __name__ == "__main__":
    main()
