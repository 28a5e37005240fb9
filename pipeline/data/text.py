"""A small byte-level BPE tokenizer trained from the shards' own captions, for models too small for 49,408 embeddings."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import ConfigError

# the loader's workers are forked after the tokenizer was used; its thread pool would not survive that, and it says so on every start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, START, END = "<pad>", "<start>", "<end>"


def train_bpe(captions: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains on captions (lower-cased, NFKC) and writes `path` in the format of the `tokenizers` library.

    `<pad>` is id 0 and `<end>` has the highest id, because open_clip's text transformer pools at the largest token id.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=[PAD, START], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([END])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    tokenizer.save(str(partial))
    partial.replace(path)


class BpeTokenizer:
    """Captions -> int64 [n, context]: `<start>` tokens `<end>`, padded with 0, cut so that `<end>` always stays."""

    def __init__(self, path: Path, context: int) -> None:
        from tokenizers import Tokenizer, processors

        self.path, self.context = path, context
        if not path.is_file():
            raise ConfigError(f"{path}: there is no tokenizer; it belongs beside the weights that were trained with it")
        self._tokenizer = Tokenizer.from_file(str(path))
        start, end = self._tokenizer.token_to_id(START), self._tokenizer.token_to_id(END)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
        )
        self._tokenizer.enable_truncation(context)
        self._tokenizer.enable_padding(length=context, pad_id=0, pad_token=PAD)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, captions: list[str]) -> Tensor:
        encoded = self._tokenizer.encode_batch(captions)
        return torch.tensor([e.ids for e in encoded], dtype=torch.int64).reshape(len(captions), self.context)

    def settings(self) -> dict[str, str]:
        """The vocabulary by its digest, wherever the file is, and the length."""
        return {"tokenizer": f"bpe {hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]}", "context": str(self.context)}
