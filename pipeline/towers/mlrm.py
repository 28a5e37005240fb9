"""An item tower (NoteLLM-2, Zhang et al., KDD 2025, arXiv 2405.16789): image and text of an item through a causal LLM into one vector."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.data.decode import Decoder
from pipeline.towers._item import ConnectorConfig, ItemEncoder, Places, Views, language_model
from pipeline.towers._prompt import ItemText, Prompt, TokensConfig, write_tokenizer
from pipeline.towers.base import Tower, TowerConfig, TowerData, normalise_pixels, plain_attention
from pipeline.towers.open_clip import Config as OpenClipConfig

FILE = "tokenizer-items.json"
SIDES = {"item": "", "related": "related_"}  # the two items of a pair, and what their fields' names begin with


class Config(TowerConfig):
    """A frozen CLIP image tower, a connector, an LLM that is trained, a gate for late fusion.

    A sample is a pair of related items: fields image, text, related_image and related_text, from members of those names (`png`, `txt`,
    `related_image.png`, `related_text.txt`) or others by data.modalities, where `optional` lets items lack one of the two. The frozen
    weights come from a stage-1 run, init_from.towers: {student.vision: student.model.visual}, or from vision.pretrained.
    """

    llm: dict[str, Any] = Field(
        {"model_type": "llama"}, description="model_type and the settings of its transformers config; llama's defaults are those of 7B"
    )
    pretrained: str | None = Field(
        None, description="folder of that model as transformers saves it: config.json, tokenizer.json, safetensors; null: random weights"
    )
    tokens: TokensConfig = TokensConfig()
    vision: OpenClipConfig = Field(
        OpenClipConfig(model="ViT-B-16"), description="as the stage-1 run has it; its image tower must be a ViT, the rest is not used"
    )
    prompt: Literal["micl", "basic"] = Field("micl", description="micl: a second vector of the image alone, before the text is read")
    late_fusion: bool = Field(True, description="a gate between the LLM's state and the raw visual vector")
    visual_tokens: int = Field(16, ge=0, description="of the image in the prompt; 0 (with prompt: basic): the image comes in late only")
    connector: ConnectorConfig = ConnectorConfig()
    embed_dim: int = Field(64, ge=1)
    context: int = Field(100, ge=1, description="tokens of an item's text; longer ones are cut, the words of the prompt stay")
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        if "model_type" not in self.llm:
            raise ValueError(f"llm needs model_type, such as llama; it has {', '.join(self.llm) or 'nothing'}")
        if not self.visual_tokens and (self.prompt == "micl" or not self.late_fusion):
            raise ValueError("visual_tokens: 0 needs prompt: basic and late_fusion: true; otherwise nothing of the image is left")
        return self

    def reads(self) -> tuple[str, ...]:
        return tuple(f"{side}{field}" for side in SIDES.values() for field in ("image", "text"))

    def gives(self) -> tuple[str, ...]:
        return (*SIDES, *(("visual", "related_visual") if self.prompt == "micl" else ()), "scale")

    def prepare(self, data: TowerData) -> None:
        write_tokenizer(self.tokens, self.pretrained, data.captions, data.folder / FILE)

    def files(self) -> tuple[str, ...]:
        return (FILE,)

    def files_of(self, part: str) -> tuple[str, ...]:
        return () if part.split(".")[0] == "vision" else self.files()

    def measured_by(self) -> str:
        return "pipeline.evaluation.items"

    def untrained(self) -> "Config":
        return super().untrained().model_copy(update={"vision": self.vision.untrained()})

    def _prompt(self, folder: Path) -> Prompt:
        return Prompt(folder / FILE, self.tokens, self.prompt, bool(self.visual_tokens), self.context)

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        image, text = self.vision.image_decoder(train), ItemText(self._prompt(folder))
        return {f"{side}{field}": decoder for side in SIDES.values() for field, decoder in (("image", image), ("text", text))}

    def build(self, folder: Path) -> "Mlrm":
        return Mlrm(self, self._prompt(folder))


class Mlrm(Tower):
    """Gives unit rows [b, embed_dim] in float32 for both items of a pair: `item` and `related`, with mICL also `visual` and
    `related_visual`, and `scale` [1]. A row of zeros says that there is nothing: an item without image and text, an image without pixels.
    """

    def __init__(self, config: Config, prompt: Prompt) -> None:
        super().__init__()
        self.vision = vision_tower(config.vision)
        width = self.vision.transformer.width
        self.patches = len(self.vision.positional_embedding)  # with the class token; here, for under ZeRO-3 the parameter is empty
        places = Places(prompt.pad, prompt.image_at, prompt.answer_at, prompt.text_at, len(prompt.tail))
        sizes = {"tokens": config.visual_tokens, "late_fusion": config.late_fusion, "embed_dim": config.embed_dim}
        llm = language_model(config.llm, config.pretrained, prompt.vocab_size, config.gradient_checkpointing)
        self.items = ItemEncoder(llm, places, config.connector, width, **sizes)
        self.logit_scale = nn.Parameter(torch.full((1,), 3.0))  # the published start, a scale of 20
        preprocess = config.vision.preprocess_config()
        blank = {"mean": torch.tensor(preprocess["mean"]), "std": torch.tensor(preprocess["std"]), "blank": prompt([""])}
        for name, value in blank.items():
            self.register_buffer(name, value, persistent=False)
        self.recomputes = config.gradient_checkpointing
        self._states: list[Tensor] = []
        self.vision.transformer.register_forward_hook(lambda module, given, out: self._states.append(out))

    def train(self, mode: bool = True) -> "Mlrm":
        super().train(mode)
        self.vision.eval()  # no dropout in what is frozen
        return self

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        sides = [side for side, start in SIDES.items() if f"{start}image" in fields or f"{start}text" in fields]
        with plain_attention(self.mean.device, self.recomputes):
            ids, states, has_image, there = (torch.cat(part) for part in zip(*(self.inputs(side, fields) for side in sides)))
            views = self.items(ids, states)
        return self.features(views, has_image, there, sides)

    def inputs(self, side: str, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of one side: ids int64 [b, L], the frozen tower's last states float32 [b, 1 + patches, width], has an image, has anything."""
        image, text = (fields.get(f"{SIDES[side]}{field}") for field in ("image", "text"))
        rows = len(image if image is not None else text)
        has = {}
        for field, value in (("image", image), ("text", text)):
            name = f"{SIDES[side]}{field}"
            known = fields.get(f"{name}.present")
            none = torch.full((rows,), value is not None, device=self.blank.device)
            has[field] = none if known is None or value is None else known.to(none)
        ids = self.blank.expand(rows, -1) if text is None else torch.where(has["text"][:, None], text, self.blank)
        if image is None:
            states = torch.zeros(rows, self.patches, self.vision.transformer.width, device=ids.device)
        else:
            states = self.see(image) * has["image"][:, None, None]
        return ids, states, has["image"], has["image"] | has["text"]

    @torch.no_grad()
    def see(self, image: Tensor) -> Tensor:
        """The states after the frozen tower's last layer, class token first, as they are before its final norm."""
        self.vision(normalise_pixels(image, self.mean, self.std))  # through its own forward: under ZeRO-3 its weights are whole there only
        return self._states.pop().float()

    def features(self, views: Views, has_image: Tensor, there: Tensor, sides: list[str]) -> dict[str, Tensor]:
        """What forward gives, of the views of all sides' rows one after another."""
        out = {"scale": self.logit_scale.exp()}
        for name, view, counts in (("multimodal", views.multimodal, there), ("visual", views.visual, has_image)):
            if view is not None:
                rows = (F.normalize(view.float(), dim=1) * counts[:, None]).chunk(len(sides))
                names = sides if name == "multimodal" else [f"{SIDES[side]}visual" for side in sides]
                out |= dict(zip(names, rows))
        return out

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """As CLIP has it; the paper's temperature is free."""
        return [(self.logit_scale, 0.0, math.log(100))]


def vision_tower(config: OpenClipConfig) -> nn.Module:
    """The frozen image tower of an open_clip model. Raises ConfigError where it is no ViT."""
    from open_clip.transformer import VisionTransformer

    visual = config.build_visual()
    if not isinstance(visual, VisionTransformer):
        raise ConfigError(f"towers: mlrm: vision: {config.model} has no ViT as its image tower; its states are read token by token")
    return visual.requires_grad_(False).eval()
