"""A bag of token embeddings for any text field: a caption as auxiliary modality. A CLIP text encoder is towers/open_clip.py."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.data.decode import Decoder, TextDecoder
from pipeline.data.text import BpeTokenizer, train_bpe
from pipeline.towers._modality import Modality, ModalityConfig
from pipeline.towers.base import TowerData


class Config(ModalityConfig):
    """The mean of the token embeddings, then an MLP. The tokenizer is trained from the captions, one for each field.

    A caption beside a CLIP student is best a field of its own: data.modalities: {caption: {members: [txt]}}.
    """

    field: str = "caption"
    arch: Literal["mlp"] = "mlp"
    layers: int = Field(1, ge=1)
    context: int = Field(16, ge=4)
    vocab_size: int = Field(1024, ge=300)

    def prepare(self, data: TowerData) -> None:
        train_bpe(data.captions(), self.vocab_size, self._file(data.folder))

    def files(self) -> tuple[str, ...]:
        return (self._file(Path()).name,)

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return {self.field: TextDecoder(BpeTokenizer(self._file(folder), self.context))}

    def build(self, folder: Path) -> Modality:
        tower = Modality(self, (1, 1, self.width), _tokens)
        tokens = BpeTokenizer(self._file(folder), self.context).vocab_size
        tower.encoder = nn.Sequential(nn.EmbeddingBag(tokens, self.width, padding_idx=0), tower.encoder)
        return tower

    def _file(self, folder: Path) -> Path:
        return folder / f"tokenizer-{self.field}.json"


def _tokens(tokens: Tensor) -> Tensor:
    return tokens
