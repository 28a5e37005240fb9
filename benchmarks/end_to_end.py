"""Candidates a second of whole training steps: loading, scoring, choosing, training, recording. Full training, the published procedure, ours.

    python -m benchmarks.end_to_end --rate 0.2 [--data data/icons/train] [--batch 1024] [--image-size 32] [--rounds 20] [--json FILE]
    python -m benchmarks.end_to_end --rate 0.5 --ours "as trained" "every 4, reuse" --rounds 5

The tiny ViT of configs/pretrain/icons.yaml, after warm-up, one thread and loading in the same process, so that on a CPU its time is all of
it. With a GPU everybody trains there, loading is part of the step still, and it is wall time that says something: a step ends when the GPU has done it.
Everybody takes one step per round, in turn; ratios are medians over rounds of the ratio within a round. Every contender reads the same
shards through the same decoders. `floor` is what is left if only the matrix products of towers cost anything: (scoring + 3 rate) / 3.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, ratio, save, summary
from benchmarks.loops import FullLoop, PublishedLoop
from pipeline.config import load
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.loader import _Requests, batches
from pipeline.data.sources import Sources
from pipeline.run import RunConfig, build, make_decoders
from pipeline.trainer import Trainer
from pipeline.types import Batch

ICONS = Path(__file__).parent.parent / "configs" / "pretrain" / "icons.yaml"
STEPS = 1_000_000
# what a run may set beside `selector.rate`; {half} is half of the images' size
OURS: dict[str, tuple[str, ...]] = {
    "as trained": (),
    "half the patches": ("scoring.patches=0.5",),
    "half size": ("scoring.image_size={half}",),
    "every 2": ("scoring.every=2",),
    "every 2, half size": ("scoring.every=2", "scoring.image_size={half}"),
    "every 4": ("scoring.every=4",),
    "every 4, reuse": ("scoring.every=4", "scoring.reuse=true"),
    "ahead": ("scoring.ahead=true",),
    "every 4, ahead": ("scoring.every=4", "scoring.ahead=true"),
}


def configuration(args: argparse.Namespace, out: Path, *overrides: str) -> RunConfig:
    """The demo's run on one thread, nothing evaluated or saved on the way."""
    common = [
        f"out={out}", f"data.sources=[{{url: {args.data}}}]", f"data.batch={args.batch}", f"data.lanes={args.batch // 8}", "data.workers=0",
        "evaluation.data=null", f"steps={STEPS}", "visits=null", f"engine.precision={args.precision}", "selector.warmup_visits=0",
        f"towers.student.model.vision_cfg.image_size={args.image_size}",
    ]  # fmt: skip
    return load(RunConfig, ICONS, [*common, *(override.format(half=args.image_size // 2) for override in overrides)])


def ours(args: argparse.Namespace, out: Path, *overrides: str) -> Trainer:
    """A run's trainer, ready for train_step()."""
    trainer, _ = build(configuration(args, out, *overrides))
    trainer.record.start(0, trainer.progress)
    trainer.record._bar.disable = True
    return trainer


def stream(args: argparse.Namespace, folder: Path) -> tuple[Iterator[Batch], int]:
    """The batches that the plain loops take, from the shards and decoders of a run in `folder`."""
    config = configuration(args, folder)
    sources = Sources.open(config.data)
    plan = layout(sources.shapes, args.batch, config.data.lanes, config.data.groups, config.data.window, 0)
    fetch = Fetch(sources, make_decoders(config, folder, train=True), 0)
    return batches(fetch, _Requests(RankLanes(plan, 0, 1), 0, STEPS), 0), sources.num_samples


def contenders(args: argparse.Namespace, top: Path) -> tuple[dict[str, Callable[[], int]], dict[str, Trainer]]:
    """Name -> one step, and the trainers behind ours."""
    trainers = {"full": ours(args, top / "full", "selector.name=keep_all")}
    trainers |= {"random": ours(args, top / "random", "selector.name=random", f"selector.rate={args.rate}")}
    for name in args.ours:
        trainers[f"ours, {name}"] = ours(args, top / name.replace(" ", "-"), f"selector.rate={args.rate}", *OURS[name])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    config = configuration(args, top / "full")

    def tower() -> torch.nn.Module:
        torch.manual_seed(0)
        return config.towers["student"].build(top / "full").to(trainers["full"].engine.device)

    (plain, samples), (published, _) = stream(args, top / "full"), stream(args, top / "full")
    steps: dict[str, Callable[[], int]] = {"plain loop": FullLoop(tower(), plain, dtype).step}
    steps["published"] = PublishedLoop(tower(), published, dtype, args.rate, samples).step
    return steps | {name: trainer.train_step for name, trainer in trainers.items()}, trainers


def measure(steps: dict[str, Callable[[], int]], rounds: int, warmup: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall seconds of every step."""
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-warmup, rounds):
        for name, step in steps.items():
            began = time.process_time(), time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                cpu[name].append(time.process_time() - began[0])
                wall[name].append(time.perf_counter() - began[1])
    return cpu, wall


def floors(trainers: dict[str, Trainer], rate: float) -> dict[str, float]:
    """Share of full training's FLOP that a step has, by name."""
    found = {"full": 1.0, "random": rate}
    for name, trainer in trainers.items():
        if name.startswith("ours"):
            forward, scoring, _ = trainer.record.flops
            found[name] = scoring / forward / 3 / trainer.scoring.config.every + rate
    return found


def report(args: argparse.Namespace, cpu: dict[str, list[float]], wall: dict[str, list[float]], floor: dict[str, float]) -> dict[str, Any]:
    """Prints the table; gives what is saved."""
    rows: dict[str, Any] = {}
    print(f"rate {args.rate}, batch {args.batch}, {args.precision}: candidates a second of CPU, times full training and published")
    for name, seconds in cpu.items():
        row = {
            "candidates_per_cpu_second": args.batch / statistics.median(seconds),
            "candidates_per_second": args.batch / statistics.median(wall[name]),
            "times_full": ratio(cpu["full"], seconds),
            "times_full_wall": ratio(wall["full"], wall[name]),
            "times_published": ratio(cpu["published"], seconds),
            "flop_floor_times_full": 1 / floor[name] if name in floor else None,
        }
        rows[name] = row | summary(seconds)
        limit = f"FLOP alone {row['flop_floor_times_full']:.2f}" if name in floor else ""
        print(
            f"  {name:24s} {row['candidates_per_cpu_second']:7.0f}  {row['times_full']:5.2f} full (wall {row['times_full_wall']:.2f})"
            f"  {row['times_published']:5.2f} published  {limit}"
        )
    return rows


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.2, help="share of the candidates that is trained (default %(default)s)")
    parser.add_argument("--data", default="data/icons/train", help="shards of images and texts, made by `make data` (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="candidates of a step (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels of a side (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that are measured (default %(default)s)")
    parser.add_argument(
        "--ours", nargs="+", choices=list(OURS), default=list(OURS), metavar="OPTIONS", help=f"which of: {'; '.join(OURS)} (default all)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of towers (default %(default)s)")
    parser.add_argument("--json", help="write all figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        steps, trainers = contenders(args, Path(top))
        for trainer in trainers.values():
            if trainer.scoring.config.every > 1:  # in a first visit all are scored, whatever the options
                for _ in range(-(-trainer.data.lanes.num_samples // args.batch)):
                    trainer.train_step()
        cpu, wall = measure(steps, args.rounds, 1)
        rows = report(args, cpu, wall, floors(trainers, args.rate))
        parts = {name: trainer.progress.seconds for name, trainer in trainers.items()}
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    result = {"benchmark": "end_to_end", "machine": machine(["open_clip_torch", "accelerate"]), "settings": settings, "steps": rows}
    save(args.json, result | {"seconds_by_phase": parts, "cpu_seconds": cpu})


if __name__ == "__main__":
    main()
