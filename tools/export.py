"""The student of a run for use elsewhere: python -m tools.export RUN OUT [--format safetensors|open_clip] [--checkpoint newest|best|STEP].

`safetensors`: OUT is a file with the student tower's weights. `open_clip`: OUT is a folder that open_clip reads by itself, with
`create_model("local-dir:OUT")`, or for a named model `create_model(NAME, pretrained="OUT/open_clip_model.safetensors")`. Any checkpoint
will do, of any ZeRO stage and any number of ranks; this needs no DeepSpeed and one process: of several ranks the first does it alone.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.comm import leads
from pipeline.distributed.host import save_file
from pipeline.run import TrainedRun
from pipeline.task import MAIN
from pipeline.towers import open_clip as tower

WEIGHTS = "open_clip_model.safetensors"


def export(folder: str | Path, out: Path, form: str = "safetensors", which: str = "newest") -> Path:
    """Writes the student's weights; gives the file. Raises ConfigError where the student is no open_clip model and that was asked for."""
    run = TrainedRun(folder, which)
    config, student = run.config.towers[MAIN], run.task.towers[MAIN]
    if form == "safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        _write({name: value.cpu().contiguous() for name, value in student.state_dict().items()}, out)
        return out
    if not isinstance(config, tower.Config):
        raise ConfigError(f"towers.{MAIN} of {folder} is {config.name}, not open_clip; use --format safetensors")
    model = config.model_config_()
    if isinstance(config.model, dict) and config.tokenizer.kind == "bpe":
        model["text_cfg"]["vocab_size"] = student.model.text.vocab_size
    out.mkdir(parents=True, exist_ok=True)
    facts = {"model_cfg": model, "preprocess_cfg": config.preprocess_config()}
    (out / "open_clip_config.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    if config.tokenizer.kind == "bpe":
        shutil.copyfile(run.folder / "tokenizer.json", out / "tokenizer.json")
    _write(open_clip_state(student.model, model), out / WEIGHTS)
    return out / WEIGHTS


def open_clip_state(model: torch.nn.Module, config: dict) -> dict[str, Tensor]:
    """The state dict under the names that `open_clip.create_model` gives this model: text weights at the top where it builds a plain CLIP."""
    text = config["text_cfg"]
    custom = config.get("custom_text", False) or "hf_model_name" in text
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())  # training holds it as a vector of one
    return state if custom else {name.removeprefix("text."): value for name, value in state.items()}


def _write(state: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".part")
    save_file(state, partial)
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command; what a user can mend is one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="a run folder, or its URL")
    parser.add_argument("out", type=Path, help="a file (safetensors) or a folder (open_clip)")
    parser.add_argument("--format", choices=("safetensors", "open_clip"), default="safetensors")
    parser.add_argument("--checkpoint", default="newest", help="newest, best, or a step")
    args = parser.parse_args(arguments)
    if not leads():
        return 0
    try:
        print(export(args.run, args.out, args.format, args.checkpoint))
    except (ConfigError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
