"""Small runs of stage 2 for the tests: a student of noisy digits, and a teacher of clean ones that was trained before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import parse
from pipeline.run import RunConfig, build
from pipeline.trainer import Trainer
from tests.runs import put_back

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


def train(config: RunConfig, look: Callable[[Trainer], Any] = lambda trainer: None) -> Any:
    """Trains in this process to the end; gives what `look` saw of the trainer before its first step."""
    with put_back():
        trainer, lock = build(config)
        seen = look(trainer)
        assert trainer.fit()
        del lock
    return seen
