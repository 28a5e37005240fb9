"""U-Nets for co-registered sensors (CromSS, arXiv 2405.01217): one for each, or encoders of their own before one shared decoder and head.

Encoders and decoder are those of segmentation_models_pytorch, with random initial weights. The tower also decodes the label maps and their
priors, so that crops and flips are those of the images. Its encoders go into another run by `init_from`:
`towers: {student.encoders.s2: student.encoders.s2}`.
"""

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError, unknown
from pipeline.data.decode import Decoder
from pipeline.data.maps import Geometry, LabelMapDecoder, MapDecoder
from pipeline.towers.base import Tower, TowerConfig

SHARED = "shared"


class Config(TowerConfig):
    """`fusion: late`: whole U-Nets that share nothing; `middle`: one decoder and head, which each sensor's features go through by itself.
    In either no feature of one sensor reaches another; what they learn from each other comes through the objective."""

    sensors: dict[str, int] = Field({"s1": 2, "s2": 13}, min_length=1, description="field: number of bands")
    fusion: Literal["late", "middle"] = "late"
    classes: int = Field(9, ge=2, le=255)
    tile: int | None = Field(None, ge=1, description="side of the tiles in the shards, in pixels; null: image_size")
    image_size: int = Field(256, ge=1, description="side of what is trained: a random crop of a tile; its middle in evaluation")
    flip: float = Field(0.5, ge=0, le=1, description="how often a training sample is mirrored")
    rotate: float = Field(0.2, ge=0, le=1, description="how often it is turned by 90, 180 or 270 degrees")
    encoder: str = Field("resnet50", description="plain, or an encoder of segmentation_models_pytorch by its name")
    depth: int = Field(5, ge=1, le=5, description="levels of the encoder below full resolution; of plain its levels in all")
    width: int = Field(16, ge=1, description="channels of plain's first level, doubled at each further one")
    decoder_width: int = Field(16, ge=1, description="channels of the decoder's last level, doubled at each one before")
    label: str = Field("segmentation", description="field of the label maps; evaluation may lack them")
    prior: str | None = Field("prior", description="field of the labels' priors, where an objective smooths with them; null: none is read")
    frozen: bool = Field(False, description="the encoders are not trained, batch norm included")

    @model_validator(mode="after")
    def _crops(self) -> "Config":
        if self.tile is not None and self.tile < self.image_size:
            raise ValueError(f"image_size {self.image_size}: is cut from tiles of {self.tile} pixels; lower it, or raise tile")
        if wrong := [name for name in self.sensors if "." in name or name in (SHARED, self.label, self.prior)]:
            raise ValueError(f"sensors.{wrong[0]}: expected a name without a dot that is no other field's and not {SHARED!r}")
        return self

    def reads(self) -> tuple[str, ...]:
        return (*self.sensors, self.label, *([self.prior] if self.prior else []))

    def gives(self) -> tuple[str, ...]:
        return tuple(f"{name}.logits" for name in self.sensors)

    def measured_by(self) -> str:
        return "pipeline.evaluation.segmentation"

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        changes = (self.flip, self.rotate) if train else (0.0, 0.0)
        geometry = Geometry(self.tile or self.image_size, self.image_size, *changes)
        maps: dict[str, Decoder] = {name: MapDecoder(name, bands, geometry) for name, bands in self.sensors.items()}
        maps[self.label] = LabelMapDecoder(self.label, self.classes, geometry)
        if self.prior and train:
            maps[self.prior] = MapDecoder(self.prior, self.classes, geometry, optional=True)
        return maps

    def build(self, folder: Path) -> "UNets":
        if importlib.util.find_spec("segmentation_models_pytorch") is None:
            raise ConfigError(
                "package segmentation_models_pytorch, which holds the U-Nets, is not installed. Install it with "
                "pip install 'dissect-pipeline[segmentation]'"
            )
        return UNets(self)


