"""Run by tests on every rank: trains several configurations one after the other in one process group, for a launch costs seconds.

python -m tests.ranks.cells OUT DATA '{"name": ["override", ...], ...}': each cell trains into OUT/<name>; rank 0 writes what it saw
to OUT/<name>/seen.json.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from pipeline.config import load
from pipeline.distributed.launch import shutdown
from pipeline.run import RunConfig, build
from tests.runs import DEBUG, arguments

TOWER = (
    "towers.student={name: open_clip, tokenizer: {kind: bpe, vocab_size: 512}, model: {embed_dim: 32, "
    "vision_cfg: {image_size: 32, patch_size: 8, width: 64, layers: 2, head_width: 32}, "
    "text_cfg: {context_length: 16, width: 64, heads: 2, layers: 2}}}"
)
STEPS = ("visits=null", "steps=20", "selector.warmup_visits=1", "optimizer.lr=0.001")


def train(out: Path, data: Path, overrides: list[str]) -> None:
    """One cell."""
    config = load(RunConfig, DEBUG, [*arguments(data, out)[2:], TOWER, *STEPS, *overrides])
    trainer, lock = build(config)
    engine = trainer.engine
    start = trainer.progress.step
    engine.accelerator.end_training = lambda: None  # it would end the process group, and DeepSpeed cannot begin another
    trainer.fit()
    del lock
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    mine = torch.tensor([float(sum(value.numel() * value.element_size() for value in states))])
    each = engine.comm.gather(mine).tolist()
    seen = {
        "start": start,
        "optimizer_bytes": each,
        "weights_here": sum(p.numel() for p in engine.raw.parameters()),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.raw.parameters()),
    }
    if engine.stage == 3:
        traces = {"training": engine.task.optimizer.parameter_offload.param_coordinator}
        with engine.untracked():
            traces["scoring"] = engine.task.optimizer.parameter_offload.param_coordinator
        seen["complete_traces"] = [name for name, trace in traces.items() if trace.is_complete_trace()]
    if engine.comm.rank == 0:
        (out / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def forget() -> None:
    """What accelerate keeps for a whole process; the process group stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    gc.collect()


if __name__ == "__main__":
    try:
        for name, cell in json.loads(sys.argv[3]).items():
            train(Path(sys.argv[1]) / name, Path(sys.argv[2]), cell)
            print(f"cell {name}: done", flush=True)
            forget()
    finally:
        shutdown()
