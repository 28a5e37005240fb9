"""What a teacher costs: a step of plain finetuning, with a cached, a live and an online teacher, and inference by the student alone.

The digits' shards with both views drawn large, a ViT student and a teacher of 2.5 times its work. One process, no loader workers: reading and decoding are
in the figures. CPU seconds of the process, the methods in turn within each round; an overhead is the median over rounds of the ratio.
"""

import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks.common import interleave, machine, ratio, save, summary
from pipeline.config import parse, to_yaml
from pipeline.run import RunConfig, build
from pipeline.trainer import Trainer
from pipeline.types import Selection
from tools.cache_teacher import main as cache_teacher
from tools.make_shards import main as make_shards

BATCH, SIZE, STEPS = 64, 64, 10_000
VIT = {"name": "image", "arch": "vit", "image_size": SIZE, "patch": 8, "classes": 10}
STUDENT = VIT | {"field": "image", "width": 128, "layers": 4, "embed_dim": 256}
TEACHER = VIT | {"field": "clean", "width": 192, "layers": 6, "embed_dim": 512}
FUSED = {"name": "fusion", "inputs": {"image": STUDENT, "clean": STUDENT | {"field": "clean"}}, "embed_dim": 256, "classes": 10}
CE = {"name": "cross_entropy", "feature": "logits"}
KD = {
    "ce": CE,
    "logits": {"name": "logit_kd", "teacher": "big.logits"},
    "features": {"name": "feature_kd", "teacher": "big.embedding", "projector": "linear", "student_width": 256, "teacher_width": 512},
}
AMID = {
    "ce": CE,
    "teacher": CE | {"feature": "teacher.logits"},
    "auxiliary": CE | {"feature": "auxiliary.logits"},
    "amid": {"name": "amid", "student_width": 256, "teacher_width": 256, "auxiliary_width": 256},
}


def make(shards: Path, out: Path, **given: Any) -> RunConfig:
    """The configuration of one method."""
    values = {
        "out": str(out),
        "steps": STEPS,
        "data": {"sources": [{"url": str(shards)}], "batch": BATCH, "groups": 1, "workers": 0, "classes": 10},
        "towers": {"student": STUDENT},
        "objectives": {"ce": CE},
        "selector": {"name": "keep_all"},
        "engine": {"precision": "fp32", "threads": 1},
    }
    return parse(RunConfig, values | given, "benchmark")


def trainer_of(config: RunConfig) -> Trainer:
    """A trainer beside others in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with contextlib.redirect_stdout(None):
        trainer, trainer.lock = build(config)
    return trainer


def step_of(trainer: Trainer) -> Callable[[], None]:
    """One turn of the trainer's loop without the record."""

    def step() -> None:
        batch = trainer.data.next()
        chosen, _ = trainer.selector.select(batch, None, trainer.progress.step)
        taught = trainer.teachers(batch.take(chosen.rows))
        trainer.engine.step(taught, Selection(chosen.rows, chosen.weights), trainer.progress.step)
        trainer.progress.step += 1

    return step


def methods(folder: Path, shards: Path) -> dict[str, RunConfig]:
    """The configurations, with a teacher that was saved and cached."""
    first = trainer_of(make(shards, folder / "teacher", towers={"student": TEACHER}, checkpoint={"asynchronous": False}))
    step_of(first)()
    first.save()
    live = {"big": {"name": "live", "run": str(folder / "teacher")}}
    taught = make(shards, folder / "live", objectives=KD, teachers=live)
    (folder / "live.yaml").write_text(to_yaml(taught), encoding="utf-8")
    if cache_teacher([str(folder / "live.yaml"), str(folder / "cache"), "--workers", "0"]):
        raise RuntimeError("the teacher was not cached")
    towers = {"student": STUDENT, "teacher": FUSED, "auxiliary": STUDENT | {"field": "clean"}}
    return {
        "no teacher": make(shards, folder / "plain"),
        "cached": make(shards, folder / "cached", objectives=KD, teachers={"big": {"name": "cached", "path": str(folder / "cache")}}),
        "live": taught,
        "online, AMID": make(shards, folder / "online", towers=towers, objectives=AMID),
    }


def inference(trainers: dict[str, Trainer]) -> dict[str, Callable[[], Any]]:
    """The student's forward on a batch, taken from the run with a cached teacher; and all towers of AMID's run, for comparison."""
    batch = trainers["online, AMID"].data.next()
    alone = {"image": batch.fields["image"]}
    student = trainers["cached"].engine.raw.towers["student"].eval()
    whole = trainers["online, AMID"].engine.raw.eval()

    def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return call()

        return run

    return {"student alone": quiet(lambda: student(alone)), "with teacher and auxiliary": quiet(lambda: whole(batch, "features"))}


def report(rounds: int, path: str | None) -> int:
    """Prints the table and writes it."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as made_up:
        folder = Path(made_up)
        options = ["--num-train", "640", "--shard-size", "500", "--workers", "1"]
        if make_shards(["digits", str(folder / "shards"), *options]):
            raise RuntimeError("the shards were not made")
        trainers = {name: trainer_of(config) for name, config in methods(folder, folder / "shards").items()}
        times = interleave({name: step_of(trainer) for name, trainer in trainers.items()}, rounds, warmup=3)
        forwards = interleave(inference(trainers), rounds, warmup=3)
    rows = {}
    for name, seconds in times.items():
        over = 100 * (ratio(seconds, times["no teacher"]) - 1)
        rows[name] = summary(seconds) | {"samples_per_second": BATCH / statistics.median(seconds), "over_no_teacher_percent": over}
        print(f"{name:28}{rows[name]['p50_ms']:9.1f} ms a step{rows[name]['samples_per_second']:9.0f} samples/s{over:+8.1f} %")
    for name, seconds in forwards.items():
        rows[name] = summary(seconds) | {"samples_per_second": BATCH / statistics.median(seconds)}
        print(f"{name:28}{rows[name]['p50_ms']:9.1f} ms a batch{rows[name]['samples_per_second']:8.0f} samples/s")
    holds = rows["cached"]["over_no_teacher_percent"] <= 10
    print(f"a cached teacher costs at most 10 % over none: {'holds' if holds else 'FAILS'}")
    facts = {"experiment": "speed", "machine": machine(), "rounds": rounds, "batch": BATCH, "image": SIZE}
    facts |= {"student": STUDENT, "teacher": TEACHER, "unit": "CPU seconds of one process with one thread", "rows": rows, "holds": holds}
    save(path, facts)
    return 0
