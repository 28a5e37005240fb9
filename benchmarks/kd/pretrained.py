"""Tux Paint once more, with teachers that learnt elsewhere: MiniLM reads the caption, efficientnet-lite0 sees the picture at 224 px,
resemblyzer hears the speech. The student sees the picture at 32 px, as in tuxpaint.py; `probe` is a linear classifier on all three."""

import functools
import os
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.kd import tuxpaint
from benchmarks.kd.loop import compared
from benchmarks.kd.real import WIDTH, Data, Fields, Methods, Parts, split
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.sources import DataConfig, ModalityConfig, SourceConfig, Sources
from pipeline.evaluation.recognition import recognition
from pipeline.objectives import crd, feature_kd, logit_kd
from pipeline.objectives.base import ObjectiveConfig
from pipeline.teachers import pretrained

MEMBERS = {"photo": ["image.png"], "words": ["txt"], "voice": tuxpaint.MEMBERS["speech"]}
TEACHERS = {
    "photo": pretrained.Config(model="efficientnet-lite0", field="photo"),
    "words": pretrained.Config(model="minilm", field="words"),
    "voice": pretrained.Config(model="resemblyzer", field="voice"),
}
WIDTHS = {"photo": 1280, "words": 384, "voice": 256}


@torch.inference_mode()
def embedded() -> Fields:
    """`<teacher>.embedding` and `<teacher>.present` of every stamp, train split first, as tuxpaint.data() has them."""
    folder = os.environ.get("TUXPAINT", "data/tuxpaint")
    given = [SourceConfig(url=f"{folder}/{part}") for part in ("train", "test")]
    found: Fields = {}
    for name, config in TEACHERS.items():
        modalities = {name: ModalityConfig(members=MEMBERS[name], optional=True)}
        sources = Sources.open(DataConfig(sources=given, modalities=modalities, batch=1, cache="off"))
        teacher, fetch = config.open(sources).eval(), Fetch(sources, config.decoders(), seed=None)
        rows, there = [], []
        for ids in np.array_split(np.arange(sources.num_samples), -(-sources.num_samples // 32)):
            batch = fetch[Rows(ids, ids, np.zeros_like(ids))]
            rows.append(teacher(batch.fields)["embedding"])
            there.append(batch.fields[f"{name}.present"])
        found |= {f"{name}.embedding": torch.cat(rows), f"{name}.present": torch.cat(there)}
    return found


@functools.cache
def data() -> tuple[Data, list[str]]:
    """Tux Paint, with what the teachers say of each stamp."""
    found, motifs = tuxpaint.data()
    return found._replace(fields=found.fields | embedded()), motifs


def probe(parts: Parts, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities of the training rows and of the test rows, by a logistic regression on all teachers' features. A labelled training
    row is judged by a fit without it, for else the probabilities are the labels."""
    x, _, test = (
        torch.cat([part[f"{name}.embedding"] * part[f"{name}.present"][:, None] for name in TEACHERS], 1).numpy() for part in parts
    )
    label = parts.train["label"].numpy()
    known = label >= 0
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    folds = StratifiedKFold(4, shuffle=True, random_state=seed)
    inside = cross_val_predict(model, x[known], label[known], cv=folds, method="predict_proba")
    fitted = model.fit(x[known], label[known])
    said = fitted.predict_proba(x)
    said[known] = inside
    return torch.from_numpy(said).float(), torch.from_numpy(fitted.predict_proba(test)).float()


def standard(rows: Tensor, there: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1 over the training rows that are there, so that one weight suits all teachers."""
    known = rows[there]
    return (rows - known.mean(0)) / known.std(0).clamp_min(1e-4)


def distilled() -> dict[str, dict[str, ObjectiveConfig]]:
    """The methods; the weights are those of tuxpaint.py, nothing was tried here."""
    found: dict[str, dict[str, ObjectiveConfig]] = {}
    for name, title in (("photo", "lite0"), ("words", "MiniLM"), ("voice", "resemblyzer")):
        given = {"teacher": f"{name}.embedding", "student_width": WIDTH, "teacher_width": WIDTHS[name]}
        found[f"feature KD, {title}"] = {"kd": feature_kd.Config(weight=1.0, **given)}
        found[f"CRD, {title}"] = {"kd": crd.Config(weight=0.5, negatives="batch", temperature=0.1, projection=WIDTH, **given)}
    soft = logit_kd.Config(weight=tuxpaint.PROBLEM.weights["logit_kd"], teacher="probe.probabilities", target="probabilities")
    found["logit KD, probe"] = {"kd": soft}
    found["logit KD, probe + CRD, MiniLM"] = {"kd": soft, "crd": found["CRD, MiniLM"]["kd"]}
    return found


def run(seed: int) -> dict[str, dict[str, float]]:
    """Test figures in percent by method."""
    found, motifs = data()
    problem = tuxpaint.PROBLEM.but(inputs={"image": tuxpaint.PROBLEM.inputs["image"]})
    methods = Methods(problem, split(found.fields, motifs, problem.labelled, seed), seed)
    inside, outside = probe(methods.parts, seed)
    train = methods.parts.train
    frozen = {f"{name}.present": train[f"{name}.present"] for name in TEACHERS}
    frozen |= {f"{name}.embedding": standard(train[f"{name}.embedding"], train[f"{name}.present"]) for name in TEACHERS}
    frozen["probe.probabilities"] = inside
    results = {"no teacher": methods.measure(methods.fit(methods.tower("image")))}
    for name, objectives in distilled().items():
        results[name] = methods.measure(methods.fit(methods.tower("image"), objectives, frozen))
    right = recognition(outside, methods.parts.test["label"])
    return results | {"probe": {"accuracy": 100 * right["accuracy"], "macro-F1": 100 * right["macro_f1"]}}


def bars(results: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """What is compared; nothing is promised."""
    columns = ("accuracy", "macro-F1", "R@1", "mAP")
    return compared(results, [(column, name, "no teacher", 0.0, None) for column in columns for name in distilled()])
