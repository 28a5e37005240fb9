"""Any open_clip model: by name, or by an inline model config; with its preprocessing and its tokenizer, or a small BPE."""

import logging
import math
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ConfigError, Strict, unknown
from pipeline.data.decode import Decoder, ImageDecoder, TextDecoder
from pipeline.data.text import BpeTokenizer, train_bpe
from pipeline.towers._views import KEPT, allow_views
from pipeline.towers.base import Tower, TowerConfig, TowerData, normalise_pixels, plain_attention

logging.getLogger("open_clip").setLevel(logging.WARNING)


class TokenizerConfig(Strict):
    """`open_clip`: the model's own tokenizer. `bpe`: trained from the captions, `vocab_size` entries at most, saved in the run."""

    kind: Literal["open_clip", "bpe"] = "open_clip"
    vocab_size: int = Field(4096, ge=300)


class Config(TowerConfig):
    """An open_clip model. `model` is one of `open_clip.list_models()`, or what open_clip's model JSON files hold."""

    model: str | dict[str, Any]
    pretrained: str | None = Field(
        None, description="a tag of that model, or a file (safetensors, or a state dict that loads with weights_only)"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: dict[str, Any] = Field(
        default_factory=dict, description="overrides of open_clip's PreprocessCfg: mean, std, interpolation, resize_mode"
    )
    augmentation: dict[str, Any] | None = Field(
        None, description="open_clip's AugmentationCfg for training; None trains on evaluation's images"
    )
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _known_model(self) -> "Config":
        if isinstance(self.model, dict) and not {"embed_dim", "vision_cfg", "text_cfg"} <= set(self.model):
            raise ValueError(f"an inline model needs embed_dim, vision_cfg and text_cfg; it has {', '.join(self.model) or 'nothing'}")
        if isinstance(self.model, dict) and self.pretrained:
            raise ValueError("pretrained weights belong to a named model; an inline model starts from random weights")
        return self

    def reads(self) -> tuple[str, ...]:
        return ("image", "text")

    def gives(self) -> tuple[str, ...]:
        return ("image", "text", "scale")

    def model_config_(self) -> dict[str, Any]:
        """open_clip's description of the model. Raises ConfigError for an unknown name, with a guess."""
        if isinstance(self.model, dict):
            return deepcopy(self.model)
        import open_clip

        found = open_clip.get_model_config(self.model)
        if found is None:
            raise ConfigError(f"towers: open_clip: {unknown('model', self.model, open_clip.list_models())[:400]}")
        return found

    def context(self) -> int:
        return self.model_config_()["text_cfg"].get("context_length", 77)

    def prepare(self, data: TowerData) -> None:
        if self.tokenizer.kind == "bpe":
            train_bpe(data.captions(), self.tokenizer.vocab_size, data.folder / "tokenizer.json")

    def _tokenizer(self, folder: Path) -> Any:
        import open_clip

        if self.tokenizer.kind == "bpe":
            return BpeTokenizer(folder / "tokenizer.json", self.context())
        if isinstance(self.model, dict):
            return open_clip.SimpleTokenizer(context_length=self.context())
        return open_clip.get_tokenizer(self.model)

    def preprocess_config(self) -> dict[str, Any]:
        """open_clip's PreprocessCfg of this model as a dict: size, mean, std, interpolation, resize_mode."""
        import open_clip
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        values = asdict(PreprocessCfg(size=self.model_config_()["vision_cfg"].get("image_size", 224)))
        if self.pretrained and isinstance(self.model, str):
            values = merge_preprocess_dict(values, open_clip.get_pretrained_cfg(self.model, self.pretrained) or {})
        return merge_preprocess_dict(values, self.preprocess)

    def files(self) -> tuple[str, ...]:
        return ("tokenizer.json",) if self.tokenizer.kind == "bpe" else ()

    def image_decoder(self, train: bool) -> ImageDecoder:
        """How its images are made, for a tower that has nothing else of this model as well."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        preprocess = PreprocessCfg(**self.preprocess_config())
        size = preprocess.size if isinstance(preprocess.size, int) else preprocess.size[0]
        transform = _pixels_only(image_transform_v2(preprocess, is_train=False))
        augmentation = None
        if train and self.augmentation is not None:
            augmentation = _pixels_only(image_transform_v2(preprocess, is_train=True, aug_cfg=self.augmentation))
        return ImageDecoder(size, transform, augmentation)

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return {"image": self.image_decoder(train), "text": TextDecoder(self._tokenizer(folder))}

    def build_visual(self) -> torch.nn.Module:
        """The image tower alone, with its initial weights; needs no tokenizer."""
        return self.model_copy(update={"tokenizer": TokenizerConfig()}).build(Path()).model.visual

    def build(self, folder: Path) -> "OpenClip":
        import open_clip
        from open_clip.model import CustomTextCLIP

        if isinstance(self.model, dict):
            config = self.model_config_()
            if self.tokenizer.kind == "bpe":
                config["text_cfg"]["vocab_size"] = self._tokenizer(folder).vocab_size
            model = CustomTextCLIP(**config, nonscalar_logit_scale=True)
        else:
            self.model_config_()
            # shape (1,): DeepSpeed and FSDP refuse scalars; custom text: parameters are read inside their own module's forward only
            model = open_clip.create_model(self.model, pretrained=self.pretrained, force_custom_text=True, nonscalar_logit_scale=True)
        if self.gradient_checkpointing:
            model.set_grad_checkpointing()
        return OpenClip(model, self.preprocess_config(), recomputes=self.gradient_checkpointing)


def _pixels_only(transform: Any) -> Any:
    """open_clip's transform without its last two steps: tensors are made for the whole batch, and normalised on the device."""
    from torchvision.transforms import Compose, Normalize

    if not isinstance(transform.transforms[-1], Normalize):
        raise ConfigError("towers.augmentation: use_timm does not end in a plain normalisation; use open_clip's own augmentation settings")
    return Compose(transform.transforms[:-2])


class OpenClip(Tower):
    """Gives unit rows `image` and `text` [b, embed_dim] in float32, and `scale` [1]."""

    def __init__(self, model: torch.nn.Module, preprocess: dict[str, Any], recomputes: bool = False) -> None:
        super().__init__()
        self.model, self.recomputes = model, recomputes
        self.patch_size = allow_views(model.visual)
        self.register_buffer("mean", torch.tensor(preprocess["mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]), persistent=False)

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {"scale": self.model.logit_scale.exp()}
        with plain_attention(self.mean.device, self.recomputes):
            if "image" in fields:
                pixels = normalise_pixels(fields["image"], self.mean, self.std)
                if self.patch_size:
                    self.model.visual.kept = fields.get(KEPT)
                out["image"] = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
            if "text" in fields:
                out["text"] = F.normalize(self.model.encode_text(fields["text"]).float(), dim=-1)
        return out

    def bounds(self) -> list[tuple[torch.nn.Parameter, float, float]]:
        return [(self.model.logit_scale, 0.0, math.log(100))]
