"""From a member's bytes to a row of a batch; runs in the loader's workers, seeded by sample and visit."""

import io
import json
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from webdataset.autodecode import imagehandler

from pipeline.data.errors import BadSample, DataError

# fields that a plain webdataset sample holds without their name: `000.png` is the image; of others the name is part (`000.line.png`)
PLAIN = ("image", "text", "audio", "video", "label")
MAX_PIXELS = 64_000_000  # an 8,000 x 8,000 image; a small file that unpacks to more is an attack or a mistake
MAX_CAPTION_BYTES = 65_536


class Decoder(Protocol):
    """How one field of a batch is made. Raises BadSample for what the bytes decide; anything else is a fault of ours."""

    extensions: tuple[str, ...]  # members that can hold the field, the first one present is taken

    def __call__(self, data: bytes, extension: str, seed: int | None) -> Any:
        """One sample's item; `seed` drives augmentation, None switches it off."""

    def collate(self, items: Sequence[Any]) -> Tensor:
        """The field's tensor from items; None stands for a sample that could not be decoded and becomes zeros."""

    def settings(self) -> dict[str, str]:
        """What makes two decoders of a field differ, in words; of that `augmentation` is what a seed may change."""


class Resize:
    """Squashes a PIL image to a square; what small debug towers need of preprocessing, without torchvision."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return image.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR)

    def __repr__(self) -> str:
        return f"squashed to {self.size} x {self.size}"


class ImageDecoder:
    """Encoded image -> uint8 [3, H, W]; the tower normalises on the device, which moves a quarter of the bytes.

    `transform` maps a PIL RGB image to one of H x W pixels, `augmentation` (or None) is its random variant for training.
    """

    extensions = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # not eps and its like: Pillow would start a program for them

    def __init__(self, size: int, transform: Callable, augmentation: Callable | None = None) -> None:
        self.size = size
        self.transform = transform
        self.augmentation = augmentation
        self._decode = imagehandler("pilrgb", self.extensions)
        PIL.Image.preinit()  # here, so that workers that are forked find the common formats loaded

    def __call__(self, data: bytes, extension: str, seed: int | None) -> np.ndarray:
        image = self._open(data, extension)
        if self.augmentation is None or seed is None:
            image = self.transform(image)
        else:
            with _seeded(seed):
                image = self.augmentation(image)
        return np.asarray(image, np.uint8)

    def _open(self, data: bytes, extension: str) -> PIL.Image.Image:
        # Pillow refuses more than twice this; between once and twice it only warns
        PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                return _deep_grey(data) or self._decode(f".{extension}", data)
        except PIL.Image.DecompressionBombError as error:
            raise BadSample("image_too_large", str(error)) from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise what they like; in memory only the bytes can be the cause
            raise BadSample("image", f"{type(error).__name__}: {error}") from None

    def collate(self, items: Sequence[np.ndarray | None]) -> Tensor:
        """uint8 [b, 3, H, W]."""
        out = np.zeros((len(items), self.size, self.size, 3), np.uint8)
        for row, item in enumerate(items):
            if item is not None:
                out[row] = item
        return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()

    def settings(self) -> dict[str, str]:
        """Size and the transforms as they print themselves."""
        transforms = (" ".join(repr(transform).split()) for transform in (self.transform, self.augmentation))
        return {"size": str(self.size)} | dict(zip(("transform", "augmentation"), transforms))


def _deep_grey(data: bytes) -> PIL.Image.Image | None:
    """A grey image of more than 8 bits by its high byte, else None: Pillow's own conversion cuts off at 255, which leaves it white."""
    if not (data[:4] == b"\x89PNG" and data[24:26] == b"\x10\x00") and data[:2] not in (b"II", b"MM"):  # PNG: 16 bits, grey; TIFF
        return None
    image = PIL.Image.open(io.BytesIO(data))
    if not image.mode.startswith("I"):
        return None
    high = np.asarray(image).astype(np.int64) >> 8
    return PIL.Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")


