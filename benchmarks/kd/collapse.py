"""E2, the weak teacher: no labels at all, and a teacher that only has to agree with the student has no reason to keep what that one lacks.

Latents u and v in 0..3. The primary modality shows u in a line and v in products of coordinates only; the auxiliary one shows v in a line,
beside 8 nuisance numbers w. Linear probes (logistic regression, ridge) on frozen features tell what is left.
"""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from benchmarks.kd.loop import Mlp, compared, features, train
from pipeline.objectives import amid

EPOCHS, TRAINED, TEST, WIDTH = 80, 600, 2000, 32
_WIDTHS = {"student_width": WIDTH, "teacher_width": WIDTH, "auxiliary_width": WIDTH, "projection": WIDTH, "temperature": 0.1}


def _method(auxiliary: float, explicit: float, adversarial: float) -> amid.Config:
    weights = {"auxiliary_weight": auxiliary, "explicit_weight": explicit, "adversarial_weight": adversarial}
    return amid.Config(**_WIDTHS, student_weight=1.0, **weights)


METHODS = {"mi": _method(0.0, 0.0, 0.0), "mi+a": _method(1.0, 0.0, 0.0), "amid": _method(1.0, 1.0, 0.02)}


def data(rows: int, seed: int, mixing: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Fields primary [rows, 48], auxiliary [rows, 32], and the latents. `mixing` seeds what both halves of a task share."""
    rng, mix = np.random.default_rng(seed), np.random.default_rng(mixing)
    u, v, w = rng.integers(0, 4, rows), rng.integers(0, 4, rows), rng.normal(size=(rows, 8))
    easy = 2 * np.eye(4)[u] @ mix.normal(size=(4, 16)) / 2
    signs = rng.choice([-1.0, 1.0], (rows, 2, 8))
    bits = 2.0 * np.stack([v // 2, v % 2], 1)[:, :, None] - 1
    primary = np.concatenate([easy, signs.reshape(rows, -1), (signs * bits).reshape(rows, -1)], 1)
    auxiliary = np.concatenate([2 * np.eye(4)[v], w], 1) @ mix.normal(size=(12, 32)) / np.sqrt(12)
    fields = {"primary": primary + rng.normal(0, 0.4, primary.shape), "auxiliary": auxiliary + rng.normal(0, 0.1, auxiliary.shape)}
    return {name: torch.from_numpy(value).float() for name, value in fields.items()}, {"u": u, "v": v, "w": w}


def run(seed: int) -> dict[str, dict[str, float]]:
    """Probe accuracies in percent, and R^2 of w, by method."""
    trained, known = data(TRAINED, 2 * seed, seed)
    test, truth = data(TEST, 2 * seed + 1, seed)
    results = {}
    for method, config in METHODS.items():
        torch.manual_seed(seed)
        towers = {
            "student": Mlp(("primary",), 48, WIDTH),
            "teacher": Mlp(("primary", "auxiliary"), 80, WIDTH),
            "auxiliary": Mlp(("auxiliary",), 32, WIDTH),
        }
        task = train(towers, {"amid": config}, trained, epochs=EPOCHS, seed=seed)
        before, after = features(task, trained), features(task, test)
        results[method] = {}
        for who, key in (("student", "embedding"), ("teacher", "teacher.embedding")):
            for latent in ("u", "v"):
                fitted = LogisticRegression(max_iter=1000).fit(before[key].numpy(), known[latent])
                results[method][f"{who} {latent}"] = 100 * fitted.score(after[key].numpy(), truth[latent])
        results[method]["teacher R2 w"] = float(Ridge().fit(before[key].numpy(), known["w"]).score(after[key].numpy(), truth["w"]))
    return results


BARS = [("teacher v", "amid", "mi", 20.0, None), ("student v", "amid", "mi", 0.0, None), ("student v", "amid", "mi+a", 0.0, None)]


def bars(results: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """What is compared."""
    return compared(results, BARS)
