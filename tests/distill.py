"""Small runs of stage 2 for the tests: a student of noisy digits, and a teacher of clean ones that was trained before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import parse, to_yaml
from pipeline.run import RunConfig, build
from pipeline.trainer import Trainer
from tests.runs import put_back
from tests.shards import by_hand
from tools.sources.base import png

CLEAN = {
    "name": "image",
    "field": "clean",
    "image_size": 8,
    "channels": 1,
    "arch": "mlp",
    "width": 32,
    "layers": 1,
    "embed_dim": 16,
    "classes": 10,
}
NOISY = CLEAN | {"field": "image", "image_size": 12}
CE = {"ce": {"name": "cross_entropy", "feature": "logits"}}
FOLLOW = CE | {
    "kd": {"name": "feature_kd", "teacher": "colour.embedding", "projector": "none"},
    "logits": {"name": "logit_kd", "teacher": "colour.logits"},
}

FUSED = {"name": "fusion", "inputs": {"image": NOISY, "clean": CLEAN}, "hidden": 32, "embed_dim": 16, "classes": 10}
THREE = {"student": NOISY, "teacher": FUSED, "auxiliary": CLEAN}
WIDTHS = {"student_width": 16, "teacher_width": 16}
# everything of stage 2 that has state: an online teacher, a critic with its optimizer, queues, a bank, a projector, a frozen teacher
AMID = CE | {
    "teacher_ce": {"name": "cross_entropy", "feature": "teacher.logits"},
    "auxiliary_ce": {"name": "cross_entropy", "feature": "auxiliary.logits"},
    "amid": {"name": "amid", "auxiliary_width": 16, "negatives": "queue", "queue": 64} | WIDTHS,
    "crd": {"name": "crd", "teacher": "colour.embedding", "negatives": "bank", "samples": 150, "drawn": 64} | WIDTHS,
    "kd": {"name": "feature_kd", "teacher": "colour.embedding", "projector": "linear"} | WIDTHS,
    "logits": {"name": "logit_kd", "teacher": "colour.logits"},
}


def config(shards: Path, out: Path, tower: dict[str, Any] = NOISY, **given: Any) -> RunConfig:
    """A run of 6 steps on digits; `given` replaces top-level keys."""
    values = {
        "out": str(out),
        "steps": 6,
        "data": {"sources": [{"url": str(shards)}], "batch": 32, "lanes": 4, "groups": 2, "workers": 0, "classes": 10},
        "towers": {"student": tower},
        "objectives": CE,
        "selector": {"name": "keep_all"},
        "optimizer": {"lr": 0.01},
        "engine": {"precision": "fp32", "threads": 1},
        "record": {"log_every": 1},
    }
    return parse(RunConfig, values | given, "test")


def command(config: RunConfig) -> list[str]:
    """The command line that trains it."""
    path = Path(config.out).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config), encoding="utf-8")
    return ["train", str(path)]


def train(config: RunConfig, look: Callable[[Trainer], Any] = lambda trainer: None) -> Any:
    """Trains in this process to the end; gives what `look` saw of the trainer before its first step."""
    with put_back():
        trainer, lock = build(config)
        seen = look(trainer)
        assert trainer.fit()
        del lock
    return seen


def live(run: Path, **given: object) -> dict[str, Any]:
    """The teachers of a run: `colour`, the student of another one."""
    return {"colour": {"name": "live", "run": str(run)} | given}


def refused(config: RunConfig, error: type[Exception], match: str) -> None:
    """Building it fails so."""
    with put_back(), pytest.raises(error, match=match):
        build(config)


def gappy(folder: Path, rows: int = 40, auxiliary: bool = True) -> Path:
    """Shards of noise, in which every fifth sample has no `clean.png` and the 7th a broken one; without `auxiliary` none has one."""
    draw, made = np.random.default_rng(0), []
    for row in range(rows):
        image, clean = (png(Image.fromarray(draw.integers(0, 256, (size, size), np.uint8))) for size in (12, 8))
        members = {"image.png": image, "clean.png": clean, "json": json.dumps({"label": row % 10}).encode()}
        if row % 5 == 0 or not auxiliary:
            del members["clean.png"]
        elif row == 7:
            members["clean.png"] = b"no image"
        made.append(members)
    return by_hand(folder, made)
