"""What the experiments on real data share: shards in memory, splits by motif, and every method of the table on the same rows.

Half of the table is a student that sees one modality at test time, whatever it was trained with; in the other half all modalities are
there at test time too. All rows are trained on, `labelled` of them with their label: a teacher that sees more helps a student that is short
of labels, or whose own modality is hard.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.kd.loop import compared, features, train
from pipeline.config import ConfigError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.sources import DataConfig, ModalityConfig, SourceConfig, Sources
from pipeline.evaluation.guide import ume
from pipeline.evaluation.late_fusion import class_weights
from pipeline.evaluation.recognition import recognition
from pipeline.evaluation.retrieval import class_retrieval
from pipeline.objectives import amid, crd, cross_entropy, feature_kd, logit_kd, umt
from pipeline.objectives.base import ObjectiveConfig
from pipeline.task import Task
from pipeline.towers import fusion
from pipeline.towers._modality import ModalityConfig as Encoder
from pipeline.towers.base import TowerData

Fields = dict[str, Tensor]
WIDTH = 64


@dataclass(frozen=True)
class Problem:
    """Encoders by modality, the first one the student's, and how they are trained."""

    inputs: dict[str, Encoder]
    classes: int
    labelled: int = 10**9
    epochs: int = 15
    batch: int = 64
    lr: float = 1e-3
    weights: dict[str, float] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="kd-")))  # of tokenizers

    def but(self, **changes: Any) -> "Problem":
        """This one with other settings."""
        return dataclasses.replace(self, **changes)


class Parts(NamedTuple):
    """The rows of one seed. train: label -1 where it is hidden, `truth` with all of them."""

    train: Fields
    validation: Fields
    test: Fields


class Data(NamedTuple):
    """Every sample of a set."""

    fields: Fields
    captions: list[str]
    about: list[dict]  # the json members


def read(folder: str, problem: Problem, members: dict[str, list[str]], classes: Sequence[str]) -> Data:
    """Both splits of data/<set>, decoded once, `<field>.present` with every field. Raises ConfigError where the shards are not there."""
    urls = [f"{folder}/{split}" for split in ("train", "test")]
    if not all(Path(url, "index.parquet").is_file() for url in urls):
        name = Path(folder).name
        raise ConfigError(f"{urls[0]}: no shards; python -m tools.make_shards {name} {urls[0]} --split train --size 32, likewise test")
    given = [SourceConfig(url=url) for url in urls]
    plain = Sources.open(DataConfig(sources=given, batch=1, cache="off"))
    every = np.arange(plain.num_samples)
    members_of = [plain.members(row) for row in every.tolist()]
    captions = [one["txt"].decode() for one in members_of]
    for tower in problem.inputs.values():
        tower.prepare(TowerData(problem.folder, lambda: captions))
    decoders = {name: d for tower in problem.inputs.values() for name, d in tower.decoders(problem.folder, train=False).items()}
    modalities = {name: ModalityConfig(members=members.get(name), optional=True) for name in decoders}
    sources = Sources.open(DataConfig(sources=given, modalities=modalities, classes=list(classes), batch=1, cache="off"))
    batch = Fetch(sources, decoders, seed=None)[Rows(every, every, np.zeros_like(every))]
    return Data(batch.fields, captions, [json.loads(one["json"]) for one in members_of])


def split(fields: Fields, motifs: list[str], labelled: int, seed: int) -> Parts:
    """A quarter of the motifs is the test, 15 % validation, labelled rows only; of the others `labelled` rows keep their label."""
    rng, names = np.random.default_rng(seed), sorted(set(motifs))
    place = dict(zip(names, rng.random(len(names))))
    where, known = np.array([place[motif] for motif in motifs]), fields["label"].numpy() >= 0
    rows = (where >= 0.4, (where >= 0.25) & (where < 0.4) & known, (where < 0.25) & known)
    parts = Parts(*({name: value[torch.from_numpy(chosen)] for name, value in fields.items()} for chosen in rows))
    label = parts.train["label"].numpy()
    hidden = rng.permutation(np.flatnonzero(label >= 0))[labelled:]
    shown = torch.from_numpy(np.where(np.isin(np.arange(len(label)), hidden), -1, label))
    return parts._replace(train=parts.train | {"label": shown, "truth": parts.train["label"]})


