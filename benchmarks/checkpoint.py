"""What a checkpoint costs: bytes, stall, duration, and steps beside it against model size; and the time to the first step after a restart.

    python -m benchmarks.checkpoint [--sizes 5 25 100] [--ranks 1 2] [--data data/icons/train] [--repeats 5] [--restarts 3]
        [--json FILE]

Every figure is wall time of rank 0, which writes the most; the ways of saving take turns in one process that trains a ViT and a text
transformer with AdamW: this project's save beside training and with training waiting, torch.save of the same tensors (and fsync), and
torch.distributed.checkpoint.async_save. Ours alone hashes what it wrote. Two ranks are gloo processes of this machine with ZeRO-2. The
floor is the rank's bytes at the bandwidth of one memcpy into touched memory, and of one sequential write with fsync.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import async_save

from benchmarks.common import machine, save

CONFIG = Path(__file__).parent.parent / "configs" / "pretrain" / "debug.yaml"
SIZES = {5: (256, 3), 25: (512, 4), 100: (768, 7), 300: (1024, 12)}  # millions of parameters: width and layers of both towers
STEPS_ALONE = 3  # before every save


def command(folder: Path, data: str, size: int, ranks: int) -> list[str]:
    """The configuration of a run, as overrides."""
    width, layers = SIZES[size]
    tower = (
        f"{{name: open_clip, tokenizer: {{kind: bpe, vocab_size: 512}}, model: {{embed_dim: {width}, "
        f"vision_cfg: {{image_size: 32, patch_size: 8, width: {width}, layers: {layers}, head_width: 64}}, "
        f"text_cfg: {{context_length: 16, width: {width}, heads: {width // 64}, layers: {layers}}}}}}}"
    )
    return [
        f"out={folder}",
        f"data.sources=[{{url: {data}}}]",
        "data.batch=16",
        f"towers.student={tower}",
        "selector={name: random, rate: 0.5}",
        "visits=null",
        "steps=1000000",
        "optimizer.lr=0.0001",
        "record.log_every=1000000",
        "evaluation.data=null",
        "engine.threads=1",
        f"engine.zero={'null' if ranks == 1 else '{stage: 2}'}",
    ]


class Ways:
    """One trainer, and the ways to save what it holds. Each gives (stall, duration, seconds of the steps beside it)."""

    def __init__(self, trainer: Any) -> None:
        from pipeline.distributed.checkpoint import CheckpointConfig
        from pipeline.distributed.saver import Saver

        self.trainer, self.comm, self.folder = trainer, trainer.engine.comm, trainer.folder
        self.waiting = Saver(CheckpointConfig(asynchronous=False, keep=1), self.folder / "waiting", self.comm)
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        trainer.record.start(0, trainer.progress)
        self.step()

    def step(self) -> float:
        """Seconds of one step of training."""
        began = time.perf_counter()
        self.trainer.train_step()
        return time.perf_counter() - began

    def beside(self, busy: Callable[[], bool]) -> list[float]:
        """Trains while a save is under way on any rank."""
        steps = []
        while self.comm.any(busy()):
            steps.append(self.step())
        return steps

    def ours(self) -> tuple[float, float, list[float]]:
        saver = self.trainer.saver
        began = time.perf_counter()
        self.trainer.save()
        stall = time.perf_counter() - began
        steps = self.beside(saver.busy)
        return stall, saver.wait().seconds, steps

    def ours_waiting(self) -> tuple[float, float, list[float]]:
        began = time.perf_counter()
        step = self.trainer.progress.step
        self.waiting.save(step, self.trainer.facts, self.trainer.files, lambda: self.trainer.record.flush(step))
        stall = time.perf_counter() - began
        return stall, stall, []

    def tensors(self) -> dict[str, Any]:
        """The same as ours: rank 0 the weights, every rank the moments that it updates."""
        engine = self.trainer.engine
        moments = {
            f"{moment}|{part.name}|{part.start}": part.of(engine.optimizer.state[part.key][moment])
            for part in engine.parts
            for moment in ("exp_avg", "exp_avg_sq")
        }
        return moments | (dict(engine.raw.state_dict()) if self.comm.rank == 0 else {})

    def torch_save(self) -> tuple[float, float, list[float]]:
        self.comm.barrier()
        began = time.perf_counter()
        with (self.folder / f"peer-{self.comm.rank}.pt").open("wb") as file:
            # clones: several moments are views of one tensor, which torch.save would write whole for each of them
            torch.save({name: tensor.clone() for name, tensor in self.tensors().items()}, file)
            file.flush()
            os.fsync(file.fileno())
        self.comm.barrier()
        stall = time.perf_counter() - began
        return stall, stall, []

    def dcp_async(self) -> tuple[float, float, list[float]]:
        if self.comm.rank == 0:
            shutil.rmtree(self.folder / "peer-dcp", ignore_errors=True)
        self.comm.barrier()
        began = time.perf_counter()
        future = async_save(self.tensors(), checkpoint_id=self.folder / "peer-dcp", process_group=self.group, no_dist=self.group is None)
        stall = time.perf_counter() - began
        ended: list[float] = []
        future.add_done_callback(lambda _: ended.append(time.perf_counter()))
        steps = self.beside(lambda: not future.done())
        future.result()
        return stall, ended[0] - began, steps


def floor(size: int, folder: Path) -> dict[str, float]:
    """Seconds that this many bytes take in one memcpy into touched memory, and in one sequential write with fsync."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    began = time.perf_counter()
    target.copy_(source)
    copied = time.perf_counter()
    with (folder / "floor").open("wb", buffering=0) as file:
        view, at = memoryview(target.numpy()), 0
        while at < size:
            at += file.write(view[at : at + (8 << 20)])
        os.fsync(file.fileno())
    return {"memcpy": copied - began, "write": time.perf_counter() - copied}


