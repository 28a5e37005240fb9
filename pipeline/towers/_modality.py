"""What the towers of one field share: a small encoder, an embedding, logits if asked for, and zeros for rows that lack the modality."""

import itertools
import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import ConfigError, unknown
from pipeline.towers.base import Tower, TowerConfig


class ModalityConfig(TowerConfig):
    """An encoder of one field. `arch`: conv, vit, mlp, or a model of timm by its name (one with batch norm also learns from the zeros
    of absent rows; the three others do not)."""

    field: str
    arch: str = "conv"
    width: int = Field(64, ge=8, multiple_of=8, description="channels of conv, columns of vit, units of mlp")
    layers: int = Field(4, ge=1)
    patch: int = Field(8, ge=1, description="side of vit's patches")
    embed_dim: int = Field(128, ge=1)
    classes: int | None = Field(None, ge=2, description="adds logits of as many classes, a linear map of the embedding")

    def reads(self) -> tuple[str, ...]:
        return (self.field,)

    def gives(self) -> tuple[str, ...]:
        return ("embedding", "logits") if self.classes else ("embedding",)

    def encoder(self, shape: tuple[int, int, int]) -> nn.Module:
        """float32 [b, *shape] -> [b, embed_dim]. Raises ConfigError."""
        channels, height, width = shape
        if self.arch == "conv":
            return conv(channels, self.width, self.layers, self.embed_dim)
        if self.arch == "mlp":
            columns = [math.prod(shape), *[self.width] * self.layers]
            hidden = [part for a, b in itertools.pairwise(columns) for part in (nn.Linear(a, b), nn.ReLU())]
            return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(columns[-1], self.embed_dim))
        import timm

        if self.arch == "vit":
            rest = (-width % self.patch, -height % self.patch)
            size = {"img_size": (height + rest[1], width + rest[0]), "patch_size": self.patch, "in_chans": channels}
            heads = next(n for n in (self.width // 64, self.width // 32, 1) if n and self.width % n == 0)
            body = {"embed_dim": self.width, "depth": self.layers, "num_heads": heads, "num_classes": self.embed_dim, "global_pool": "avg"}
            model = timm.models.vision_transformer.VisionTransformer(**size, **body, class_token=False)
            return nn.Sequential(nn.ZeroPad2d((0, rest[0], 0, rest[1])), model)
        if self.arch not in timm.list_models():
            known = ("conv", "vit", "mlp", *timm.list_models(f"{self.arch[:3]}*")[:20])
            raise ConfigError(f"towers: {self.name}: {unknown('arch', self.arch, known)}")
        return timm.create_model(self.arch, in_chans=channels, num_classes=self.embed_dim)


def conv(channels: int, width: int, layers: int, out: int) -> nn.Module:
    """Strided 3 x 3 convolutions, doubling up to 4 x width, and the mean over places. Group norm: absent rows sway no other row."""
    sizes = [channels, *(width * 2 ** min(layer, 2) for layer in range(layers))]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2 if at else 1, 1, bias=False), nn.GroupNorm(8, b), nn.GELU())
        for at, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], out))


def present(field: str, fields: dict[str, Tensor]) -> Tensor:
    """float32 [b, 1]: 1 for the rows that have the field, by the field `<name>.present`; all without it."""
    found, like = fields.get(f"{field}.present"), fields[field]
    return torch.ones(len(like), 1, device=like.device) if found is None else found.to(like.device, torch.float32)[:, None]


class Modality(Tower):
    """Gives `embedding` [b, embed_dim], of any length, and `logits` [b, classes], float32; zeros in rows that lack the field. Nothing
    where the batch has no such field."""

    def __init__(self, config: ModalityConfig, shape: tuple[int, int, int], prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.field, self.prepare = config.field, prepare
        self.encoder = config.encoder(shape)
        self.head = nn.Linear(config.embed_dim, config.classes) if config.classes else None

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.field not in fields:
            return {}
        there = present(self.field, fields)
        embedding = self.encoder(self.prepare(fields[self.field]))
        out = {"embedding": embedding.float() * there}  # times 0, not left out: every parameter keeps a gradient, as ZeRO and DDP want
        if self.head is not None:
            out["logits"] = self.head(embedding).float() * there
        return out