class Methods:
    """All methods of the table on one seed's rows. Frozen teachers are a trained task's features on the training rows."""

    def __init__(self, problem: Problem, parts: Parts, seed: int) -> None:
        self.p, self.parts, self.seed = problem, parts, seed
        self.names, self.primary = list(problem.inputs), next(iter(problem.inputs))
        share = float((parts.train["label"] >= 0).float().mean())
        self.task = {"weight": 1 / share}  # cross_entropy is a mean over all rows, those without a label as 0

    def run(self) -> dict[str, dict[str, float]]:
        """Test figures in percent by method."""
        alone = {name: self.fit(self.tower(name)) for name in self.names}
        joint = self.fit(self.tower(*self.names))
        said = {name: self.probabilities(task) for name, task in (alone | {"joint": joint}).items()}
        fusing = class_weights(np.stack([p[1] for p in said.values()]), self.parts.validation["label"].numpy(), draws=2000)
        mixed = [fusing.fuse(np.stack([p[part] for p in said.values()])) for part in range(3)]
        mean = ume(np.stack([said[name][2] for name in self.names]), self.present(2))
        teacher = {f"teacher.{key}": value for key, value in features(joint, self.parts.train).items() if key in ("embedding", "logits")}
        teacher["fused.probabilities"] = torch.from_numpy(mixed[0]).float()
        results = {"no teacher": self.measure(alone[self.primary])}
        results |= {name: self.measure(self.fit(self.tower(self.primary), kd, teacher)) for name, kd in self.distilled().items()}
        results["AMID"] = self.measure(self.amid())
        results |= {f"{name} alone": self.measure(alone[name]) for name in self.names[1:]}
        results["joint"] = self.measure(joint)
        results["UMT"] = self.measure(self.umt(alone))
        return results | {"UME": self.figures(torch.from_numpy(mean)), "AVCER": self.figures(torch.from_numpy(mixed[2]))}

    def distilled(self) -> dict[str, dict[str, ObjectiveConfig]]:
        """What a student of one modality learns from a frozen teacher of all of them."""
        widths, at = {"student_width": WIDTH, "teacher_width": WIDTH}, self.p.weights
        fused = {"teacher": "fused.probabilities", "target": "probabilities"}
        return {
            "logit KD": {"kd": logit_kd.Config(weight=at.get("logit_kd", 0.5))},
            "logit KD, fused": {"kd": logit_kd.Config(weight=at.get("logit_kd", 0.5), **fused)},
            "feature KD": {"kd": feature_kd.Config(weight=at.get("feature_kd", 1.0), **widths)},
            "CRD": {"kd": crd.Config(weight=at.get("crd", 0.5), temperature=0.1, projection=WIDTH, **widths)},
        }

    def tower(self, *names: str) -> nn.Module:
        """One modality's encoder, or several fused, with the seed's initial weights."""
        torch.manual_seed(self.seed)
        sized = {name: self.p.inputs[name].model_copy(update={"embed_dim": WIDTH}) for name in names}
        if len(names) == 1:
            return sized[names[0]].model_copy(update={"classes": self.p.classes}).build(self.p.folder)
        return fusion.Config(inputs=sized, hidden=WIDTH, embed_dim=WIDTH, classes=self.p.classes).build(self.p.folder)

    def fit(
        self, student: nn.Module, more: dict[str, ObjectiveConfig] | None = None, frozen: Fields | None = None, **others: nn.Module
    ) -> Task:
        """Trains on the training rows, every method on the same batches; each tower has its own task loss."""
        p, towers = self.p, {"student": student} | others
        features_of = {
            "task" if name == "student" else f"{name}_task": "logits" if name == "student" else f"{name}.logits" for name in towers
        }
        objectives = {name: cross_entropy.Config(feature=feature, **self.task) for name, feature in features_of.items()}
        settings = {"epochs": p.epochs, "seed": self.seed, "batch": p.batch, "lr": p.lr, "frozen": frozen}
        return train(towers, objectives | (more or {}), self.parts.train, **settings)

    def amid(self) -> Task:
        """A teacher of all modalities and a tower of the auxiliary ones, both trained along."""
        widths = dict.fromkeys(("student_width", "teacher_width", "auxiliary_width", "projection"), WIDTH)
        at = self.p.weights
        terms = {
            "student_weight": at.get("amid_s", 0.2),
            "auxiliary_weight": at.get("amid_a", 0.2),
            "adversarial_weight": at.get("amid_h", 1.0),
        }
        config = {"amid": amid.Config(**widths, **terms)}
        return self.fit(self.tower(self.primary), config, teacher=self.tower(*self.names), auxiliary=self.tower(*self.names[1:]))

    def umt(self, alone: dict[str, Task]) -> Task:
        """All modalities at test time; each encoder is held to its frozen uni-modal twin."""
        frozen = {f"{name}.twin": features(task, self.parts.train)["embedding"] for name, task in alone.items()}
        settings = {"student_width": WIDTH, "teacher_width": WIDTH, "weight": self.p.weights.get("umt", 0.1)}
        present = {name: f"{self.p.inputs[name].field}.present" for name in self.names}
        held = {f"umt_{n}": umt.Config(student=f"{n}.embedding", teacher=f"{n}.twin", present=present[n], **settings) for n in self.names}
        return self.fit(self.tower(*self.names), held, frozen)

    def probabilities(self, task: Task) -> list[np.ndarray]:
        """Of train, validation and test rows."""
        return [features(task, part)["logits"].softmax(1).numpy() for part in self.parts]

    def present(self, part: int) -> np.ndarray:
        """bool [M, N] of the ensemble's models."""
        return np.stack([self.parts[part][f"{tower.field}.present"].numpy() for tower in self.p.inputs.values()])

    def measure(self, task: Task) -> dict[str, float]:
        """Of the student: recognition on test rows, and retrieval of them among the training rows."""
        found, gallery = features(task, self.parts.test), features(task, self.parts.train)
        near = class_retrieval(found["embedding"], gallery["embedding"], self.parts.test["label"], self.parts.train["truth"], ks=(1, 5))
        return self.figures(found["logits"]) | {name: 100 * near[key] for name, key in (("R@1", "r1"), ("R@5", "r5"), ("mAP", "map"))}

    def figures(self, logits: Tensor) -> dict[str, float]:
        """Accuracy and macro-F1."""
        found = recognition(logits, self.parts.test["label"])
        return {"accuracy": 100 * found["accuracy"], "macro-F1": 100 * found["macro_f1"]}


def against_no_teacher(results: list[dict[str, dict[str, float]]], prefix: str = "") -> list[dict]:
    """Every method beside its own baseline, seed by seed: a student that saw one modality beside one without a teacher, one that sees all
    beside joint training."""
    rows = [(name, "no teacher") for name in ("logit KD", "logit KD, fused", "feature KD", "CRD", "AMID")]
    rows += [(name, "joint") for name in ("UMT", "UME", "AVCER")] + [("AMID", "logit KD")]
    columns = ("accuracy", "macro-F1", "R@1", "mAP")
    bars = [(column, prefix + better, prefix + worse, 0.0, None) for column in columns for better, worse in rows]
    return compared(results, [bar for bar in bars if bar[0] in results[0][bar[1]]])
