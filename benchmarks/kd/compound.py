"""Compound classes without an example of one (AVCER), as a toy: digits 0 to 6 stand for the seven basic emotions, two digits drawn over
each other for a compound. Models and fusion weights are fitted on single digits; the rules then name the pair."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from torch import Tensor

from benchmarks.kd.loop import Mlp, compared, features, train
from pipeline.evaluation.late_fusion import COMPOUNDS, EMOTIONS, class_weights, compound
from pipeline.objectives import cross_entropy

TRAINED, VALIDATION, COMPOUND, EPOCHS = 500, 250, 700, 30
VIEWS = {"fine": 64, "coarse": 16}
RULES = {"plain": (), "Rule 1": ("mask",), "Rule 2": ("weights",), "both rules": ("mask", "weights")}


def views(images: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
    """What two models see of [n, 8, 8] in [0, 1]: half of the pixels under noise, and all of them at half the size."""
    fine = np.where(rng.random(images.shape) < 0.5, rng.random(images.shape), images)
    coarse = images.reshape(-1, 4, 2, 4, 2).mean((2, 4))
    return {
        "fine": torch.from_numpy(fine.reshape(len(images), -1)).float(),
        "coarse": torch.from_numpy(coarse.reshape(len(images), -1)).float(),
    }


def run(seed: int) -> dict[str, dict[str, float]]:
    """Accuracy on single test digits, accuracy and macro-F1 on compounds, in percent, by model and rule. Chance is 1 in 7."""
    rng, digits = np.random.default_rng(seed), load_digits()
    rows = rng.permutation(np.flatnonzero(digits.target < len(EMOTIONS)))
    images, label = digits.images[rows] / 16, digits.target[rows]
    held = slice(TRAINED + VALIDATION, None)
    pair = rng.integers(0, len(COMPOUNDS), COMPOUND)
    ends = [[rng.choice(np.flatnonzero(label[held] == COMPOUNDS[p][end])) for p in pair] for end in (0, 1)]
    parts = {
        "train": images[:TRAINED],
        "validation": images[TRAINED : TRAINED + VALIDATION],
        "single": images[held],
        "compound": np.maximum(*(images[held][end] for end in ends)),
    }
    seen = {name: views(part, rng) for name, part in parts.items()}
    said: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    for view, columns in VIEWS.items():
        torch.manual_seed(seed)
        tower = {"student": Mlp((view,), columns, 32, classes=len(EMOTIONS))}
        task = train(
            tower, {"ce": cross_entropy.Config()}, seen["train"] | {"label": torch.from_numpy(label[:TRAINED])}, epochs=EPOCHS, seed=seed
        )
        for name in parts:
            said[name].append(features(task, seen[name])["logits"].softmax(1).numpy())
    stacked = {name: np.stack(both) for name, both in said.items()}
    fusion = class_weights(stacked["validation"], label[TRAINED : TRAINED + VALIDATION], draws=2000)
    mixed = {
        name: {view: p[place] for place, view in enumerate(VIEWS)} | {"mean": p.mean(0), "AVCER": fusion.fuse(p)}
        for name, p in stacked.items()
    }
    results = {}
    for who, fused in mixed["compound"].items():
        for rule, rules in RULES.items() if who == "AVCER" else [("plain", ())]:
            named = compound(fused, rules=rules)
            results[f"{who}, {rule}"] = {
                "single digits": 100 * float((mixed["single"][who].argmax(1) == label[held]).mean()),
                "compounds": 100 * float((named == pair).mean()),
                "macro-F1": 100 * float(f1_score(pair, named, average="macro", zero_division=0)),
            }
    return results


def bars(results: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """What is compared; nothing is promised."""
    rows = [("AVCER, plain", "mean, plain"), *((f"AVCER, {rule}", "AVCER, plain") for rule in list(RULES)[1:])]
    return compared(results, [("macro-F1", better, worse, 0.0, None) for better, worse in rows])
