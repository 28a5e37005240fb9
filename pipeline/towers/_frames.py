"""The image encoder of a video tower, run on every frame or tubelet of a clip. Its weights keep the names that they have in open_clip."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, digest
from pipeline.towers._temporal import central
from pipeline.towers.base import normalise_pixels, plain_attention
from pipeline.weights import digest_of

if TYPE_CHECKING:
    from pipeline.towers.video import Config


class Tubelets(nn.Conv3d):
    """[n, 3, t, H, W] -> [n, width, H / p, W / p], in the place of an image encoder's patch embedding."""

    def __init__(self, patches: nn.Conv2d, frames: int) -> None:
        size = (frames, *patches.kernel_size)
        super().__init__(3, patches.out_channels, size, stride=size, bias=patches.bias is not None)
        with torch.no_grad():
            self.weight.copy_(central(patches.weight, frames))

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).squeeze(2)


class Frames(nn.Module):
    """Clips uint8 [b, frames, 3, H, W] -> features [b, t, embed_dim], and with attnpool patches [b, t, n, width], else None."""

    def __init__(self, config: "Config") -> None:
        super().__init__()
        self.visual, mean, std = _open_clip(config) if config.model else (_vit(config), (0.5,) * 3, (0.5,) * 3)
        self.tubelet, self.chunk, self.patches = config.tubelet, config.chunk, config.adapter == "attnpool"
        is_vit = hasattr(self.visual, "conv1") and hasattr(self.visual, "class_embedding")
        if not is_vit and (self.tubelet > 1 or self.patches):
            raise ConfigError(
                f"towers: video: {config.model}: only a ViT of open_clip's own has tubelets and patches; set tubelet: 1, no attnpool"
            )
        if self.tubelet > 1:
            self.visual.conv1 = Tubelets(self.visual.conv1, self.tubelet)
        if self.patches:
            self.visual.output_tokens = True
        self.recomputes = config.gradient_checkpointing and not config.keeps_frames
        if self.recomputes:
            self.visual.set_grad_checkpointing()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, length = clips.shape[0], clips.shape[1] // self.tubelet
        pixels = clips.unflatten(1, (length, self.tubelet)).flatten(0, 1)
        parts = [self._encode(piece) for piece in pixels.split(self.chunk or len(pixels))]
        frames, *patches = (torch.cat(values).unflatten(0, (rows, length)) for values in zip(*parts))
        return frames, patches[0] if patches else None

    def _encode(self, tubelets: Tensor) -> tuple[Tensor, ...]:
        pixels = normalise_pixels(tubelets, self.mean, self.std)
        pixels = pixels[:, 0] if self.tubelet == 1 else pixels.transpose(1, 2)
        with plain_attention(pixels.device, self.recomputes):
            found = self.visual(pixels)
        return found if self.patches else (found,)


def fingerprint(config: "Config", weights: Mapping[str, Tensor], patches: bool) -> str:
    """What the features of a middle clip depend on besides the video; `weights`: of Frames."""
    clip = config.clip
    return digest([clip.frames, clip.stride, clip.size, clip.short, config.tubelet, patches, digest_of(dict(weights))])


def _vit(config: "Config") -> nn.Module:
    """A pre-norm ViT as ViViT has it: no norm before the blocks."""
    from open_clip.transformer import VisionTransformer

    size, width = config.clip.size, config.width
    if size % config.patch or width % config.heads:
        raise ConfigError(
            f"towers: video: clip.size {size} and width {width}: expected multiples of patch {config.patch} and heads {config.heads}"
        )
    visual = VisionTransformer(size, config.patch, width, config.layers, config.heads, 4.0, output_dim=config.embed_dim, no_ln_pre=True)
    for tokens in (visual.class_embedding, visual.positional_embedding):
        nn.init.normal_(tokens, std=config.token_std)
    return visual


def _open_clip(config: "Config") -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The image tower of a model with its mean and standard deviation. Raises ConfigError."""
    from open_clip.model import CustomTextCLIP

    from pipeline.towers.open_clip import Config as Model

    model = Model(model=config.model)
    described = model.model_config_()
    size = described["vision_cfg"].get("image_size", 224)
    if (described["embed_dim"], size) != (config.embed_dim, config.clip.size):
        raise ConfigError(
            f"towers: video: {config.model}: embeds images of {size} pixels in {described['embed_dim']} columns, found clip.size "
            f"{config.clip.size} and embed_dim {config.embed_dim}; set them to the model's"
        )
    small = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}  # the text tower is thrown away
    made = CustomTextCLIP(described["embed_dim"], described["vision_cfg"], small, described.get("quick_gelu", False))
    pixels = model.preprocess_config()
    return made.visual, pixels["mean"], pixels["std"]
