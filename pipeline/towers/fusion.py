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

    def follows(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(teacher for tower in self.inputs.values() for teacher in tower.follows()))

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
        self.followed = {name: tower.follows() for name, tower in config.inputs.items()}
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

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: tower(fields) for name, tower in self.inputs.items()}
        some = next((given["embedding"] for given in found.values() if given), None)
        if some is None:
            return {}
        out, embeddings, flags = {}, {}, []
        for name, given in found.items():
            out |= {f"{name}.{feature}": value for feature, value in given.items()}
            embeddings[name] = given.get("embedding", some.new_zeros(len(some), self.widths[name]))
            flags.append(self._there(name, fields, some) if given else some.new_zeros(len(some), 1))
        there = torch.cat(flags, 1)
        if self.ensemble:
            return out | {"embedding": torch.cat([*embeddings.values()], 1), "logits": self._mean(out, there)}
        fused = self._fuse(embeddings, there)
        any_there = there.amax(1, keepdim=True)
        out["embedding"] = fused.float() * any_there
        if self.head is not None:
            out["logits"] = self.head(fused).float() * any_there
        return out

    def _there(self, name: str, fields: dict[str, Tensor], like: Tensor) -> Tensor:
        """float32 [b, 1]; an input that takes cached features has them in every valid row."""
        field = self.inputs[name].field
        return present(field, fields) if field in fields else like.new_ones(len(like), 1)

    def fitted(self, name: str, stored: Tensor, like: Tensor) -> Tensor:
        if not name.startswith("inputs."):
            return stored
        _, which, part = name.split(".", 2)
        return self.inputs[which].fitted(part, stored, like)

    def check_followed(self, teacher: str, writer: str) -> None:
        for name, tower in self.inputs.items():
            if teacher in self.followed[name]:
                tower.check_followed(teacher, writer)

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
