"""The smallest pair of towers that learns: one linear map of the pixels, one mean of token embeddings. For debugging, tests and grids of
many runs."""

import itertools
import math
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.decode import Decoder, ImageDecoder, Resize, TextDecoder
from pipeline.data.text import BpeTokenizer, train_bpe
from pipeline.towers.base import Tower, TowerConfig, TowerData, normalise_pixels


class Config(TowerConfig):
    """A few thousand parameters; starts without torchvision or open_clip."""

    image_size: int = Field(16, ge=1)
    width: int = Field(32, ge=2)
    hidden: int = Field(
        0, ge=0, description="units of each of two hidden layers under the image's linear map; 0: none. They can memorise pairs"
    )
    context: int = Field(12, ge=4)
    vocab_size: int = Field(1024, ge=300)
    dropout: float = Field(0.0, ge=0, lt=1)

    def reads(self) -> tuple[str, ...]:
        return ("image", "text")

    def gives(self) -> tuple[str, ...]:
        return ("image", "text", "scale")

    def prepare(self, data: TowerData) -> None:
        train_bpe(data.captions(), self.vocab_size, data.folder / "tokenizer.json")

    def files(self) -> tuple[str, ...]:
        return ("tokenizer.json",)

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return {
            "image": ImageDecoder(self.image_size, Resize(self.image_size)),
            "text": TextDecoder(BpeTokenizer(folder / "tokenizer.json", self.context)),
        }

    def build(self, folder: Path) -> "Linear":
        return Linear(self, BpeTokenizer(folder / "tokenizer.json", self.context).vocab_size)


class Linear(Tower):
    """Gives unit rows `image` and `text` [b, width], and `scale` [1]."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        sizes = [3 * config.image_size**2, *[config.hidden] * (2 if config.hidden else 0)]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU())]
        last = nn.Linear(sizes[-1], config.width)
        self.image = nn.Sequential(*layers, last) if layers else last
        self.text = nn.EmbeddingBag(vocab_size, config.width, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.register_buffer("mean", torch.full((3,), 0.5), persistent=False)
        self.register_buffer("std", torch.full((3,), 0.5), persistent=False)

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {"scale": self.logit_scale.exp()}
        if "image" in fields:
            pixels = normalise_pixels(fields["image"], self.mean, self.std).flatten(1)
            out["image"] = F.normalize(self.image(self.dropout(pixels)).float(), dim=-1)
        if "text" in fields:
            out["text"] = F.normalize(self.text(fields["text"]).float(), dim=-1)
        return out

    def bounds(self) -> list[tuple[torch.nn.Parameter, float, float]]:
        return [(self.logit_scale, 0.0, math.log(100))]
