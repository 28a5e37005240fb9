"""A factorised video encoder (ViViT's model 2, Arnab et al. 2021): each frame by an image encoder, then a transformer over the frames.

Long clips are trained as SFA-ViViT does (Gowda et al., arXiv 2306.04822): stage 1 trains everything on 8 frames; stage 2 takes all of its
weights over (`init_from`), freezes the frame encoder, puts an adapter behind it and trains adapter, temporal transformer and head on 32
to 128 frames. No gradient enters the frozen part, which costs its forward alone, or nothing where its outputs are cached
(teachers/frames.py). The paper does not publish the adapter's layers nor how positions are stretched: both are our choice.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.data.decode import Decoder
from pipeline.data.video import ClipConfig, VideoDecoder
from pipeline.towers._frames import Frames, fingerprint
from pipeline.towers._modality import ModalityConfig, present
from pipeline.towers._temporal import AttentionPool, Bottleneck, Temporal, central, stretch
from pipeline.towers.base import Tower


class Config(ModalityConfig):
    """Frames are encoded by a ViT of `layers` x `width`, or by the image tower of an open_clip `model`, into embed_dim columns each.

    What init_from.towers takes over, other lengths and all: {student.spatial: student.spatial, student.temporal: student.temporal,
    student.head: student.head} of stage 1; {student.spatial.visual: student.model.visual} of a CLIP run.
    """

    field: str = "video"
    arch: Literal["vit"] = "vit"
    clip: ClipConfig = ClipConfig()
    model: str | dict[str, Any] | None = Field(
        None, description="an open_clip model, by name or as its JSON files hold one; null: a ViT of its own, by patch, width and layers"
    )
    heads: int = Field(4, ge=1, description="of the ViT of its own")
    tubelet: int = Field(2, ge=1, description="frames that are embedded as one; at first only the middle one is looked at")
    temporal_layers: int = Field(2, ge=1)
    temporal_heads: int = Field(4, ge=1)
    pool: Literal["cls", "mean"] = "cls"
    token_std: float = Field(0.02, gt=0, description="of the initial CLS tokens and positions; nets of a few columns need 0.5")
    adapter: Literal["none", "bottleneck", "attnpool"] = Field(
        "none", description="between frames and time, the identity at first; attnpool looks at the patches, which a cache must then hold"
    )
    frozen: bool = Field(False, description="stage 2: the frame encoder keeps its weights, in eval mode; from before the engine starts")
    chunk: int | None = Field(None, ge=1, description="tubelets of all rows that the frame encoder takes at once; null: all")
    cached: str | None = Field(
        None, description="the cached teacher with the frames' features: no video is decoded while training, and the encoder is frozen"
    )
    gradient_checkpointing: bool = Field(False, description="of the frame encoder, where it is trained")

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.clip.frames % self.tubelet:
            raise ValueError(f"clip.frames {self.clip.frames}: expected a multiple of tubelet, {self.tubelet}")
        if self.embed_dim % self.temporal_heads:
            raise ValueError(f"embed_dim {self.embed_dim}: expected a multiple of temporal_heads, {self.temporal_heads}")
        return self

    @property
    def keeps_frames(self) -> bool:
        """Whether the frame encoder is not trained."""
        return self.frozen or self.cached is not None

    def follows(self) -> tuple[str, ...]:
        return (self.cached,) if self.cached else ()

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return {} if self.cached and train else {self.field: VideoDecoder(self.clip, train)}

    def build(self, folder: Path) -> "Video":
        return Video(self)


class Video(Tower):
    """Gives `embedding` [b, embed_dim], of any length, and `logits` [b, classes], float32; several clips of a row (views, crops) are
    averaged; zeros in rows that lack the video. Nothing where the batch has neither the video nor its cached features."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.field = config, config.field
        c = config
        self.spatial = Frames(c)
        width = c.embed_dim
        self.adapter = None
        if c.adapter == "bottleneck":
            self.adapter = Bottleneck(width)
        elif c.adapter == "attnpool":
            self.adapter = AttentionPool(width, self.spatial.visual.conv1.out_channels, c.temporal_heads)
        length = c.clip.frames // c.tubelet
        self.temporal = Temporal(width, c.temporal_layers, c.temporal_heads, length, c.pool == "mean", c.token_std)
        self.head = nn.Linear(width, c.classes) if c.classes else None  # ViViT's begins at zero, which stalls short trainings
        self.spatial.requires_grad_(not c.keeps_frames)  # here, so that no optimizer and no engine ever sees the frozen part as trained

    def train(self, mode: bool = True) -> "Video":
        super().train(mode)
        if self.config.keeps_frames:
            self.spatial.eval()
        return self

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        name, cached = self.field, f"{self.config.cached}.frames"
        if cached in fields:
            patches = fields.get(f"{self.config.cached}.patches")
            embedding = self._over_time(fields[cached].float(), None if patches is None else patches.float())
            there = torch.ones_like(embedding[:, :1])  # rows without cached features are no valid rows
        elif name in fields:
            there = present(name, fields)
            clips = fields[name].unflatten(1, (-1, self.config.clip.frames))
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.keeps_frames):
                encoded = self.spatial(clips.flatten(0, 1))
            embedding = self._over_time(*encoded).unflatten(0, clips.shape[:2]).mean(1)
        else:
            return {}
        out = {"embedding": embedding.float() * there}
        if self.head is not None:
            out["logits"] = self.head(embedding).float() * there
        return out

    def _over_time(self, frames: Tensor, patches: Tensor | None) -> Tensor:
        return self.temporal(frames if self.adapter is None else self.adapter(frames, patches))

    def fitted(self, name: str, stored: Tensor, like: Tensor) -> Tensor:
        if name == "temporal.position" and stored.ndim == 3 and stored.shape[2] == like.shape[2]:
            return stretch(stored, like.shape[1] - 1)
        if name == "spatial.visual.conv1.weight" and (stored.ndim, like.ndim) == (4, 5):
            return central(stored, like.shape[2])
        return stored

    def check_followed(self, teacher: str, writer: str) -> None:
        weights, needs_patches = self.spatial.state_dict(), self.spatial.patches
        if needs_patches and writer == fingerprint(self.config, weights, False):
            raise ConfigError(
                f"towers: video: teachers.{teacher} holds no patches, which adapter: attnpool looks at; write it again with patches: true"
            )
        if writer not in {fingerprint(self.config, weights, patches) for patches in {needs_patches, True}}:
            raise ConfigError(
                f"towers: video: teachers.{teacher} was written by another frame encoder, or for other clips, than this tower evaluates with: "
                f"give init_from the run that wrote it, and the same clip.frames, stride, size, short and tubelet, or write it again"
            )
