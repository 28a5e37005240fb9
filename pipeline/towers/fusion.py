"""Several modalities in one feature: an encoder for each, fused late by concatenation and an MLP, by a gate, or as an ensemble (UME)."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import component
from pipeline.data.decode import Decoder
from pipeline.data.fields import join
from pipeline.towers._modality import ModalityConfig, present
from pipeline.towers.base import Tower, TowerConfig, TowerData

InputField = component("pipeline.towers", TowerConfig)


class Config(TowerConfig):
    """`inputs`: towers of one field each (image, audio, text), by a name of their own.

    `fuse: ensemble` is UME (Du et al., ICML 2023): nothing is learnt jointly. Each input has logits of its own, to be trained by an
    objective of its own (`feature: line.logits`); `logits` are the log of the mean probability, `embedding` is all inputs' side by side.
    """

    inputs: dict[str, InputField] = Field(min_length=1)
    fuse: Literal["concat", "gate", "ensemble"] = "concat"
    hidden: int = Field(128, ge=1, description="units of the fusing MLP's hidden layer; an ensemble has none")
    embed_dim: int = Field(128, ge=1)
    classes: int | None = Field(None, ge=2, description="adds logits of as many classes, a linear map of the embedding")

    @model_validator(mode="after")
    def _one_field_each(self) -> "Config":
        for name, tower in self.inputs.items():
            if not isinstance(tower, ModalityConfig):
                raise ValueError(f"inputs.{name}: {tower.name} gives no embedding of one field; expected image, audio or text")
            if "." in name:
                raise ValueError(f"inputs.{name}: a name without a dot is expected, it becomes part of the features' names")
        return self

    @model_validator(mode="after")
    def _an_ensemble_of_classifiers(self) -> "Config":
        if self.fuse != "ensemble":
            return self
        wrong = [name for name, tower in self.inputs.items() if tower.classes != self.classes or self.classes is None]
        if wrong:
            raise ValueError(f"fuse: ensemble averages probabilities: set classes, and the same in inputs {', '.join(wrong)}")
        if self.embed_dim != (total := sum(tower.embed_dim for tower in self.inputs.values())):
            raise ValueError(f"fuse: ensemble lays the inputs' embeddings side by side: embed_dim must be {total}, found {self.embed_dim}")
        return self

    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for tower in self.inputs.values() for field in tower.reads()))

    def gives(self) -> tuple[str, ...]:
        own = ("embedding", "logits") if self.classes else ("embedding",)
        return (*own, *(f"{name}.{feature}" for name, tower in self.inputs.items() for feature in tower.gives()))

    def prepare(self, data: TowerData) -> None:
        for tower in self.inputs.values():
            tower.prepare(data)

    def files(self) -> tuple[str, ...]:
        return tuple(name for tower in self.inputs.values() for name in tower.files())

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return join({f"inputs.{name}": tower.decoders(folder, train) for name, tower in self.inputs.items()})

    def build(self, folder: Path) -> "Fusion":
        return Fusion(self, {name: tower.build(folder) for name, tower in self.inputs.items()})


class Fusion(Tower):
    """Gives `embedding` [b, embed_dim] and `logits` [b, classes] of all modalities together, and of each input `<input>.embedding` (what
    UMT compares with uni-modal teachers), float32. An absent modality changes nothing; a row without any is zeros."""

    def __init__(self, config: Config, inputs: dict[str, Tower]) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(inputs)
        widths = {name: tower.embed_dim for name, tower in config.inputs.items()}
        total = sum(widths.values()) + len(widths)  # with a flag for each that says whether it is there
        self.mlp = self.gate = self.maps = None
        self.ensemble = config.fuse == "ensemble"
        if config.fuse == "concat":
            self.mlp = nn.Sequential(nn.Linear(total, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.embed_dim))
        elif config.fuse == "gate":
            self.gate = nn.Sequential(nn.Linear(total, config.hidden), nn.GELU(), nn.Linear(config.hidden, len(widths)))
            self.maps = nn.ModuleDict({name: nn.Linear(width, config.embed_dim) for name, width in widths.items()})
        self.widths = widths
        self.head = nn.Linear(config.embed_dim, config.classes) if config.classes and not self.ensemble else None

    def forward(self, fields: dict[str, Tensor], mask: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        some = next((fields[tower.field] for tower in self.inputs.values() if tower.field in fields), None)
        if some is None:
            return {}
        out, embeddings, flags = {}, {}, []
        for name, tower in self.inputs.items():
            given = tower(fields, mask)
            out |= {f"{name}.{feature}": value for feature, value in given.items()}
            embeddings[name] = given.get("embedding", torch.zeros(len(some), self.widths[name], device=some.device))
            flags.append(present(tower.field, fields, mask) if given else torch.zeros(len(some), 1, device=some.device))
        there = torch.cat(flags, 1)
        if self.ensemble:
            return out | {"embedding": torch.cat([*embeddings.values()], 1), "logits": self._mean(out, there)}
        fused = self._fuse(embeddings, there)
        any_there = there.amax(1, keepdim=True)
        out["embedding"] = fused.float() * any_there
        if self.head is not None:
            out["logits"] = self.head(fused).float() * any_there
        return out

    def _mean(self, out: dict[str, Tensor], there: Tensor) -> Tensor:
        """[b, classes]: the log of the mean probability over the modalities that a row has."""
        names = [name for name in self.inputs if f"{name}.logits" in out]
        shares = [there[:, place] for place, name in enumerate(self.inputs) if name in names]
        said = [out[f"{name}.logits"].log_softmax(1) + share.clamp_min(1e-30).log()[:, None] for name, share in zip(names, shares)]
        mean = torch.stack(said).logsumexp(0) - sum(shares).clamp_min(1)[:, None].log()
        return mean * there.amax(1, keepdim=True)

    def _fuse(self, embeddings: dict[str, Tensor], there: Tensor) -> Tensor:
        """[b, embed_dim]; `there` float32 [b, inputs]."""
        together = torch.cat([*embeddings.values(), there], 1)
        if self.mlp is not None:
            return self.mlp(together)
        # finite, so that a row without any modality has weights and no NaN
        weights = self.gate(together).float().masked_fill(there == 0, -1e4).softmax(1)
        mapped = torch.stack([self.maps[name](embedding) for name, embedding in embeddings.items()], 1)
        return (mapped * weights[:, :, None]).sum(1)
