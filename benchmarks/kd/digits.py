"""E1, real digits: the student sees a digit somewhere on a noisy canvas, the auxiliary tower the clean centred one, the teacher both.

scikit-learn's 1,797 digits, 300 of them labelled and trained on; the rest is the test. `amid` is the adversarial variant, `logit_kd` learns
from the same kind of teacher, trained along with its task's loss only.
"""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.kd.loop import Mlp, accuracy, compared, features, train
from pipeline.objectives import amid, cross_entropy, logit_kd
from pipeline.objectives.base import ObjectiveConfig

EPOCHS, TRAINED, WIDTH = 150, 300, 32
_TERMS = {"student_weight": 0.2, "auxiliary_weight": 0.2, "adversarial_weight": 1.0, "explicit_weight": 0.0}
_AMID = {"student_width": WIDTH, "teacher_width": WIDTH, "auxiliary_width": WIDTH, "projection": WIDTH, "temperature": 0.1}


def data(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fields of the trained rows and of the test rows: primary [n, 144], auxiliary [n, 64], label [n]."""
    rng = np.random.default_rng(seed)
    images, label = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    canvas = rng.normal(0, 0.1, (len(images), 12, 12))
    for row, (top, left) in enumerate(rng.integers(0, 5, (len(images), 2))):
        canvas[row, top : top + 8, left : left + 8] += images[row]
    order = torch.from_numpy(rng.permutation(len(images)))
    fields = {"primary": torch.from_numpy(canvas).flatten(1).float(), "auxiliary": torch.from_numpy(images).flatten(1).float()}
    fields["label"] = torch.from_numpy(label).long()
    return {name: value[order[:TRAINED]] for name, value in fields.items()}, {
        name: value[order[TRAINED:]] for name, value in fields.items()
    }


def _amid(*terms: str) -> dict[str, ObjectiveConfig]:
    return {"amid": amid.Config(**_AMID | {name: value if name in terms else 0.0 for name, value in _TERMS.items()})}


METHODS: dict[str, dict[str, ObjectiveConfig]] = {
    "ce": {},
    "mi": _amid("student_weight"),
    "mi+a": _amid("student_weight", "auxiliary_weight"),
    "mi+h": _amid("student_weight", "adversarial_weight"),
    "amid": _amid("student_weight", "auxiliary_weight", "adversarial_weight"),
    "logit_kd": {"kd": logit_kd.Config(weight=0.5, temperature=4.0)},
}


def run(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracies in percent by method."""
    trained, test = data(seed)
    task_losses = {f"{who}ce": cross_entropy.Config(feature=f"{who}logits") for who in ("", "teacher.", "auxiliary.")}
    task_losses = {name.replace(".", "_"): config for name, config in task_losses.items()}
    results = {}
    for method, objectives in METHODS.items():
        torch.manual_seed(seed)
        towers = {
            "student": Mlp(("primary",), 144, WIDTH, 10),
            "teacher": Mlp(("primary", "auxiliary"), 208, WIDTH, 10),
            "auxiliary": Mlp(("auxiliary",), 64, WIDTH, 10),
        }
        found = features(train(towers, task_losses | objectives, trained, epochs=EPOCHS, seed=seed), test)
        results[method] = {who: accuracy(found[f"{key}logits"], test["label"]) for who, key in (("student", ""), ("teacher", "teacher."))}
    return results


BARS = [
    ("student", "amid", "mi", 0.0, 0.8),
    ("student", "amid", "ce", 0.0, 0.9),
    ("teacher", "mi+a", "mi", 5.0, None),
    ("student", "amid", "logit_kd", 0.0, None),
    ("student", "amid", "mi+a", 0.0, None),
    ("teacher", "mi", "mi+h", -1.0, None),
]


def bars(results: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """What is compared."""
    return compared(results, BARS)