class UNets(Tower):
    """Gives `<sensor>.logits`, float32 [b, classes, h, w], for the sensors that are there. Bytes become -1 to 1, floats stay.

    A batch has a sensor in all of its rows or in none: ConfigError where data.modalities makes one optional."""

    def __init__(self, config: Config) -> None:
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

        super().__init__()
        self.frozen = config.frozen
        self.encoders = nn.ModuleDict({name: _encoder(config, bands) for name, bands in config.sensors.items()})
        # registered once and under one name: weights that are saved under two are refused by safetensors, and rightly
        self.decoders, self.heads = nn.ModuleDict(), nn.ModuleDict()
        channels = [config.decoder_width * 2**level for level in reversed(range(config.depth))]
        for name in config.sensors if config.fusion == "late" else (SHARED,):
            encoder = self.encoders[name] if name in self.encoders else next(iter(self.encoders.values()))
            self.decoders[name] = UnetDecoder(encoder.out_channels, channels, n_blocks=config.depth)
            self.heads[name] = SegmentationHead(channels[-1], config.classes, kernel_size=3)
            initialize_decoder(self.decoders[name])
            initialize_head(self.heads[name])
        if self.frozen:
            self.encoders.requires_grad_(False)

    def train(self, mode: bool = True) -> "UNets":
        super().train(mode)
        if self.frozen:
            self.encoders.eval()
        return self

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, encoder in self.encoders.items():
            if name in fields:
                if f"{name}.present" in fields:
                    raise ConfigError(
                        f"towers: unet: data.modalities.{name}.optional: blank tiles would be learnt from and scored, in batch norm too; set it "
                        f"to false, rows without the sensor are then bad samples, or leave the sensor out of towers.unet.sensors"
                    )
                part = name if name in self.decoders else SHARED
                with torch.no_grad() if self.frozen else nullcontext():
                    features = encoder(_pixels(fields[name]))
                out[f"{name}.logits"] = self.heads[part](self.decoders[part](features)).float()
        return out


def _pixels(bands: Tensor) -> Tensor:
    return bands if bands.is_floating_point() else bands.float() / 127.5 - 1


def _encoder(config: Config, bands: int) -> nn.Module:
    """Raises ConfigError."""
    from segmentation_models_pytorch.encoders import encoders, get_encoder

    if config.encoder == "plain":
        return Plain(bands, config.width, config.depth)
    if config.encoder not in encoders and not config.encoder.startswith("tu-"):
        known = ("plain", *encoders, "tu-... (any of timm)")
        raise ConfigError(f"towers: unet: {unknown('encoder', config.encoder, known)}")
    try:
        encoder = get_encoder(config.encoder, in_channels=bands, depth=config.depth, weights=None)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"towers: unet: encoder {config.encoder!r} with depth {config.depth} cannot be built: {error}") from None
    return _without_unused(encoder, bands, config.image_size)


def _without_unused(encoder: nn.Module, bands: int, side: int) -> nn.Module:
    """The library builds all five levels at any depth, and some encoders' classifying layers: what gives nothing is not trained, for DDP
    would wait for its gradients."""
    sum(feature.sum() for feature in encoder.eval()(torch.zeros(1, bands, side, side))[1:]).backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    return encoder.train()


class Plain(nn.Module):
    """A small encoder for small maps: at each level two 3 x 3 convolutions with batch norm, from the second on at half the resolution of
    the one before. Its first level has full resolution, which the encoders made for large images leave to the decoder."""

    def __init__(self, bands: int, width: int, depth: int) -> None:
        from segmentation_models_pytorch.base.modules import Conv2dReLU

        super().__init__()
        self.out_channels = [bands, *(width * 2**level for level in range(depth))]
        pairs = zip(self.out_channels, self.out_channels[1:])
        self.levels = nn.ModuleList(
            nn.Sequential(Conv2dReLU(a, b, 3, padding=1, use_norm="batchnorm"), Conv2dReLU(b, b, 3, padding=1, use_norm="batchnorm"))
            for a, b in pairs
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """[b, bands, h, w] -> that and what each level gives, as the decoder wants them."""
        features = [x]
        for place, level in enumerate(self.levels):
            features.append(level(F.max_pool2d(features[-1], 2, ceil_mode=True) if place else x))
        return features