class _seeded:
    """Python's and torch's generators at `seed` inside, as they were outside: augmentation depends on sample and visit alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.python, self.torch = random.getstate(), torch.get_rng_state()
        random.seed(self.seed)
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        random.setstate(self.python)
        torch.set_rng_state(self.torch)


class TextDecoder:
    """Caption -> int64 token ids [context]. A file of several lines holds several captions; training draws one by the seed."""

    extensions = ("txt",)

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, data: bytes, extension: str, seed: int | None) -> str:
        lines = captions(data)
        return lines[(seed or 0) % len(lines)]

    def collate(self, items: Sequence[str | None]) -> Tensor:
        """int64 [b, context]; one call for the batch, which is several times faster than one for each caption."""
        tokens = self.tokenize([item or "" for item in items])
        return tokens * torch.tensor([item is not None for item in items])[:, None]

    def settings(self) -> dict[str, str]:
        """The tokenizer: its own words where it has some, else its class and sizes (open_clip's)."""
        own = getattr(self.tokenize, "settings", None)
        if own is not None:
            return own()
        inner = getattr(self.tokenize, "tokenizer", None)  # of Hugging Face
        name = getattr(inner, "name_or_path", type(self.tokenize).__name__)
        return {"tokenizer": str(name), "context": str(getattr(self.tokenize, "context_length", None))}


class LabelDecoder:
    """Class -> int64, -1 for a sample without one. `classes`: their names in the order of the logits, or their number.

    A `json` member holds "class" (the name) or "label" (the number), a `cls` member the number. A class that is not among them is an
    error and no bad sample: these shards were made with another label set.
    """

    extensions = ("json", "cls")
    optional = True

    def __init__(self, classes: Sequence[str] | int) -> None:
        self.names = None if isinstance(classes, int) else list(classes)
        self.count = classes if isinstance(classes, int) else len(classes)

    def __call__(self, data: bytes, extension: str, seed: int | None) -> int:
        try:
            value = json.loads(data)
            value = value if extension == "cls" else value.get("class" if self.names else "label", -1)
        except (ValueError, AttributeError) as error:
            raise BadSample("label", f"{type(error).__name__}: {error}") from None
        if self.names is not None and isinstance(value, str):
            if value not in self.names:
                raise DataError(f"data.classes: a sample is of class {value!r}, not one of {', '.join(self.names)}. {_OTHER_LABELS}")
            return self.names.index(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadSample("label", f"found {value!r}, expected the number of a class")
        if value >= self.count:
            raise DataError(f"data.classes: a sample is of class {value}, there are {self.count}. {_OTHER_LABELS}")
        return max(value, -1)

    def collate(self, items: Sequence[int | None]) -> Tensor:
        """int64 [b]."""
        return torch.tensor([-1 if item is None else item for item in items], dtype=torch.int64)

    def settings(self) -> dict[str, str]:
        """The classes."""
        return {"classes": str(self.names or self.count)}


_OTHER_LABELS = "The shards were made with another label set: give data.classes as their *.stats.json list them"


def members_of(field: str, decoder: Decoder, named: Sequence[str] | None = None) -> tuple[str, ...]:
    """The members a field is read from, the first one present is taken: `named` with each of the decoder's extensions where they
    have none, else `line.png` and so on for the field `line`. Raises DataError."""
    if named is None:
        names = [f"{field}.{extension}" for extension in decoder.extensions]
        return (*names, *(decoder.extensions if field in PLAIN else ()))
    found: list[str] = []
    for name in named:
        known = name.rsplit(".", 1)[-1] in decoder.extensions
        found += [name] if known else [f"{name}.{extension}" for extension in decoder.extensions]
    if not found:
        raise DataError(f"data.modalities.{field}.members: names no member. Leave it out for {field}.{decoder.extensions[0]} and its like")
    return tuple(member.lower() for member in found)


def captions(data: bytes) -> list[str]:
    """The captions of a text member, one a line. Raises BadSample when there is none, or what is there is no caption."""
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSample("text_too_long", f"{len(data)} bytes, at most {MAX_CAPTION_BYTES}")
    try:
        lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise BadSample("text_encoding", str(error)) from None
    lines = [line for line in lines if line]
    if not lines:
        raise BadSample("text_empty")
    return lines
