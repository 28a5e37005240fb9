"""E5, uni-modal and paired features under control, and whether the guide tells them apart.

Classes c in 0..3. x1 (200 columns): a weak, memorisable hint at c, and a bit b1; x2 (12 columns): c's two bits as products of coordinates
(slow to learn, exact), and a bit b2. Task U: y = c. Task P: y = 2c + (b1 XOR b2), of which no modality alone knows the last bit. Task parity
(real digits): the XOR of two digits' parities, where each modality alone knows nothing and the probe's rule means nothing.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.kd.loop import LateFusion, Mlp, accuracy, features, train
from pipeline.evaluation.guide import choose, probe, ume
from pipeline.objectives import cross_entropy, umt

EPOCHS, TEST, VALIDATION, WIDTH = 60, 4000, 2000, 64
STRENGTH = 2.0  # of b2 in its column
CLASSES, TRAINED = {"U": 4, "P": 8, "parity": 2}, {"U": 500, "P": 800, "parity": 1000}


def synthetic(task: str, rows: int, seed: int, mixing: int) -> dict[str, Tensor]:
    """Fields x1 [rows, 200], x2 [rows, 12], label."""
    rng, mix = np.random.default_rng(seed), np.random.default_rng(mixing)
    directions = np.linalg.qr(mix.normal(size=(200, 5)))[0].T
    c, b1, b2 = rng.integers(0, 4, rows), *rng.integers(0, 2, (2, rows))
    x1 = 2.2 * directions[c] + rng.normal(size=(rows, 200))
    x2 = rng.normal(size=(rows, 12))
    signs = rng.choice([-1.0, 1.0], (rows, 2))
    bits = 2.0 * np.stack([c // 2, c % 2], 1) - 1
    x2[:, :4] = np.concatenate([signs, signs * bits], 1) + rng.normal(0, 0.25, (rows, 4))
    label = c
    if task == "P":
        x1 += 6 * (2 * b1 - 1)[:, None] * directions[4]
        x2[:, 6] = STRENGTH * (2 * b2 - 1) + rng.normal(0, 0.25, rows)
        label = 2 * c + (b1 ^ b2)
    return {"x1": torch.from_numpy(x1).float(), "x2": torch.from_numpy(x2).float(), "label": torch.from_numpy(label).long()}


def parity(rows: int, seed: int, part: int) -> dict[str, Tensor]:
    """Pairs of digits from disjoint thirds of the data by `part`; each digit is even or odd with equal chance."""
    images, digit = load_digits(return_X_y=True)
    own = np.flatnonzero(np.random.default_rng(99).permutation(len(digit)) % 3 == part)
    rng = np.random.default_rng(3 * seed + part)
    odd = digit[own] % 2
    wanted = rng.integers(0, 2, (2, rows))
    first, second = (np.where(bit, rng.choice(own[odd == 1], rows), rng.choice(own[odd == 0], rows)) for bit in wanted)
    pair = [torch.from_numpy(images[side] / 16).float() for side in (first, second)]
    return {"x1": pair[0], "x2": pair[1], "label": torch.from_numpy(wanted[0] ^ wanted[1]).long()}


def halves(task: str, seed: int) -> list[dict[str, Tensor]]:
    """Train, validation and test rows."""
    sizes = (TRAINED[task], VALIDATION, TEST)
    if task == "parity":
        return [parity(size, seed, part) for part, size in enumerate(sizes)]
    return [synthetic(task, size, 10 * seed + part, seed) for part, size in enumerate(sizes)]


def run_task(task: str, seed: int) -> dict[str, float | str]:
    """Test accuracies in percent, the guide's gap on validation rows, and its choice by each rule."""
    parts = halves(task, seed)
    classes, widths = CLASSES[task], (parts[0]["x1"].shape[1], parts[0]["x2"].shape[1])
    label = [part["label"] for part in parts]
    torch.manual_seed(seed)
    alone = []
    for place, width in enumerate(widths):
        tower = {"student": Mlp((f"x{place + 1}",), width, WIDTH, classes, hidden=(128,), rectified=True)}
        fitted = train(tower, {"ce": cross_entropy.Config()}, parts[0], epochs=EPOCHS, seed=seed)
        alone.append([features(fitted, part) for part in parts])

    def joint(distil: bool) -> list[Tensor]:
        torch.manual_seed(seed)
        towers = {"student": LateFusion(("x1", "x2"), widths, WIDTH, classes)}
        frozen = {f"teacher.{name}": modality[0]["embedding"] for name, modality in zip(("first", "second"), alone)}
        pairs = {
            f"umt_{n}": umt.Config(student=n, teacher=f"teacher.{n}", student_width=WIDTH, teacher_width=WIDTH) for n in ("first", "second")
        }
        fitted = train(
            towers, {"ce": cross_entropy.Config()} | (pairs if distil else {}), parts[0], epochs=EPOCHS, seed=seed, frozen=frozen
        )
        return [features(fitted, part)["logits"] for part in parts]

    plain, distilled = joint(False), joint(True)
    ensemble = [ume(np.stack([m[part]["logits"].softmax(1).numpy() for m in alone])) for part in range(3)]
    embedded = [[modality[part]["embedding"].numpy() for modality in alone] for part in range(2)]
    found = {"labels": label[1].numpy(), "ume": ensemble[1].argmax(1), "umt": distilled[1].argmax(1).numpy()}
    found |= {"probe": probe(embedded[0], label[0].numpy(), embedded[1]), "unimodal": [m[1]["logits"].argmax(1).numpy() for m in alone]}
    choices = {rule: choose(rule, **found) for rule in ("probe", "val", "both")}
    accuracies = {"uni1": alone[0][2]["logits"], "uni2": alone[1][2]["logits"], "ume": torch.from_numpy(ensemble[2])}
    accuracies |= {"joint": plain[2], "umt": distilled[2]}
    result: dict[str, float | str] = {name: accuracy(logits, label[2]) for name, logits in accuracies.items()}
    result["gap"] = 100 * choices["probe"].gap
    return result | {f"says {rule}": choice.method for rule, choice in choices.items()} | {"reason": choices["probe"].reason}


def run(seed: int) -> dict[str, dict[str, float | str]]:
    """By task."""
    return {task: run_task(task, seed) for task in CLASSES}


RIGHT = {"U": "ume", "P": "umt", "parity": "umt"}


def bars(results: list[dict[str, dict[str, float | str]]]) -> list[dict]:
    """Differences within a task, and how often the guide was right."""
    found = []
    for task, better, worse, margin, share in (
        ("U", "ume", "joint", 5.0, 0.8),
        ("U", "umt", "joint", 0.0, None),
        ("P", "joint", "ume", 20.0, 1.0),
        ("P", "umt", "joint", 0.0, 0.8),
        ("parity", "umt", "joint", 0.0, None),
    ):
        differences = [seed[task][better] - seed[task][worse] for seed in results]
        found.append({"what": f"task {task}: {better} over {worse}", "margin": margin, "differences": differences, "share": share})
    for task, right in RIGHT.items():
        for rule in ("probe", "val"):
            hits = [float(seed[task][f"says {rule}"] == right) for seed in results]
            found.append({"what": f"task {task}: rule {rule} says {right}", "margin": 0.0, "differences": hits, "share": 1.0})
    return found
