"""The prompts of NoteLLM-2 and their token ids: an item's text between fixed words, its image as one token that the tower replaces."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import ConfigError, Strict
from pipeline.data.decode import TextDecoder
from pipeline.data.errors import BadSample
from pipeline.data.text import PAD, train_bpe

COMPRESS = 'compress into one word: "'
LIMITS = {"title": 20, "topic": 10, "content": 80}  # characters, topics, characters: the published ones


class TokensConfig(Strict):
    """The tokens that a prompt needs beside words. Where the LLM is not pretrained a BPE is trained from the texts, and holds them."""

    vocab_size: int = Field(2048, ge=300, description="of that BPE")
    image: str = Field("<IMG>", description="stands where the image's tokens go")
    answer: str = Field("<IMG_EMB>", description="mICL's slot for the compressed image")
    pad: str = Field(PAD, description="fills up on the right; for Llama </s>, for Qwen <|endoftext|>")
    add: bool = Field(False, description="add those that a pretrained llm's tokenizer lacks, their embeddings the mean of the others'")

    def names(self) -> tuple[str, str, str]:
        """Those that must be one token each."""
        return (self.image, self.answer, self.pad)


def write_tokenizer(tokens: TokensConfig, pretrained: str | None, captions: Callable[[], Iterable[str]], path: Path) -> None:
    """Writes the run's own copy of the tokenizer: that of the folder `pretrained`, or one trained from the captions and the prompt's words.

    Raises ConfigError where the folder has none, or it lacks a token and `tokens.add` is off.
    """
    from tokenizers import Tokenizer

    if pretrained is None:
        words = [f"Note: {{{COMPRESS}", "title topic content image null"] * 1000  # often enough that each becomes a token or two
        train_bpe((text for part in (captions(), words) for text in part), tokens.vocab_size - len(tokens.names()), path)
    elif not (Path(pretrained) / "tokenizer.json").is_file():
        raise ConfigError(f"towers: mlrm: {pretrained}: has no tokenizer.json; give the folder of a model that transformers has saved")
    tokenizer = Tokenizer.from_file(str(path if pretrained is None else Path(pretrained) / "tokenizer.json"))
    missing = [name for name in tokens.names() if tokenizer.token_to_id(name) is None]
    if missing and pretrained is not None and not tokens.add:
        raise ConfigError(
            f"towers: mlrm: the tokenizer of {pretrained} has no token {' and no '.join(map(repr, missing))}; name spare ones of it in tokens.image, "
            f"tokens.answer and tokens.pad, or add them with tokens.add: true"
        )
    tokenizer.add_special_tokens(missing)
    partial = path.with_suffix(".part")
    tokenizer.save(str(partial))
    partial.replace(path)


class Prompt:
    """Texts -> int64 [n, length] of one prompt, padded on the right. The image's token is at the same place in every row, and what a
    text holds can be no special token: `<IMG>` in a title is five characters.

    micl:  Note: {"image": <IMG>}, compress into one word: "<IMG_EMB>". Note: {TEXT}, compress into one word: "
    basic: Note: {"image": <IMG>, TEXT}, compress into one word: "      (without the image where `image` is False)
    """

    def __init__(self, path: Path, tokens: TokensConfig, kind: Literal["micl", "basic"], image: bool, context: int) -> None:
        from tokenizers import Tokenizer

        if not path.is_file():
            raise ConfigError(f"{path}: there is no tokenizer; it belongs beside the weights that were trained with it")
        self.path, self.kind, self.context = path, kind, context
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        start = self._tokenizer.encode("").ids[:1]  # what the tokenizer puts before every text, such as <s>
        self._tokenizer.encode_special_tokens = True
        ids = dict(zip(("image", "answer", "pad"), map(self._tokenizer.token_to_id, tokens.names())))
        for name, found in ids.items():
            if found is None:
                raise ConfigError(f"towers: mlrm: {path}: the tokenizer has no token {getattr(tokens, name)!r} (tokens.{name})")
        self.image, self.answer, self.pad = ids["image"], ids["answer"], ids["pad"]
        place = [*self._ids('Note: {"image": '), self.image]
        if kind == "micl":
            head = [*place, *self._ids(f"}}, {COMPRESS}"), self.answer, *self._ids('". Note: {')]
        else:
            head = [*place, *self._ids(", ")] if image else self._ids("Note: {")
        self.head, self.tail = [*start, *head], self._ids(f"}}, {COMPRESS}")
        if self.pad in (*self.head, *self.tail):
            raise ConfigError(f"towers: mlrm: tokens.pad {tokens.pad!r} is part of the prompt itself; name another token")
        self.image_at = self.head.index(self.image) if image else None
        self.answer_at = self.head.index(self.answer) if kind == "micl" else None
        self.text_at, self.length = len(self.head), len(self.head) + context + len(self.tail)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def vocab_size(self) -> int:
        """Rows that the embedding needs."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """A text of more than `context` tokens is cut; the words after it always stay, the item's vector is read at the last of them."""
        out = torch.full((len(texts), self.length), self.pad, dtype=torch.int64)
        for row, encoded in enumerate(self._tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            ids = [*self.head, *encoded.ids[: self.context], *self.tail]
            out[row, : len(ids)] = torch.tensor(ids)
        return out

    def settings(self) -> dict[str, str]:
        """The vocabulary by its digest, wherever the file is, and the form."""
        vocabulary = hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]
        return {"tokenizer": f"{self.kind} prompt, {vocabulary}, {self.length} tokens", "context": str(self.context)}


class ItemText(TextDecoder):
    """An item's text -> the ids of its prompt; an item without text is a prompt without one.

    A `txt` member is a title (of several lines training draws one); a `json` member holds title, topic (a list) and content, cut to
    the published 20 characters, 10 topics and 80 characters.
    """

    extensions = ("txt", "json")

    def __call__(self, data: bytes, extension: str, seed: int | None) -> str:
        if extension == "txt":
            return written(title=super().__call__(data, extension, seed))
        try:
            note = json.loads(data)
            topics = note.get("topic") or []
            topics = [topics] if isinstance(topics, str) else topics
            parts = {"title": str(note.get("title") or ""), "content": str(note.get("content") or "")}
            topic = ", ".join(map(str, topics[: LIMITS["topic"]]))
        except (ValueError, AttributeError, TypeError) as error:
            raise BadSample("text", f"{type(error).__name__}: {error}") from None
        if not any((*parts.values(), topic)):
            raise BadSample("text_empty")
        return written(**{name: parts[name][: LIMITS[name]] for name in parts}, topic=topic)

    def collate(self, items: Sequence[str | None]) -> Tensor:
        """int64 [b, length]."""
        return self.tokenize([item or "" for item in items])


def written(title: str = "", topic: str = "", content: str = "") -> str:
    """A note's fields as the prompt has them; those that are empty are left out."""
    parts = {"title": title, "topic": topic, "content": content}
    return ", ".join(f'"{name}": {json.dumps(text, ensure_ascii=False)}' for name, text in parts.items() if text)


def words(note: str) -> int:
    """How many words the fields of a `written` note hold together."""
    return sum(len(text.split()) for text in json.loads(f"{{{note}}}").values())
