"""The item encoder of NoteLLM-2: visual tokens into a causal LLM, two states out of it, a gate with the raw visual vector, 64 columns."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from pipeline.config import ConfigError, Strict, unknown


class ConnectorConfig(Strict):
    """A Q-Former (BLIP-2's) and two linear maps; the paper's is of 6 layers and 768 columns beside ViT-B/16."""

    width: int = Field(768, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(12, ge=1)

    def build(self, tokens: int, vision: int, out: int) -> "Connector":
        """float32 [n, P, vision] -> [n, tokens, out]. Raises ConfigError."""
        if self.width % self.heads:
            raise ConfigError(f"towers: mlrm: connector.width {self.width} is no multiple of connector.heads {self.heads}")
        return Connector(self, tokens, vision, out)


class Connector(nn.Module):
    """Learned queries look at the states of the vision tower, every second layer of the Q-Former from the first on."""

    def __init__(self, config: ConnectorConfig, tokens: int, vision: int, out: int) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        sizes = {"hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads}
        rest = {"intermediate_size": 4 * config.width, "encoder_hidden_size": vision}
        # BERT's 0.02 is for 768 columns; in a narrow one it would leave a hundredth of the image in what comes out at the start
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02 * (768 / config.width) ** 0.5}
        self.queries = nn.Parameter(torch.randn(tokens, config.width) * 0.02)
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**sizes, **rest, **still))
        self.mlp = nn.Sequential(nn.Linear(config.width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, states: Tensor) -> Tensor:
        queries = self.queries.repeat(len(states), 1, 1)
        return self.mlp(self.qformer(queries, encoder_hidden_states=states).last_hidden_state)


class LateGate(nn.Module):
    """g = sigmoid(W [n ; v]), then g n + (1 - g) v by column. n is the LLM's state and comes first; nothing is added to it besides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(2 * width, width, bias=False)
        nn.init.xavier_normal_(self.weight.weight)

    def forward(self, state: Tensor, visual: Tensor) -> Tensor:
        gate = torch.sigmoid(self.weight(torch.cat([state, visual], -1)))
        return gate * state + (1 - gate) * visual


class Places(NamedTuple):
    """Where things stand in a prompt's ids (towers/_prompt.py)."""

    pad: int
    image_at: int | None  # None: a prompt without the image
    answer_at: int | None  # None: a basic prompt
    text_at: int  # the text's first token
    tail: int  # tokens after the text


class Views(NamedTuple):
    """float [n, width]: of the last token, and of the token just before mICL's answer, which has seen the image alone; or None."""

    multimodal: Tensor
    visual: Tensor | None


class ItemEncoder(nn.Module):
    """Trained as a whole. `llm` is the decoder of a causal language model without its head, `vision` the columns of the visual states."""

    def __init__(
        self, llm: nn.Module, places: Places, connector: ConnectorConfig, vision: int, *, tokens: int, late_fusion: bool, embed_dim: int
    ) -> None:
        super().__init__()
        hidden = llm.config.hidden_size
        self.llm, self.places, self.tokens = llm, places, tokens
        self.connector = connector.build(tokens, vision, hidden) if tokens else None
        self.visual = nn.Linear(vision, hidden, bias=False) if late_fusion else None
        self.gate = LateGate(hidden) if late_fusion else None
        self.head = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, ids: Tensor, states: Tensor, attentions: list[Tensor] | None = None) -> Views:
        """`ids` int64 [n, L], `states` float [n, P, vision] with the class token first, zeros for an item without image.

        Then v = 0, and the gate leaves g n and not n: the text alone is read through it as well. `attentions` is filled with the
        weights of each layer [n, heads, L', L'], if the LLM computes with attention "eager".
        """
        fused = self.fuse(self.pooled(ids, states, attentions), states[:, 0])
        return Views(*(None if state is None else self.head(state) for state in fused))

    def pooled(self, ids: Tensor, states: Tensor, attentions: list[Tensor] | None = None) -> Views:
        """The LLM's states [n, hidden] at the two places. Padding on the right needs no mask: both lie before it, and attention is causal."""
        embedded = self.llm.get_input_embeddings()(ids)
        if self.connector is not None:
            at, visual = self.places.image_at, self.connector(states).to(embedded.dtype)
            embedded = torch.cat([embedded[:, :at], visual, embedded[:, at + 1 :]], 1)
        out = self.llm(inputs_embeds=embedded, use_cache=False, output_attentions=attentions is not None)
        if attentions is not None:
            attentions.extend(out.attentions)
        hidden, rows = out.last_hidden_state, torch.arange(len(ids), device=ids.device)
        before = self.places.answer_at
        return Views(hidden[rows, self.last(ids)], None if before is None else hidden[:, before - 1 + self.shift])

    def fuse(self, views: Views, visual: Tensor) -> Views:
        """Both views through the same gate with the class token's state [n, vision]."""
        if self.gate is None:
            return views
        visual = self.visual(visual)
        return Views(*(None if state is None else self.gate(state, visual) for state in views))

    @property
    def shift(self) -> int:
        """How much further right everything after the image is than in the ids: one token has become several."""
        return self.tokens - 1 if self.connector is not None else 0

    def last(self, ids: Tensor) -> Tensor:
        """int64 [n]: the place of the prompt's last token."""
        return (ids != self.places.pad).sum(1) - 1 + self.shift


