"""Several frozen runs as one teacher: their probabilities averaged late, with a weight for each run and class that was fitted on
validation shards (AVCER, Ryumina et al. 2024, arXiv 2403.12687)."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, StringConstraints
from torch import Tensor, nn

from pipeline.config import ConfigError, digest
from pipeline.data.decode import Decoder
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.fields import join
from pipeline.data.lanes import Rows
from pipeline.data.sources import SourceConfig, Sources
from pipeline.evaluation.late_fusion import Fusion, class_weights, model_weights
from pipeline.teachers import live
from pipeline.teachers.base import Teacher, TeacherConfig, seen

ROWS = 256  # that the members look at together when the weights are fitted


class Config(TeacherConfig):
    """Gives `probabilities` [b, classes] whose rows sum to 1: what logit_kd takes with `target: probabilities`. A member counts where its
    modality is there.

    Every start runs the members over the validation shards, on every rank; cached by tools.cache_teacher that is done once.
    """

    members: dict[Annotated[str, StringConstraints(pattern=r"^[^.]+$")], live.Config] = Field(
        min_length=2, description="live teachers by name, whose towers give logits of the same classes"
    )
    validation: str | None = Field(
        None, description="folder of labelled shards that the weights are fitted on: not the training shards, and no test afterwards"
    )
    hierarchical: bool = Field(False, description="also a weight for each member, by AVCER's grid")
    draws: int = Field(2000, ge=1, description="weights that are tried; the first are those of the plain mean")

    def gives(self) -> tuple[str, ...]:
        return ("probabilities",)

    def decoders(self) -> dict[str, Decoder]:
        return join({f"members.{name}": member.decoders() for name, member in self.members.items()})

    def open(self, sources: Sources) -> "Fused":
        if self.validation is None or sources.classes is None:
            missing = "validation: the folder of labelled shards" if self.validation is None else "data.classes: the classes of the shards"
            raise ConfigError(f"teachers: fused: weights are fitted by labels; give {missing}")
        if without := [name for name, member in self.members.items() if "logits" not in member.gives()]:
            raise ConfigError(f"teachers: fused: members.{without[0]}: its tower gives no logits; train one with `classes`")
        given = {name: sources.modalities[name] for name in self.reads() if name in sources.modalities}
        held = Sources.open(sources.config.model_copy(update={"sources": [SourceConfig(url=self.validation)], "modalities": given}))
        if held.indices[0].digest in [index.digest for index in sources.indices]:
            raise ConfigError(
                f"teachers: fused: validation: {self.validation}: training reads these shards, and its members know them; give others"
            )
        members = {name: member.open(sources) for name, member in self.members.items()}
        settings = [held.digest, self.hierarchical, self.draws, {name: member.digest for name, member in members.items()}]
        fused = Fused(members, {name: member.reads() for name, member in self.members.items()}, digest(settings))
        fused.fit(Fetch(held, self.decoders(), seed=None), self)
        return fused


class Fused(Teacher):
    """Members, and the fitted weights float32 [members, classes]."""

    def __init__(self, members: dict[str, Teacher], reads: dict[str, tuple[str, ...]], digest: str) -> None:
        super().__init__()
        self.members, self.reads, self.digest = nn.ModuleDict(members), reads, digest
        self.fitted: Fusion | None = None

    def said(self, fields: dict[str, Tensor]) -> Tensor:
        """float32 [members, b, classes]: probabilities, zeros where a member has seen nothing. Raises ConfigError for other numbers of classes."""
        first = next(iter(fields.values()))
        some = torch.ones(len(first), dtype=torch.bool, device=first.device)
        found = {}
        for name, member in self.members.items():
            found[name] = member(fields)["logits"].float().softmax(1) * seen(fields, self.reads[name], some)[:, None]
        if len({value.shape[1] for value in found.values()}) > 1:
            sizes = ", ".join(f"{name} {value.shape[1]}" for name, value in found.items())
            raise ConfigError(f"teachers: fused: expected members with the same classes, found logits of {sizes}")
        return torch.stack([*found.values()])

    @torch.no_grad()
    def fit(self, fetch: Fetch, config: Config) -> None:
        """The weights, on the labelled rows of validation that some member can see. Raises DataError where there is none."""
        self.eval()
        parts = [(self.said(batch.fields)[:, batch.valid], batch.fields["label"][batch.valid]) for batch in _batches(fetch)]
        said, label = torch.cat([part[0] for part in parts], 1).numpy(), torch.cat([part[1] for part in parts]).numpy()
        use = (label >= 0) & (said.sum((0, 2)) > 0)
        if not use.any():
            raise DataError(
                f"teachers: fused: validation: {config.validation}: no sample has both a label and a modality that a member reads"
            )
        said, label = said[:, use], label[use]
        if label.max() >= said.shape[2]:
            raise ConfigError(f"teachers: fused: a sample is of class {label.max()}, the members have logits of {said.shape[2]}")
        self.fitted = class_weights(said, label, draws=config.draws)
        if config.hierarchical:
            self.fitted = model_weights(said, label, self.fitted)
        weights = self.fitted.classes * self.fitted.models[:, None]
        self.register_buffer("weights", torch.from_numpy(weights).float(), persistent=False)

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        mixed = torch.einsum("mc,mbc->bc", self.weights, self.said(fields))
        return {"probabilities": mixed / mixed.sum(1, keepdim=True).clamp_min(1e-12)}


def _batches(fetch: Fetch) -> Iterator:
    for first in range(0, fetch.sources.num_samples, ROWS):
        rows = np.arange(first, min(first + ROWS, fetch.sources.num_samples))
        found = fetch[Rows(rows, rows, np.zeros_like(rows))]
        if isinstance(found, DataError):
            raise found
        yield found
