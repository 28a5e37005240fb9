"""CromSS: what believing pixels by confidence brings over training on all of a noisy map, on synthetic sensors and on the Earth's coasts.

All variants of a seed share scenes, initial weights, batches and seasons. Seeds 50 and 51 were used to set how noisy the synthetic sensors are,
so that plain training is as good on both; no setting of the method was looked for. What came out: docs/systems.md.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pipeline.config import parse
from pipeline.data.maps import label_priors
from pipeline.distributed.comm import LocalComm
from pipeline.evaluation.segmentation import confusion, scores
from pipeline.objectives import noisy_segmentation
from pipeline.selection import cromss
from pipeline.task import Task
from pipeline.towers import unet
from pipeline.types import Batch, Selection
from tools.sources import earth, two_sensors

PLAIN = {"select": False, "alpha": 0.0, "beta": 0.0, "consistency": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "consistency": PLAIN | {"consistency": 1.0},
    "selection": {"alpha": 0.0, "beta": 0.0},
    "selection, no entangling": {"alpha": 0.0, "beta": 0.0, "entangle": False},
    "full": {},
}
SYNTHETIC = [("late", name) for name in VARIANTS] + [("middle", "plain"), ("middle", "full")]
COASTS = ("plain", "selection", "full")  # late fusion
EPOCHS, RAMP, WATCHED = 15, 6, 6  # of the synthetic set: in all, until selection has set in, until label confidence is looked at
COAST_EPOCHS, COAST_SIDE, COAST_TILES = 10, 32, 400
CLEAN, CLEAN_STEPS = 16, 60  # maps without wrong labels and steps of training on them, for encoders that go on
RATE, BATCH = 5e-3, 16
Rows = dict[str, dict[str, float]]


class Data(NamedTuple):
    """Sensors uint8 [n, seasons, bands, h, w]; labels uint8 [n, seasons, h, w]; priors uint8 [n, seasons, classes, h, w]; truth [n, h, w]."""

    sensors: dict[str, Tensor]
    label: Tensor
    prior: Tensor
    truth: Tensor
    classes: int

    def batch(self, rows: Tensor, season: Tensor) -> Batch:
        """Each row in its season."""
        taken = {name: bands[rows, season] for name, bands in self.sensors.items()}
        fields = taken | {"segmentation": self.label[rows, season], "prior": self.prior[rows, season]}
        return Batch(rows, rows, rows * 0, torch.ones(len(rows), dtype=torch.bool), fields)


def synthetic(seed: int, split: str) -> Data:
    """The scenes of a split; the label maps of both are noisy, `truth` is not."""
    scenes = [two_sensors.draw(number, seed, split == "train") for number in range(two_sensors.SCENES[split])]
    s1, s2, noisy, clean = (np.stack(parts) for parts in zip(*scenes))
    priors = np.stack([label_priors(one, two_sensors.CLASSES, two_sensors.PRIOR_SIGMA) for one in noisy])
    return _data({"s1": s1, "s2": s2}, noisy, priors, clean, two_sensors.CLASSES)


def coasts(split: str) -> Data:
    """Tiles of a split: labels are the crude mask, truth is the full one. Which of the training tiles are taken is the same for all seeds."""
    corners, side = np.random.default_rng(0).permutation(earth.coasts(COAST_SIDE)[split])[:COAST_TILES], COAST_SIDE

    def cut(whole: np.ndarray) -> np.ndarray:
        return np.stack([whole[top : top + side, left : left + side] for top, left in corners])

    sensors = {name: cut(earth.picture(file)).transpose(0, 3, 1, 2)[:, None] for name, file in (("relief", "etopo1"), ("optical", "bmng"))}
    crude = cut(earth.land("c"))
    return _data(sensors, crude[:, None], np.stack([earth.prior(one) for one in crude]), cut(earth.land("f")), len(earth.CLASSES))


def _data(sensors: dict[str, np.ndarray], label: np.ndarray, prior: np.ndarray, truth: np.ndarray, classes: int) -> Data:
    maps = {name: torch.from_numpy(np.ascontiguousarray(bands)) for name, bands in sensors.items()}
    return Data(maps, *(torch.from_numpy(np.ascontiguousarray(part)) for part in (label, prior, truth)), classes)


def tower(data: Data, fusion: str = "late", **changes: Any) -> unet.UNets:
    """Three levels of 8, 16 and 32 channels."""
    bands = {name: maps.shape[2] for name, maps in data.sensors.items()}
    small = {"encoder": "plain", "depth": 3, "width": 8, "decoder_width": 4, "image_size": data.truth.shape[-1]}
    return parse(unet.Config, {"sensors": bands, "classes": data.classes, "fusion": fusion} | small | changes, "tower").build(None)


def train(net: unet.UNets, data: Data, settings: dict[str, Any], epochs: int, seed: int, watch: int = 0) -> dict[str, float]:
    """Trains in place with Adam. After `watch` epochs: how well label confidence tells right labels from wrong ones."""
    names = [f"{name}.logits" for name in data.sensors]
    rows, order = len(data.truth), np.random.default_rng(seed)
    given = {"first": names[0], "second": names[1] if len(names) > 1 else None, "ramp_steps": RAMP * epochs // EPOCHS * -(-rows // BATCH)}
    objective = parse(noisy_segmentation.Config, given | settings, "objective").build()
    task = Task({"student": net}, {"task": (1.0, objective)}, LocalComm()).train()
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=RATE)
    found: dict[str, float] = {}
    for epoch in range(epochs):
        for chosen in torch.from_numpy(order.permutation(rows)).split(BATCH):
            season = torch.from_numpy(order.integers(0, data.label.shape[1], len(chosen)))
            optimizer.zero_grad()
            task(data.batch(chosen, season), "train", Selection(torch.arange(len(chosen)))).loss.backward()
            optimizer.step()
            task.after_step()
        if epoch + 1 == watch:
            found = ranking(net, data)
    return found


@torch.no_grad()
def logits(net: unet.UNets, data: Data) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """All rows in their first season."""
    net.eval()
    for rows in torch.arange(len(data.truth)).split(64):
        batch = data.batch(rows, rows * 0)
        yield batch, net(batch.fields)
    net.train()


def quality(net: unet.UNets, data: Data, column: str = "mIoU") -> dict[str, float]:
    """mIoU of each sensor against the truth, in percent."""
    matrices: dict[str, Tensor] = {}
    for batch, given in logits(net, data):
        for name, one in given.items():
            matrices[name] = matrices.get(name, 0) + confusion(one, data.truth[batch.sample])
    return {f"{name.removesuffix('.logits')} {column}": 100 * scores(matrix)["miou"] for name, matrix in matrices.items()}


def ranking(net: unet.UNets, data: Data) -> dict[str, float]:
    """AUROC in percent, of label confidence for "this label is right", of each sensor alone and entangled."""
    told: dict[str, list[Tensor]] = {}
    for batch, given in logits(net, data):
        label = batch.fields["segmentation"].long()
        single = [cromss.label_confidence(z.softmax(1), label) for z in given.values()]
        told.setdefault("right", []).append(label == data.truth[batch.sample])
        for kind, pair in (("single", single), ("entangled", cromss.entangled(*single))):
            for name, one in zip(given, pair):
                told.setdefault(f"{name.removesuffix('.logits')} AUC {kind}", []).append(one)
    flat = {name: torch.cat(parts).flatten().numpy() for name, parts in told.items()}
    right = flat.pop("right")
    return {name: 100 * float(roc_auc_score(right, values)) for name, values in flat.items()}


def transfer(before: unet.UNets | None, train_on: Data, test_on: Data, seed: int) -> dict[str, float]:
    """mIoU of each sensor alone after a new decoder was trained on a few clean maps: encoder as it was, and trained on; None: a fresh one."""
    found: dict[str, float] = {}
    clean = train_on._replace(label=train_on.truth[:CLEAN, None], truth=train_on.truth[:CLEAN])
    for name in train_on.sensors:
        here, there = (data._replace(sensors={name: data.sensors[name]}) for data in (clean, test_on))
        for kind, frozen in (("frozen", True), ("tuned", False)):
            torch.manual_seed(seed)
            net = tower(here, frozen=frozen)
            if before is not None:
                net.encoders[name].load_state_dict(copy.deepcopy(before.encoders[name].state_dict()))
            train(net, here, PLAIN, CLEAN_STEPS, seed)
            found |= quality(net, there, kind)
    return found


def run(seeds: Sequence[int]) -> dict[int, dict[str, dict[str, float]]]:
    """Seed -> row -> column; percent."""
    return {seed: of_synthetic(seed) | of_coasts(seed) for seed in seeds}


def of_synthetic(seed: int) -> Rows:
    """mIoU against clean labels of every variant, encoders that go on, and what label confidence tells while plain training goes on."""
    seen, held = synthetic(seed, "train"), synthetic(seed, "test")
    rows: Rows = {}
    for fusion, variant in SYNTHETIC:
        torch.manual_seed(seed)
        net = tower(seen, fusion)
        watched = train(net, seen, VARIANTS[variant], EPOCHS, seed, watch=WATCHED if (fusion, variant) == ("late", "plain") else 0)
        rows[f"{fusion}, {variant}"] = quality(net, held) | watched
        if fusion == "late" and variant in ("plain", "selection", "full"):
            rows[f"{fusion}, {variant}"] |= transfer(net, seen, held, seed)
    rows["fresh encoder"] = transfer(None, seen, held, seed)
    return rows


def of_coasts(seed: int) -> Rows:
    """mIoU against the full land mask after training on the crude one; and of the crude mask itself."""
    seen, held = coasts("train"), coasts("test")
    itself = confusion(torch.nn.functional.one_hot(held.label[:, 0].long(), held.classes).movedim(-1, 1).float(), held.truth)
    rows: Rows = {"coasts, crude mask": {f"{name} mIoU": 100 * scores(itself)["miou"] for name in held.sensors}}
    for variant in COASTS:
        torch.manual_seed(seed)
        net = tower(seen)
        train(net, seen, VARIANTS[variant], COAST_EPOCHS, seed)
        rows[f"coasts, {variant}"] = quality(net, held)
    return rows


def bars(results: Sequence[Rows]) -> list[dict[str, Any]]:
    """What was promised: the mean over seeds of the gain, and the ranking in every seed."""
    found = []
    for sensor in two_sensors.BANDS:
        gains = [rows["late, selection"][f"{sensor} mIoU"] - rows["late, plain"][f"{sensor} mIoU"] for rows in results]
        mean = float(np.mean(gains))
        found.append(
            {"what": f"{sensor}: selection at least 1.5 points of mIoU over plain: {mean:+.1f}", "gains": gains, "holds": mean >= 1.5}
        )
        plain = [rows["late, plain"] for rows in results]
        leads = [told[f"{sensor} AUC entangled"] - told[f"{sensor} AUC single"] for told in plain]
        what = f"{sensor}: entangled confidence ranks wrong labels better in every seed: at least {min(leads):+.1f}"
        found.append({"what": what, "gains": leads, "holds": min(leads) > 0})
    return found