def language_model(given: dict[str, Any], pretrained: str | None, vocab_size: int, gradient_checkpointing: bool = False) -> nn.Module:
    """The decoder of a causal LLM in float32, with random weights or those of a folder that transformers has saved (safetensors only, no
    code of its own). `given`: model_type and settings that differ from transformers' defaults for it. The embedding has at least
    `vocab_size` rows, new ones at the mean. Raises ConfigError."""
    from transformers import AutoModel

    config = _llm_config(given, vocab_size)
    if pretrained is None:
        try:
            llm = AutoModel.from_config(config)
        except ValueError as error:
            raise ConfigError(f"towers: mlrm: llm: transformers builds no model of {given}: {str(error)[:300]}") from None
    else:
        llm = _saved(given, pretrained)
    if getattr(llm.config, "is_encoder_decoder", False) or not hasattr(llm.config, "hidden_size"):
        raise ConfigError(f"towers: mlrm: llm: {llm.config.model_type} is no decoder alone; expected a causal language model such as llama")
    if not is_causal(llm):
        raise ConfigError(
            f"towers: mlrm: llm: in {llm.config.model_type} a token sees those after it; expected a causal language model such as llama"
        )
    rows = llm.get_input_embeddings().num_embeddings
    if rows < vocab_size and pretrained is None:
        raise ConfigError(
            f"towers: mlrm: llm.vocab_size {rows}: the tokenizer has {vocab_size} entries; leave it out, or lower tokens.vocab_size"
        )
    if rows < vocab_size:
        with torch.no_grad():
            mean = llm.get_input_embeddings().weight.mean(0)
            llm.resize_token_embeddings(vocab_size, mean_resizing=False).weight[rows:] = mean
    if gradient_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    return llm


@torch.no_grad()
def is_causal(llm: nn.Module) -> bool:
    """Whether the states of three tokens are the same before another fourth one: padding without a mask, and mICL's slot, rest on that.

    Costs a forward of eight tokens; nothing is drawn from torch's generator. A dry run's model has shapes and no values: it passes.
    """
    if detect_fake_mode(list(llm.parameters())):
        return True
    training, make = llm.training, torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 4, llm.config.hidden_size, generator=make).repeat(2, 1, 1)
    tokens[1, 3] *= -1
    try:
        one, other = llm.eval()(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, :3]
    except (TypeError, ValueError):  # transformers' decoders take both arguments
        return False
    finally:
        llm.train(training)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _llm_config(given: dict[str, Any], vocab_size: int) -> Any:
    from transformers import AutoConfig

    rest = {name: value for name, value in given.items() if name != "model_type"}
    try:
        known = AutoConfig.for_model(given["model_type"])
        if wrong := [name for name in rest if not hasattr(known, name)]:  # transformers would keep a misspelt setting and not use it
            raise ConfigError(f"towers: mlrm: llm: {unknown('setting', wrong[0], known.to_dict())[:400]}")
        return AutoConfig.for_model(given["model_type"], **{"vocab_size": vocab_size} | rest)
    except (ConfigError, ModuleNotFoundError):
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"towers: mlrm: llm: transformers builds no model of {given}: {str(error)[:300]}") from None


def _saved(given: dict[str, Any], folder: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"towers: mlrm: pretrained: {folder} holds no config.json; give the folder of a model that transformers has saved"
        )
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name, value in given.items():
            if getattr(found, name, None) != value:
                raise ConfigError(
                    f"towers: mlrm: llm.{name} {value!r}: the model in {folder} has {getattr(found, name, None)!r}; give the same"
                )
        keep = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
        return AutoModel.from_pretrained(folder, config=found, **keep)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"towers: mlrm: pretrained: {folder}: cannot be loaded from safetensors files: {str(error)[:300]}") from None
