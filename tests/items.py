"""Small runs of the item tower for the tests: pairs of related icons, some without image or text, and a CLIP run to take the vision from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import parse
from pipeline.run import RunConfig
from tests.distill import train
from tools.make_shards import main as make_shards

CLIP = {"embed_dim": 16, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
CLIP["text_cfg"] = {"context_length": 8, "width": 32, "heads": 2, "layers": 1, "vocab_size": 600}
BPE = {"kind": "bpe", "vocab_size": 600}
LLM = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ITEMS = {
    "name": "mlrm",
    "llm": LLM,
    "vision": {"model": CLIP},
    "connector": {"width": 32, "layers": 2, "heads": 2},
    "tokens": {"vocab_size": 420},
    "context": 40,
}
OPTIONAL = {name: {"optional": True} for name in ("image", "text", "related_image", "related_text")}


def config(shards: Path, out: Path, clip: Path | None, steps: int = 6, **given: Any) -> RunConfig:
    """A run of the item tower with the vision of `clip`, or of that run itself where it is None; `given` replaces top-level keys."""
    values: dict[str, Any] = {
        "out": str(out),
        "steps": steps,
        "data": {"sources": [{"url": str(shards)}], "batch": 16, "lanes": 4, "groups": 2, "workers": 0},
        "towers": {"student": {"name": "open_clip", "model": CLIP, "tokenizer": BPE}},
        "objectives": {"clip": {"name": "clip"}},
        "selector": {"name": "keep_all"},
        "optimizer": {"lr": 0.01},
        "engine": {"precision": "fp32", "threads": 1},
        "record": {"log_every": 1},
    }
    if clip is not None:
        values |= {"towers": {"student": ITEMS}, "objectives": {"pairs": {"name": "pair_nce"}}}
        values |= {"init_from": {"run": str(clip), "towers": {"student.vision": "student.model.visual"}}}
        values["data"] |= {"modalities": OPTIONAL}
    return parse(RunConfig, values | given, "test")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pairs, a fifth of the items without image and a fifth without text."""
    out = tmp_path_factory.mktemp("items") / "train"
    lacking = ["--without-image", "0.2", "--without-text", "0.2", "--short-text", "0.3"]
    assert make_shards(["items", str(out), "--limit", "96", "--size", "16", "--shard-size", "48", "--workers", "1", *lacking]) == 0
    return out


@pytest.fixture(scope="session")
def clip(icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished CLIP run of two steps. Read only."""
    out = tmp_path_factory.mktemp("clip") / "run"
    torch.manual_seed(3)
    train(config(icons_small, out, None, steps=2))
    return out
