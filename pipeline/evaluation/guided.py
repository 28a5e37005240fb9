"""python -m pipeline guide CONFIG: uni-modal runs, the probe, the choice between UMT and UME, and the stage-2 configuration that follows.

CONFIG is the joint run: a `fusion` student with an input for each modality. Its uni-modal models are ordinary runs in OUT/<input>, resumed
or skipped where they are there; OUT/stage2.yaml is what the choice says to train, OUT/guide.json why.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config import ConfigError, dump, parse, to_yaml
from pipeline.data.errors import DataError
from pipeline.data.fetch import labels_shown
from pipeline.data.storage import is_local, local_path
from pipeline.evaluation.guide import Choice, NeedsUmt, Rule, choose, probe, ume
from pipeline.evaluation.student import outputs
from pipeline.objectives import cross_entropy
from pipeline.run import RunConfig, TrainedRun, build
from pipeline.task import MAIN
from pipeline.towers import fusion

STAGE2, WHY = "stage2.yaml", "guide.json"


class Configs(NamedTuple):
    """Everything that the guide may train."""

    alone: dict[str, RunConfig]  # by modality
    umt: RunConfig
    ume: RunConfig


def configs(config: RunConfig, weight: float = 0.1) -> Configs:
    """The uni-modal runs, UMT with them as live teachers (`weight` each), and UME as one student. Raises ConfigError."""
    tower, task = _checked(config)
    values, out = dump(config), Path(local_path(config.out))
    modalities = values["data"]["modalities"]
    alone, follow, own, inputs = {}, {}, {}, {}
    fresh: dict[str, Any] = {"teachers": {}, "init_from": None}  # of what is compared with each other: nothing from elsewhere
    for name, one in dump(tower)["inputs"].items():
        one |= {"classes": tower.classes}
        present = f"{one['field']}.present" if modalities.get(one["field"], {}).get("optional") else None
        mine = {"modalities": {field: given for field, given in modalities.items() if field == one["field"]}}
        change = {"out": str(out / name), "towers": {MAIN: one}, "objectives": {"task": task | {"present": present}}} | fresh
        alone[name] = parse(RunConfig, values | change | {"data": values["data"] | mine}, f"guide: {name} alone")
        widths = {"student_width": one["embed_dim"], "teacher_width": one["embed_dim"]}
        ends = {"student": f"{name}.embedding", "teacher": f"{name}_alone.embedding"}
        follow[f"umt_{name}"] = {"name": "umt", "weight": weight, "present": present} | ends | widths
        own[name] = task | {"feature": f"{name}.logits", "present": present}
        inputs[name] = one
    teachers = {f"{name}_alone": {"name": "live", "run": str(out / name), "tower": MAIN} for name in alone}
    distilled = {"out": str(out / "umt"), "objectives": values["objectives"] | follow, "teachers": values["teachers"] | teachers}
    student = dump(tower) | {"fuse": "ensemble", "inputs": inputs, "embed_dim": sum(one["embed_dim"] for one in inputs.values())}
    ensemble = {"out": str(out / "ume"), "towers": {MAIN: student}, "objectives": own} | fresh
    return Configs(alone, parse(RunConfig, values | distilled, "guide: UMT"), parse(RunConfig, values | ensemble, "guide: UME"))


def _checked(config: RunConfig) -> tuple[fusion.Config, dict[str, Any]]:
    """The student and its task's loss. Raises ConfigError where the guide's question makes no sense."""
    if not is_local(config.out):
        raise ConfigError(f"out: {config.out}: the guide's runs and its choice lie in a folder; give a local one")
    tower = config.towers.get(MAIN)
    if not isinstance(tower, fusion.Config) or tower.fuse == "ensemble":
        raise ConfigError(
            f"towers.{MAIN}: the guide asks how to train several modalities together; expected a fusion tower (concat or gate)"
        )
    if len(tower.inputs) < 2:
        raise ConfigError(f"towers.{MAIN}.inputs: {next(iter(tower.inputs))} alone; there is nothing to choose with one modality, train it")
    if tower.classes is None or config.data.classes is None:
        raise ConfigError(f"data.classes and towers.{MAIN}.classes: the guide compares accuracies; name the classes")
    losses = [o for o in config.objectives.values() if isinstance(o, cross_entropy.Config) and o.feature == "logits"]
    if len(losses) != 1:
        raise ConfigError(
            f"objectives: expected one cross_entropy on the student's logits, the task of every modality; found {len(losses)}"
        )
    wrong = [name for name in tower.inputs if name in (MAIN, "umt", "ume") or "/" in name]
    if wrong:
        raise ConfigError(f"towers.{MAIN}.inputs: {wrong[0]!r} cannot be the folder of a uni-modal run; rename the input")
    return tower, dump(losses[0])


def train(config: RunConfig) -> TrainedRun:
    """Trains, goes on, or finds it done. Raises ConfigError when it was asked to stop on the way."""
    trainer, home = build(config)
    with home:
        complete = trainer.fit()
    if not complete:
        raise ConfigError(f"{config.out}: stopped at step {trainer.progress.step}, saved; the same command goes on")
    return TrainedRun(Path(config.out))


def guide(
    config: RunConfig, rule: Rule = "probe", *, validation: str | None = None, delta: float | str = 0.0, weight: float = 0.1
) -> tuple[Choice, Path]:
    """Trains what the rule needs, chooses on the validation shards (default: evaluation.data), writes the configuration of the choice.

    One process; uni-modal runs that are trained elsewhere (slurm.launch) are found by their folders. Raises ConfigError, DataError.
    """
    url = validation or config.evaluation.data
    if url is None:
        raise ConfigError("evaluation.data: the choice needs held-out shards; set it, or give --validation. They are no test any more")
    planned = configs(config, weight)
    runs = {name: train(one) for name, one in planned.alone.items()}
    held = _aligned({name: outputs(run, [url], workers=config.evaluation.workers) for name, run in runs.items()})
    urls = [source.url for source in config.data.sources]
    trained = _aligned({name: outputs(run, urls, workers=config.evaluation.workers) for name, run in runs.items()})
    seen = labels_shown(config.seed, config.data.labelled, trained["sample"])
    probabilities = np.stack([torch.from_numpy(logits).softmax(1).numpy() for logits in held["logits"]])
    found = {
        "labels": held["label"],
        "probe": probe([rows[seen] for rows in trained["embedding"]], trained["label"][seen], held["embedding"], seed=config.seed),
        "ume": ume(probabilities, held["present"]).argmax(1),
        "unimodal": [p.argmax(1) for p in probabilities],
        "delta": delta,
    }
    try:
        choice = choose(rule, **found)
    except NeedsUmt:
        held_umt = outputs(train(planned.umt), [url], workers=config.evaluation.workers)
        said = dict(zip(held_umt["sample"].tolist(), held_umt["logits"].argmax(1).tolist()))
        choice = choose(rule, **found, umt=np.array([said.get(sample, -1) for sample in held["sample"].tolist()]))
    path = Path(local_path(config.out)) / STAGE2
    path.write_text(to_yaml(getattr(planned, choice.method)), encoding="utf-8")
    why = choice._asdict() | {"rule": rule, "validation": url, "rows": len(held["label"]), "modalities": list(planned.alone)}
    (path.parent / WHY).write_text(json.dumps(why, indent=1), encoding="utf-8")
    return choice, path


def _aligned(found: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The labelled samples that every modality could read and that have at least one: numpy arrays, features and `present` a list by modality."""
    common = sorted(set.intersection(*(set(one["sample"].tolist()) for one in found.values())))
    at = [{sample: row for row, sample in enumerate(one["sample"].tolist())} for one in found.values()]
    rows = [torch.tensor([place[sample] for sample in common]) for place in at]
    picked = [{key: value[row].numpy() for key, value in one.items()} for one, row in zip(found.values(), rows)]
    there = [next((v for k, v in one.items() if k.endswith(".present")), np.ones(len(common), bool)) for one in picked]
    keep = np.stack(there).any(0) & (picked[0]["label"] >= 0)
    if not keep.any():
        raise DataError("guide: no sample of these shards has both a label and a modality that can be read; the choice compares accuracies")
    several = {key: [one[key][keep] for one in picked] for key in ("embedding", "logits")}
    return several | {"present": np.stack(there)[:, keep], "label": picked[0]["label"][keep], "sample": picked[0]["sample"][keep]}
