"""Frames as one encoded member: animated WebP without loss, a ZIP of PNGs, or mp4 (H.264) through PyAV."""

import importlib.util
import io
import itertools
import zipfile

import numpy as np
from PIL import Image

from pipeline.data.errors import DataError

KINDS = ("webp", "zip", "mp4")
RATE = 25  # frames a second


def check(kinds: tuple[str, ...]) -> None:
    """Raises DataError for a kind that is unknown or whose package is missing."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"--kinds {','.join(kinds)}: no kind {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    if "mp4" in kinds and importlib.util.find_spec("av") is None:
        raise DataError("package av (PyAV), which writes mp4, is not installed. Install it with pip install 'dissect-pipeline[video]'")


def encode(frames: np.ndarray, kind: str) -> bytes:
    """uint8 [T, H, W], grey -> the member's bytes; the same bytes for the same frames."""
    out = io.BytesIO()
    images = [Image.fromarray(frame) for frame in frames]
    if kind == "webp":
        rgb = [image.convert("RGB") for image in map(Image.fromarray, _told_apart(frames))]
        rgb[0].save(out, "webp", save_all=True, append_images=rgb[1:], duration=1000 // RATE, lossless=True, method=2)
    elif kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            for number, image in enumerate(images):
                part = io.BytesIO()
                image.save(part, "png")
                archive.writestr(zipfile.ZipInfo(f"{number:04d}.png"), part.getvalue())  # ZipInfo: a fixed time
    else:
        _mp4(frames, out)
    return out.getvalue()


def _told_apart(frames: np.ndarray) -> np.ndarray:
    """The encoder merges equal neighbours, and a file whose every frame lasts longer no longer says how many there were: where a frame
    equals the one before, the lowest bit of its first pixel is turned."""
    out = frames.copy()
    for before, after in itertools.pairwise(out):
        if np.array_equal(before, after):
            after[0, 0] ^= 1
    return out


def _mp4(frames: np.ndarray, out: io.BytesIO) -> None:
    import av

    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "threads": "1"})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="gray")))
        container.mux(stream.encode())
