"""What a tower is: it reads fields of the batch and gives named features."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import Component
from pipeline.data.decode import Decoder


class TowerData(NamedTuple):
    """What a tower may draw on while it prepares its decoders."""

    folder: Path  # the run folder; what is prepared once is kept there
    captions: Callable[[], Iterable[str]]  # the training captions (a sample of them where there are very many)


class TowerConfig(Component):
    """Settings of a tower. `reads` and `gives` let the wiring be checked before anything is built."""

    def reads(self) -> tuple[str, ...]:
        """The batch fields the tower looks at."""
        raise TypeError(f"{type(self).__module__}.Config must define reads()")

    def gives(self) -> tuple[str, ...]:
        """The features its forward returns."""
        raise TypeError(f"{type(self).__module__}.Config must define gives()")

    def follows(self) -> tuple[str, ...]:
        """The cached teachers whose features it takes as its input, beside the fields; a row that one of them has not seen is not valid."""
        return ()

    def prepare(self, data: TowerData) -> None:
        """Work that one process does for all before decoders are made (training a tokenizer); done already on resume."""

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        """How the fields it reads are made from bytes; `train` asks for the augmenting variant."""
        raise TypeError(f"{type(self).__module__}.Config must define decoders()")

    def files(self) -> tuple[str, ...]:
        """What `prepare` leaves in the run folder and its weights cannot do without (a tokenizer)."""
        return ()

    def files_of(self, part: str) -> tuple[str, ...]:
        """Those of `files` that belong to a part of its weights, by the part's name; "" is the whole tower."""
        return self.files()

    def measured_by(self) -> str | None:
        """A module whose `measure(run, url, *, batch, workers)` gives the figures of a run with this student on held-out shards, as values
        for JSON (`run`: a pipeline.run.TrainedRun), and whose class `Watched`, an evaluate.Periodic, if there is one, gives those of
        evaluation.every. None: by zero-shot and retrieval, or by classes where it gives logits."""
        return None

    def untrained(self) -> "TowerConfig":
        """The same with random weights: what a dry run builds and counts without any file."""
        return self.model_copy(update={"pretrained": None} if "pretrained" in type(self).model_fields else {})

    def build(self, folder: Path) -> "Tower":
        """The tower with its initial weights, in float32 on the CPU."""
        raise TypeError(f"{type(self).__module__}.Config must define build()")


class Tower(nn.Module):
    """Protocol of a tower. A parameter is read inside its own module's forward only: under ZeRO-3 it has shape [0] elsewhere.

    Features with a row for each sample have two dimensions or more; one dimension says: the same for all rows (the logit scale).
    """

    patch_size: int | None = None  # pixels; a tower that has one embeds square images of any multiple of it, and the field image.patches

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features from the fields that are there (evaluation gives images alone, or texts alone). The bool field
        `<name>.present` [b] marks the rows that have an optional one."""
        raise TypeError(f"{type(self).__name__} must define forward()")

    def fitted(self, name: str, stored: Tensor, like: Tensor) -> Tensor:
        """A weight of another run (`init_from`) for the weight `name`, which is shaped `like`: as it is, unless the tower knows how a
        weight of another shape becomes its own (positions for longer clips)."""
        return stored

    def check_followed(self, teacher: str, writer: str) -> None:
        """Raises ConfigError where the cached teacher that it follows was written by something else than what it needs (`writer`, a digest)."""

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """(parameter, lowest, highest): what the engine clamps after each optimizer step, wherever the shards are (the logit scale)."""
        return []


def plain_attention(device: torch.device, recomputed: bool = False) -> AbstractContextManager:
    """Inside, attention on the CPU is written out: torch's fused one spends half of a small model's step in its backward there. Not for
    blocks that gradient checkpointing computes again during the backward, when this context has ended."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and not recomputed else nullcontext()


def normalise_pixels(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [b, 3, H, W] -> float32 with the tower's mean and standard deviation; float images pass as they are."""
    if image.is_floating_point():
        return image
    return (image.float() / 255 - mean[:, None, None]) / std[:, None, None]