def measure(folder: Path, data: str, size: int, ranks: int, repeats: int) -> dict[str, Any]:
    """On every rank: all ways of saving in turn, then what resuming reads."""
    from pipeline.config import load
    from pipeline.distributed import checkpoint
    from pipeline.run import RunConfig, build

    trainer, _ = build(load(RunConfig, CONFIG, command(folder, data, size, ranks)))
    ways = Ways(trainer)
    every: dict[str, list[tuple[float, float, list[float]]]] = {
        "ours": [],
        "ours_waiting": [],
        "torch_save": [],
        "dcp_async": [],
    }
    alone, floors, bytes_here = [], [], sum(t.numel() * t.element_size() for t in ways.tensors().values())
    first = ways.ours()[0]  # touches the host memory that later saves use again
    for _ in range(repeats):
        for name, found in every.items():
            alone += [ways.step() for _ in range(STEPS_ALONE)]
            found.append(getattr(ways, name)())
        floors.append(floor(bytes_here, folder))
    newest = sorted(folder.glob("checkpoints/*/COMMIT"))[-1].parent
    began = time.perf_counter()
    checkpoint.verify(newest)
    verified = time.perf_counter()
    trainer.engine.load(newest)
    loaded = time.perf_counter()
    median = statistics.median
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in trainer.engine.raw.parameters()),
        "bytes_rank_0": bytes_here,
        "bytes_all": sum(path.stat().st_size for path in newest.iterdir()),
        "first_stall": first,
        "step_alone": median(alone),
        "floor": {name: median(f[name] for f in floors) for name in ("memcpy", "write")},
        "verify": verified - began,
        "read": loaded - verified,
    }
    for name, found in every.items():
        steps = [step for _, _, steps in found for step in steps]
        result[name] = {
            "stall": median(f[0] for f in found),
            "duration": median(f[1] for f in found),
            "stall_share": median(f[0] / f[1] for f in found),
            "stall_over_ours": median(f[0] / o[0] for f, o in zip(found, every["ours"])),
            "duration_over_ours": median(f[1] / o[1] for f, o in zip(found, every["ours"])),
            "steps_beside": len(steps),
            "slowdown_of_steps": median(steps) / result["step_alone"] if steps else None,
            "all": [f[:2] for f in found],
        }
    return result


