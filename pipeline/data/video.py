"""Clips from encoded video: an animated WebP or GIF, a ZIP of numbered images, or a container that PyAV reads; only what is needed is kept."""

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import PIL.Image
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Strict
from pipeline.data.decode import MAX_PIXELS
from pipeline.data.errors import BadSample, DataError

MAX_FRAMES = 100_000  # of an animation or an archive, which are looked through whole
MAX_HELD = 2**28  # pixels of all frames that are held at once: 128 frames of 1,920 x 1,080 are 800 MB as RGB

Frames = dict[int, PIL.Image.Image]
Choose = Callable[[int], Sequence[int]]  # number of frames of the video -> those that are wanted, ascending


class ClipConfig(Strict):
    """Which frames of a video, and which part of them. A training clip begins anywhere, a test clip in the middle."""

    frames: int = Field(8, ge=1, description="of a clip")
    stride: int = Field(1, ge=1, description="frames of the video from one frame of the clip to the next")
    size: int = Field(32, ge=1, description="side of the square that is cut out, in pixels; the video's short side is scaled to it")
    scale: tuple[float, float] = Field(
        (1.0, 1.0), strict=False, description="training: the short side before the cut, as a multiple of size, is drawn from this range"
    )
    flip: bool = Field(False, description="training: half of the clips are mirrored; not where left and right are part of the class")
    views: int = Field(1, ge=1, description="test: clips spread over the video, whose outputs are averaged")
    crops: Literal[1, 3] = Field(1, description="test: squares along the long side of each clip, averaged too")
    short: Literal["skip", "repeat"] = Field("skip", description="a video with too few frames: a bad sample, or its last frame repeated")

    @model_validator(mode="after")
    def _range(self) -> "ClipConfig":
        if not 1 <= self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: expected two numbers from 1 up, the smaller one first")
        return self

    @property
    def span(self) -> int:
        """Frames of the video that a clip covers."""
        return (self.frames - 1) * self.stride + 1


