"""A small image encoder for any image field: line art, colour regions, a clean rendering. A CLIP student is towers/open_clip.py."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.data.decode import Decoder, ImageDecoder, Resize
from pipeline.towers._modality import Modality, ModalityConfig


class Config(ModalityConfig):
    """An image of `field`, squashed to a square, its pixels from -1 to 1."""

    field: str = "image"
    image_size: int = Field(32, ge=1)
    channels: Literal[1, 3] = Field(3, description="1: the mean of the colours")

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return {self.field: ImageDecoder(self.image_size, Resize(self.image_size))}

    def build(self, folder: Path) -> Modality:
        return Modality(self, (self.channels, self.image_size, self.image_size), self.pixels)

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> float32 [b, channels, H, W] from -1 to 1; float images keep their values."""
        image = image if image.is_floating_point() else image.float() / 127.5 - 1
        return image.mean(1, keepdim=True) if self.channels == 1 else image
