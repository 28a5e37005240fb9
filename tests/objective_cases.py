"""Objectives to test and what to feed them: used by the contract over the folder and by the comparison over ranks."""

from typing import Any

import torch

from pipeline.config import names_in, parse
from pipeline.objectives.base import ObjectiveConfig
from pipeline.types import Batch

ROWS, WIDTH, CLASSES, SIDE = 12, 8, 8, 4
MAPS = "noisy_segmentation"  # the objective that reads maps [rows, CLASSES, SIDE, SIDE]

_WIDTHS = {"student_width": WIDTH, "teacher_width": WIDTH}
_AMID = _WIDTHS | {"auxiliary_width": WIDTH, "projection": 6, "hidden": 10, "queue": 20, "samples": ROWS + 4, "drawn": 7}
_ONLY = dict.fromkeys(("student_weight", "auxiliary_weight", "explicit_weight", "adversarial_weight"), 0.0)
_CRD = _WIDTHS | {"projection": 6, "queue": 20, "samples": ROWS + 4, "drawn": 7, "temperature": 0.3}

# every loss term of its own, and every option that changes what is computed; an objective that is not here is tested with its defaults
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {"selected": {}, "all": {"negatives": "all"}},
    "amid": {
        "all": _AMID | {"explicit_weight": 0.5},
        "I(T;S)": _AMID | _ONLY | {"student_weight": 1.0},
        "I(T;A)": _AMID | _ONLY | {"auxiliary_weight": 1.0, "present": "aux.present"},
        "I(T;S) queue": _AMID | _ONLY | {"student_weight": 1.0, "negatives": "queue"},
        "I(T;S) bank": _AMID | _ONLY | {"student_weight": 1.0, "negatives": "bank"},
        "H explicit": _AMID | _ONLY | {"explicit_weight": 1.0},
        "H adversarial": _AMID | _ONLY | {"adversarial_weight": 1.0},
        "H cond": _AMID | _ONLY | {"adversarial_weight": 1.0, "adv_mode": "cond"},
        "H marginal": _AMID | _ONLY | {"adversarial_weight": 1.0, "adv_mode": "marginal"},
        "H to teacher": _AMID | _ONLY | {"adversarial_weight": 1.0, "explicit_weight": 1.0, "h_grad_to_teacher": True},
        "identity": _AMID | _ONLY | {"adversarial_weight": 1.0, "generator": "identity"},
        "classes": _AMID | {"mask_same_class": True},
    },
    "crd": {
        "batch": _CRD,
        "queue": _CRD | {"negatives": "queue"},
        "bank": _CRD | {"negatives": "bank"},
        "whole bank": _CRD | {"negatives": "bank", "drawn": 100, "mask_same_class": True},
        "both": _CRD | {"teacher_gradient": True, "projection": 0},
    },
    "umt": {"linear": _WIDTHS, "none": {"projector": "none", "present": "aux.present"}},
    "feature_kd": {"linear": _WIDTHS, "unit l1": {"projector": "none", "normalise": True, "distance": "l1"}},
    "logit_kd": {"logits": {}, "hot": {"temperature": 1.0, "present": "aux.present"}},
    "relational_kd": {"distance": {"angle_weight": 0.0}, "angle": {"distance_weight": 0.0}, "present": {"present": "aux.present"}},
    "affinity": {"plain": {}, "present": {"present": "aux.present", "temperature": 2.0}},
    "pair_nce": {"both views": {}, "one view": {"alpha": None}, "blocked": {"impl": "blocked", "alpha": 1.0}},
    MAPS: {
        "paper": {"ramp_steps": 3},
        "all pixels": {"keep": 1.0},
        "linear gini": {"keep": 1.0, "ramp": "linear", "ramp_steps": 3, "confidence": "gini", "entangle": False},
        "plain": {"select": False, "alpha": 0.0, "beta": 0.0, "consistency": 0.0},
        "one sensor": {"second": None, "keep": 1.0},
    },
    "cross_entropy": {"logits": {}, "head": {"feature": "embedding", "width": WIDTH, "classes": CLASSES, "smoothing": 0.1}},
}

# by design not the same on any number of ranks: the thresholds are of a rank's own pixels, as published
OF_A_RANK = {(MAPS, "paper")}


def cases() -> list[tuple[str, str]]:
    """(objective, case) of everything in the folder."""
    return [(name, case) for name in names_in("pipeline.objectives") for case in CASES.get(name, {"defaults": {}})]


def config_of(name: str, case: str, **changes: Any) -> ObjectiveConfig:
    """The configuration of a case."""
    made = __import__(f"pipeline.objectives.{name}", fromlist=["Config"]).Config
    return parse(made, CASES.get(name, {}).get(case, {}) | changes, f"{name} {case}")


def features_of(config: ObjectiveConfig, rows: int = ROWS, seed: int = 7) -> dict[str, torch.Tensor]:
    """Random float64 features by the names the objective reads: unit rows [rows, WIDTH], scales [1], or maps."""
    make = torch.Generator().manual_seed(seed)
    made = {}
    for name in config.reads():
        if name.rpartition(".")[2] == "scale":
            made[name] = torch.tensor([9.0], dtype=torch.float64)
        elif config.name == MAPS:
            made[name] = torch.randn(rows, CLASSES, SIDE, SIDE, generator=make, dtype=torch.float64)
        else:
            made[name] = torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=make, dtype=torch.float64))
    return made


def batch_of(config: ObjectiveConfig, rows: int = ROWS, valid: torch.Tensor | None = None) -> Batch:
    """A batch with the fields the objective looks at: labels, of which one row has none, and a modality that two rows lack."""
    ids = torch.arange(rows)
    fields = {}
    for name in config.fields():
        if name.endswith(".present"):
            fields[name] = (ids != 2) & (ids != 9)
        elif config.name == MAPS:
            pixels = torch.arange(rows * SIDE**2).view(rows, SIDE, SIDE)
            label = (7 * pixels % 61 % CLASSES).masked_fill((ids == 4)[:, None, None] | (pixels % 13 == 5), 255)
            fields[name] = label if name == config.label else 31 * torch.arange(CLASSES)[:, None, None] * pixels[:, None] % 256
        else:
            fields[name] = (ids % CLASSES).masked_fill(ids == 4, -1)
    batch = Batch(ids, ids, ids * 0, torch.ones(rows, dtype=torch.bool) if valid is None else valid, fields)
    if config.rejected():  # twice as many as are trained, some of which could not be decoded
        left = features_of(config, 2 * rows, seed=8)
        batch.unselected = {"image": left["image"], "text": left["text"], "valid": torch.arange(2 * rows) % 5 != 3}
    return batch