class VideoDecoder:
    """Encoded video -> uint8 [frames, H, W, 3] for training, [views x crops x frames, H, W, 3] for test; square pixels, RGB."""

    extensions = ("mp4", "webm", "mkv", "avi", "mov", "webp", "gif", "zip")

    def __init__(self, config: ClipConfig, train: bool) -> None:
        self.config, self.train = config, train
        self.count = config.frames * (1 if train else config.views * config.crops)

    def __call__(self, data: bytes, extension: str, seed: int | None) -> np.ndarray:
        draw = np.random.default_rng(seed) if self.train and seed is not None else None
        starts: list[int] = []
        counts: list[int] = []

        def choose(count: int) -> list[int]:
            counts.append(count)
            starts.extend(self._starts(count, draw))
            return sorted({at for start in starts for at in self._indices(start, count)})

        read = _animation if extension in ("webp", "gif") else _archive if extension == "zip" else _container
        try:
            frames = read(data, choose)
        except (MemoryError, BadSample, DataError):
            raise
        except Exception as error:  # in memory only the bytes can be the cause
            raise BadSample("video", f"{type(error).__name__}: {error}") from None
        sizes = sorted({frame.size for frame in frames.values()})
        if len(sizes) > 1:
            raise BadSample("video", f"frames of different sizes: {sizes[:3]}")
        clips = [[frames[at] for at in self._indices(start, counts[0])] for start in starts]
        return np.stack([frame for clip in clips for frame in self._cut(clip, sizes[0], draw)])

    def _starts(self, count: int, draw: np.random.Generator | None) -> list[int]:
        c = self.config
        excess = count - c.span
        if count < 2 and c.frames > 1:
            raise BadSample("video_one_frame" if count else "video_empty")
        if excess < 0 and c.short == "skip":
            raise BadSample("video_short", f"{count} frames; {c.frames} with stride {c.stride} need {c.span}")
        excess = max(0, excess)
        if draw is not None:
            return [int(draw.integers(excess + 1))]
        views = 1 if self.train else c.views
        return [excess // 2] if views == 1 else [round(excess * view / (views - 1)) for view in range(views)]

    def _indices(self, start: int, count: int) -> list[int]:
        return [min(start + at * self.config.stride, count - 1) for at in range(self.config.frames)]

    def _cut(self, clip: list[PIL.Image.Image], size: tuple[int, int], draw: np.random.Generator | None) -> Iterator[np.ndarray]:
        """The same square of every frame; with `draw` one anywhere, else the middle one, or three along the long side."""
        c, (width, height) = self.config, size
        side = min(width, height) / (draw.uniform(*c.scale) if draw is not None else 1)
        room = np.array([width - side, height - side])
        if draw is not None:
            places = [room * draw.random(2)]
        else:
            places = [room * share for share in ((0.5,) if self.train or c.crops == 1 else (0.0, 0.5, 1.0))]
        mirrored = draw is not None and c.flip and draw.random() < 0.5
        for left, top in places:
            for frame in clip:
                box = (left, top, left + side, top + side)
                whole = box == (0, 0, *frame.size) and frame.size == (c.size, c.size)
                cut = frame if whole else frame.resize((c.size, c.size), PIL.Image.Resampling.BILINEAR, box=box)
                yield np.asarray(cut, np.uint8)[:, ::-1] if mirrored else np.asarray(cut, np.uint8)

    def collate(self, items: Sequence[np.ndarray | None]) -> Tensor:
        """uint8 [b, frames, 3, H, W]."""
        out = np.zeros((len(items), self.count, self.config.size, self.config.size, 3), np.uint8)
        for row, item in enumerate(items):
            if item is not None:
                out[row] = item
        return torch.from_numpy(out).permute(0, 1, 4, 2, 3).contiguous()

    def settings(self) -> dict[str, str]:
        """Every setting; what only training changes is `augmentation`."""
        values = {name: str(value) for name, value in self.config}
        return values | {"augmentation": f"{values.pop('scale')} {values.pop('flip')} {self.train}"}


def _animation(data: bytes, choose: Choose) -> Frames:
    """Encoders drop a frame that equals the one before and let that one last longer: it counts as often as it lasts longer than the
    shortest one. Small ones are decoded once and held whole, large ones twice: which frames are wanted is known after all durations."""
    with PIL.Image.open(io.BytesIO(data), formats=("WEBP", "GIF")) as image:
        count, (width, height) = getattr(image, "n_frames", 1), image.size
        _check(width, height, 1)
        _check(1, 1, count)
        small, found, lasts = width * height * count <= MAX_HELD // 32, {}, []
        for at in range(count):
            image.seek(at)
            image.load()  # WebP tells a frame's duration only then
            lasts.append(image.info.get("duration", 0))
            if small:
                found[at] = image.convert("RGB")
        unit = min((length for length in lasts if length > 0), default=1)
        each = [max(1, round(length / unit)) for length in lasts]
        _check(1, 1, sum(each))
        place = np.repeat(np.arange(count), each)
        wanted = choose(len(place))
        of = sorted({int(place[at]) for at in wanted})
        _check(width, height, len(of))
        for at in of if not small else ():
            image.seek(at)
            found[at] = image.convert("RGB")
    return {at: found[place[at]] for at in wanted}


def _archive(data: bytes, choose: Choose) -> Frames:
    """Images whose names are numbers, in the order of the numbers and without a gap."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        _check(1, 1, len(names))
        numbers = [name.rsplit(".", 1)[0] for name in names]
        if strange := [name for name, number in zip(names, numbers) if not number.isdecimal()]:
            raise BadSample("video_order", f"expected images named by numbers, found {strange[0]!r}")
        first = int(numbers[0]) if numbers else 0
        if wrong := [name for at, (name, number) in enumerate(zip(names, numbers)) if int(number) != first + at]:
            raise BadSample("video_order", f"{wrong[0]} is out of order, or the image before it is missing")
        found = {}
        wanted = choose(len(names))
        for at in wanted:
            with archive.open(names[at]) as file, PIL.Image.open(io.BytesIO(file.read(MAX_PIXELS))) as image:
                _check(*image.size, len(wanted))
                found[at] = image.convert("RGB")
        return found


def _container(data: bytes, choose: Choose) -> Frames:
    """Read from the beginning to the last wanted frame; frames come in the order of their times, or it is a bad sample."""
    try:
        import av
    except ModuleNotFoundError:
        raise DataError(
            "package av (PyAV), which reads mp4 and its like, is not installed. Install it with pip install 'dissect-pipeline[video]'; "
            "animated WebP and ZIP archives of images need nothing"
        ) from None

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        _check(stream.width, stream.height, 1)
        stream.codec_context.thread_count = 1  # the loader has processes of its own
        count = stream.frames or sum(1 for _ in container.decode(stream))
        container.seek(0)
        found, wanted, before = {}, set(choose(count)), None
        for at, frame in enumerate(container.decode(stream)):
            if before is not None and frame.pts is not None and frame.pts <= before:
                raise BadSample("video_order", f"frame {at} is shown no later than the one before")
            before = frame.pts
            if at in wanted:
                _check(frame.width, frame.height, len(wanted))
                found[at] = frame.to_image()
            if len(found) == len(wanted):
                return found
    raise BadSample("video_cut", f"{count} frames are announced, the data end before frame {min(wanted - found.keys())}")


def _check(width: int, height: int, frames: int) -> None:
    """Raises BadSample for what would fill the memory: so many frames of this size, held at once."""
    if width * height > MAX_PIXELS or frames > MAX_FRAMES or width * height * frames > MAX_HELD:
        raise BadSample("video_too_large", f"{frames} frames of {width} x {height}")
