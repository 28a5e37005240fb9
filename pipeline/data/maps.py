"""Fields that are maps: bands of a sensor, label maps, their priors. What is drawn for one field of a sample (season, crop, flip, quarter turns)
is drawn for all of them, because it depends on the sample's seed alone: image, label and prior stay aligned."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from pipeline.data.errors import BadSample, DataError

IGNORE = 255  # in a label map: no label here
_DRAW = 0x6D617073  # keeps these draws apart from others of the same seed


class Geometry(NamedTuple):
    """From tiles of `tile` pixels to squares of `size`: a random crop, flip and quarter turns with a seed, the middle without one.

    Quarter turns only: any other angle would have to make up labels and pixels between those that are there.
    """

    tile: int
    size: int
    flip: float = 0.0  # how often mirrored
    rotate: float = 0.0  # how often turned by 90, 180 or 270 degrees

    def __call__(self, seasons: np.ndarray, seed: int | None) -> np.ndarray:
        """[seasons, ..., tile, tile] -> one season, [..., size, size]."""
        season, top, left, mirror, turn, turns = (0.0, 0.5, 0.5, 1.0, 1.0, 0.0) if seed is None else self._draw(seed)
        room = self.tile - self.size + 1
        top, left = int(top * room), int(left * room)
        out = seasons[int(season * len(seasons))][..., top : top + self.size, left : left + self.size]
        out = out[..., ::-1] if mirror < self.flip else out
        return np.ascontiguousarray(np.rot90(out, 1 + int(turns * 3), (-2, -1)) if turn < self.rotate else out)

    @staticmethod
    def _draw(seed: int) -> list[float]:
        return np.random.default_rng([seed, _DRAW]).random(6).tolist()


class MapDecoder:
    """A member `npy` (bands first, and before them seasons if there are several) or a picture -> one season of [bands, size, size].

    uint8 stays uint8, all else becomes float32. Raises BadSample for a map that is damaged or of another size than the tiles, DataError
    for another number of bands: these shards were made for another sensor.
    """

    extensions: tuple[str, ...] = ("npy", "png", "jpg", "jpeg", "webp", "tif", "tiff")
    empty = 0  # what a sample without the map has

    def __init__(self, field: str, bands: int, geometry: Geometry, optional: bool = False) -> None:
        self.field, self.bands, self.geometry, self.optional = field, bands, geometry, optional

    def __call__(self, data: bytes, extension: str, seed: int | None) -> np.ndarray:
        values = self._seasons(_array(self.field, data) if extension == "npy" else self._picture(data))
        side = self.geometry.tile
        if values.shape[-2:] != (side, side):
            raise BadSample("map_size", f"{self.field}: {values.shape[-1]} x {values.shape[-2]} pixels, the tiles are {side} x {side}")
        values = self.geometry(values, seed)
        return self._checked(values if values.dtype == np.uint8 else values.astype(np.float32))

    def _picture(self, data: bytes) -> np.ndarray:
        """[bands, h, w]; the size is looked at before a pixel is decoded. Raises BadSample."""
        side = self.geometry.tile
        try:
            image = PIL.Image.open(io.BytesIO(data))
            if image.size != (side, side):
                raise BadSample("map_size", f"{self.field}: {image.width} x {image.height} pixels, the tiles are {side} x {side}")
            return np.atleast_3d(np.asarray(self._mode(image))).transpose(2, 0, 1)
        except (MemoryError, BadSample):
            raise
        except Exception as error:  # Pillow's plugins raise what they like; in memory only the bytes can be the cause
            raise BadSample("map", f"{self.field}: {type(error).__name__}: {error}") from None

    def _mode(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return image.convert("RGB") if image.mode == "P" else image

    def _seasons(self, values: np.ndarray) -> np.ndarray:
        """[seasons, bands, h, w]. Raises BadSample, DataError."""
        if values.ndim not in (3, 4) or not len(values):
            raise BadSample("map_shape", f"{self.field}: shape {list(values.shape)}, expected [bands, h, w] or [seasons, bands, h, w]")
        values = values if values.ndim == 4 else values[None]
        if values.shape[1] != self.bands:
            raise DataError(
                f"{self.field}: a sample has {values.shape[1]} bands, the tower expects {self.bands}. These shards were made for another "
                f"sensor, or the tower's `sensors` (for a prior its `classes`) is not that of the shards"
            )
        return values

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if values.dtype != np.uint8 and not np.isfinite(values).all():
            raise BadSample("map_not_finite", self.field)
        return values

    def collate(self, items: Sequence[np.ndarray | None]) -> Tensor:
        """[b, bands, size, size], uint8 or float32. Raises DataError where samples differ in that."""
        kinds = {item.dtype for item in items if item is not None}
        if len(kinds) > 1:
            raise DataError(f"{self.field}: some samples hold bytes, others {', '.join(sorted(map(str, kinds)))}; write all alike")
        nothing = np.full(self._shape(), self.empty, kinds.pop() if kinds else np.uint8)
        return torch.from_numpy(np.stack([nothing if item is None else item for item in items]))

    def _shape(self) -> tuple[int, ...]:
        return (self.bands, self.geometry.size, self.geometry.size)

    def settings(self) -> dict[str, str]:
        """Bands and geometry."""
        g = self.geometry
        return {"bands": str(self.bands), "tile": str(g.tile), "size": str(g.size), "augmentation": f"flip {g.flip:g}, rotate {g.rotate:g}"}


class LabelMapDecoder(MapDecoder):
    """A member `npy` ([h, w], or [seasons, h, w]) or `png` (grey or palette) -> uint8 [size, size], classes from 0, 255 for no label.

    A class that is not among them is an error and no bad sample, as for plain labels. A sample without a map has 255 everywhere.
    """

    extensions = ("npy", "png")
    empty = IGNORE

    def __init__(self, field: str, classes: int, geometry: Geometry) -> None:
        super().__init__(field, classes, geometry, optional=True)

    def _mode(self, image: PIL.Image.Image) -> PIL.Image.Image:
        if image.mode not in ("L", "P"):
            raise BadSample("map_mode", f"{self.field}: {image.mode}, expected one byte a pixel")
        return image

    def _seasons(self, values: np.ndarray) -> np.ndarray:
        if values.ndim not in (2, 3) or not len(values):
            raise BadSample("map_shape", f"{self.field}: shape {list(values.shape)}, expected [h, w] or [seasons, h, w]")
        if values.dtype != np.uint8:
            raise BadSample("map_type", f"{self.field}: {values.dtype}, expected uint8")
        return values if values.ndim == 3 else values[None]

    def _checked(self, values: np.ndarray) -> np.ndarray:
        wrong = values[(values >= self.bands) & (values != IGNORE)]
        if len(wrong):
            raise DataError(
                f"{self.field}: a sample holds class {wrong.max()}, there are {self.bands} (and {IGNORE} for no label). These shards were "
                f"made with another label set: set the tower's `classes` as their *.stats.json list them"
            )
        return values

    def _shape(self) -> tuple[int, ...]:
        return (self.geometry.size, self.geometry.size)


def _array(field: str, data: bytes) -> np.ndarray:
    """A member in numpy's format; never a pickle, and no memory beyond the bytes that are there. Raises BadSample."""
    file = io.BytesIO(data)
    try:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, columns_first, kind = read(file)
        if kind.kind not in "uif":
            raise BadSample("map_type", f"{field}: {kind}, expected numbers")
        return np.frombuffer(data, kind, offset=file.tell()).reshape(shape, order="F" if columns_first else "C")
    except (MemoryError, BadSample):
        raise
    except Exception as error:  # a damaged header is read as Python text and raises what that raises
        raise BadSample("map", f"{field}: {type(error).__name__}: {error}") from None


def label_priors(labels: np.ndarray, classes: int, sigma: float = 3.0) -> np.ndarray:
    """Which classes there are around each pixel, in its season and over all seasons (CromSS): uint8 [seasons, h, w] -> uint8
    [seasons, classes, h, w], shares of 255.

    Each class's one-hot map under a Gaussian of `sigma` pixels, cut at 4 sigma, normalised over the classes: half of the season's own map
    and half of the seasons' mean. It is a function of the labels, so it is written in the shards. 255 has no class.
    """
    from scipy.ndimage import gaussian_filter

    hot = (labels[:, None] == np.arange(classes)[:, None, None]).astype(np.float32)

    def around(maps: np.ndarray) -> np.ndarray:
        blurred = gaussian_filter(maps, (0,) * (maps.ndim - 2) + (sigma, sigma), mode="constant", truncate=4)
        return blurred / blurred.sum(-3, keepdims=True).clip(1e-12)

    return (255 * (around(hot) + around(hot.mean(0))[None]) / 2).round().astype(np.uint8)