def restart(folder: Path, data: str, size: int, ranks: int) -> dict[str, float]:
    """A start of the same command up to the end of its first step; seconds by what they went into, with all imports in `import`."""
    began, seconds = float(os.environ["BEGAN"]), {}
    from pipeline.config import load
    from pipeline.data.sources import Sources
    from pipeline.distributed import checkpoint
    from pipeline.distributed.engine import Engine
    from pipeline.run import RunConfig, build

    def clocked(owner: Any, name: str, what: str) -> None:
        inner = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            start = time.time()
            value = inner(*given, **named)
            seconds[what] = seconds.get(what, 0.0) + time.time() - start
            return value

        setattr(owner, name, call)

    config = load(RunConfig, CONFIG, command(folder, data, size, ranks))
    seconds["import"] = time.time() - began
    for owner, name, what in ((Sources, "open", "open_data"), (checkpoint, "newest", "verify"), (Engine, "load", "load")):
        clocked(owner, name, what)
    start = time.time()
    trainer, _ = build(config)
    if not trainer.progress.step:
        raise RuntimeError(f"{folder}: there was no checkpoint to go on from")
    seconds["build"] = time.time() - start - sum(seconds[name] for name in ("open_data", "verify", "load"))
    trainer.record.start(trainer.progress.step, trainer.progress)
    before = dict(trainer.progress.seconds)  # of the run so far
    trainer.train_step()
    spent = {name: value - before[name] for name, value in trainer.progress.seconds.items()}
    seconds |= {"all": time.time() - began, "first_batch": spent["data"], "first_step": spent["score"] + spent["train"]}
    return seconds


def on_ranks(what: str, folder: Path, args: argparse.Namespace, size: int, ranks: int) -> dict[str, Any]:
    """Runs `measure` or `restart` in fresh processes; gives what rank 0 found."""
    mine = ["-m", "benchmarks.checkpoint", "--on-rank", what, "--folder", str(folder), "--sizes", str(size), "--ranks", str(ranks)]
    mine += ["--data", args.data, "--repeats", str(args.repeats)]
    world = (
        []
        if ranks == 1
        else ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    )
    subprocess.run([sys.executable, *world, *mine], check=True, env=os.environ | {"BEGAN": str(time.time())})
    return json.loads((folder / f"{what}.json").read_text(encoding="utf-8"))


def on_rank(what: str, folder: Path, args: argparse.Namespace) -> None:
    """In such a process."""
    from pipeline.distributed.launch import shutdown

    call = measure(folder, args.data, args.sizes[0], args.ranks[0], args.repeats) if what == "measure" else None
    found = call or restart(folder, args.data, args.sizes[0], args.ranks[0])
    if os.environ.get("RANK", "0") == "0":
        (folder / f"{what}.json").write_text(json.dumps(found), encoding="utf-8")
    shutdown()


def main() -> None:
    """Prints a line for each size and writes the JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[5, 25, 100], choices=SIZES, help="millions of parameters")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--data", default="data/icons/train", help="made with: make data")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--restarts", type=int, default=3)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--on-rank", help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help="where to save; default: a temporary folder, whose disk is what is measured")
    args = arguments.parse_args()
    if args.on_rank:
        return on_rank(args.on_rank, args.folder, args)
    cells = []
    for ranks in args.ranks:
        for size in args.sizes:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                found = on_ranks("measure", Path(folder), args, size, ranks)
                starts = [on_ranks("restart", Path(folder), args, size, ranks) for _ in range(args.restarts)]
            found["restart"] = {name: statistics.median(start[name] for start in starts) for name in starts[0]}
            cells.append({"size": size, "ranks": ranks, "load": os.getloadavg()[0]} | found)
            ours, waiting, peer = found["ours"], found["ours_waiting"], found["torch_save"]
            print(
                f"{size} M on {ranks}: {found['bytes_all'] / 1e6:.0f} MB; stall {ours['stall']:.3f} of {ours['duration']:.2f} s "
                f"({ours['stall_share']:.1%}), waiting {waiting['stall']:.2f} s, torch.save {peer['stall']:.2f} s, "
                f"dcp {found['dcp_async']['stall']:.3f} of {found['dcp_async']['duration']:.2f} s; "
                f"steps beside x {ours['slowdown_of_steps'] or float('nan'):.2f}; verify and load {found['verify'] + found['read']:.2f} s, "
                f"restart {found['restart']['all']:.1f} s",
                flush=True,
            )
            save(args.json, {"cells": cells} | machine(["safetensors", "deepspeed"]))


if __name__ == "__main__":
    main()
