"""Videos as shards: every kind of member gives the same clip, clips are drawn by the seed, and what is broken is a counted bad sample."""

import io
import json
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.data import video
from pipeline.data.errors import BadSample, DataError
from pipeline.data.video import ClipConfig, VideoDecoder
from tests.shards import make, samples
from tools.sources import _video, clips, turns
from tools.sources.base import png

FRAMES = (np.arange(12, dtype=np.uint8)[:, None, None] * 20 + np.zeros((12, 24, 16), np.uint8)).astype(np.uint8)  # each one shade


def decoder(train: bool = True, **given: object) -> VideoDecoder:
    return VideoDecoder(ClipConfig.model_validate({"frames": 4, "size": 16} | given), train)


def shades(clip: np.ndarray) -> list[int]:
    """Which frames of FRAMES a clip holds."""
    return [round(float(frame.mean()) / 20) for frame in clip]


def archive(names: list[str], frames: np.ndarray = FRAMES) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, frame in zip(names, frames):
            file.writestr(name, png(Image.fromarray(frame)))
    return out.getvalue()


@pytest.mark.parametrize("kind", _video.KINDS)
def test_every_kind_gives_the_frames_that_are_asked_for(kind: str) -> None:
    data = _video.encode(FRAMES, kind)
    assert data == _video.encode(FRAMES, kind)
    whole = decoder(frames=12)(data, kind, None)
    assert whole.shape == (12, 16, 16, 3) and whole.dtype == np.uint8 and shades(whole) == list(range(12))
    assert shades(decoder(stride=2)(data, kind, None)) == [2, 4, 6, 8]  # the middle
    test = decoder(train=False, views=3, crops=3)
    assert shades(test(data, kind, 5)) == 3 * [0, 1, 2, 3] + 3 * [4, 5, 6, 7] + 3 * [8, 9, 10, 11]
    drawn = {tuple(shades(decoder()(data, kind, seed))) for seed in range(40)}
    assert drawn == {tuple(range(start, start + 4)) for start in range(9)}
    assert test.collate([None, test(data, kind, None)]).shape == (2, 36, 3, 16, 16) and decoder().collate([None]).shape == (1, 4, 3, 16, 16)


def test_squares_are_cut_along_the_long_side_and_anywhere_while_training() -> None:
    rows = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None] * 10, (4, 24, 16))
    data = _video.encode(rows, "zip")
    tops = [round(float(square[0].mean()) / 10) for square in decoder(train=False, crops=3)(data, "zip", None)[::4]]
    assert tops == [0, 4, 8]
    seeds = [decoder(scale=[1, 1.5])(data, "zip", seed) for seed in range(20)]
    assert len({clip.tobytes() for clip in seeds}) > 15 and all((clip == clip[0]).all() for clip in seeds)  # the same for all frames
    assert (decoder(scale=[1, 1.5])(data, "zip", 3) == seeds[3]).all()
    ramp = _video.encode(np.ascontiguousarray(rows.transpose(0, 2, 1)), "zip")
    mirrored = [clip[0, 0, 0, 0] > clip[0, 0, -1, 0] for clip in (decoder(flip=True)(ramp, "zip", seed) for seed in range(20))]
    assert 3 < sum(mirrored) < 17
    with pytest.raises(ValueError, match="expected two numbers from 1 up"):
        decoder(scale=[0.5, 1])


def test_a_frame_that_the_encoder_merged_counts_as_often_as_it_lasts() -> None:
    still = np.concatenate([FRAMES[:1]] * 3 + [FRAMES[1:4]])
    assert shades(decoder(frames=6)(_video.encode(still, "webp"), "webp", None)) == [0, 0, 0, 1, 2, 3]
    images, out = [Image.fromarray(frame).convert("RGB") for frame in still], io.BytesIO()
    images[0].save(out, "webp", save_all=True, append_images=images[1:], duration=40, lossless=True)
    assert Image.open(io.BytesIO(out.getvalue())).n_frames == 4
    assert shades(decoder(frames=6)(out.getvalue(), "webp", None)) == [0, 0, 0, 1, 2, 3]


def test_short_and_broken_videos_are_bad_samples_by_cause() -> None:
    names = [f"{number:03d}.png" for number in range(12)]
    mp4, webp = (_video.encode(FRAMES, kind) for kind in ("mp4", "webp"))
    for cause, data, kind, given in (
        ("video_short", webp, "webp", {"frames": 8, "stride": 2}),
        ("video_short", mp4, "mp4", {"frames": 13}),
        ("video_one_frame", _video.encode(FRAMES[:1], "zip"), "zip", {"short": "repeat"}),
        ("video_empty", archive([]), "zip", {"short": "repeat"}),
        ("video_order", archive([names[1], names[0], *names[2:]]), "zip", {}),
        ("video_order", archive([names[0], *names[2:]]), "zip", {}),
        ("video_order", archive(["first.png", *names]), "zip", {}),
        ("video_order", archive(["1st.png", *names]), "zip", {}),
        ("video", webp[: len(webp) // 2], "webp", {}),
        ("video", mp4[: len(mp4) // 2], "mp4", {}),
        ("video", archive(names)[:-40], "zip", {}),
        ("video", b"", "mp4", {}),
        ("video", b"no video", "gif", {}),
    ):
        with pytest.raises(BadSample) as caught:
            decoder(**given)(data, kind, None)
        assert caught.value.cause == cause, (cause, kind, str(caught.value))
    assert shades(decoder(frames=14, short="repeat")(mp4, "mp4", None)) == [*range(12), 11, 11]
    uneven = io.BytesIO()
    with zipfile.ZipFile(uneven, "w") as file:
        for number, size in enumerate((16, 16, 17, 16)):
            file.writestr(f"{number}.png", png(Image.new("RGB", (size, 16))))
    with pytest.raises(BadSample, match="different sizes"):
        decoder()(uneven.getvalue(), "zip", None)


@pytest.mark.parametrize("kind", _video.KINDS)
def test_what_is_held_of_a_video_is_bounded_and_no_more_than_is_wanted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of the four frames that are cut, wherever they lie, and not of the twelve that there are."""
    data = _video.encode(FRAMES, kind)
    monkeypatch.setattr(video, "MAX_HELD", 4 * 24 * 16)
    assert shades(decoder(stride=2)(data, kind, None)) == [2, 4, 6, 8]
    monkeypatch.setattr(video, "MAX_HELD", 4 * 24 * 16 - 1)
    with pytest.raises(BadSample, match="video_too_large: 4 frames of 16 x 24"):
        decoder(stride=2)(data, kind, None)


def test_frames_that_are_shown_out_of_order_are_a_bad_sample() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 24, "yuv420p"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")))
        container.mux(stream.encode())
    data = out.getvalue()
    assert shades(decoder(frames=12)(data, "mkv", None)) == list(range(12))
    second, third = (b"\x81" + (40 * at).to_bytes(2) + b"\x00" for at in (2, 3))  # track, milliseconds, flags of a block
    assert data.count(second) == data.count(third) == 1
    data = data.replace(second, b"x" * 4).replace(third, second).replace(b"x" * 4, third)
    with pytest.raises(BadSample, match="video_order: frame 3 is shown no later"):
        decoder(frames=12)(data, "mkv", None)


def test_without_pyav_a_container_stops_the_run_and_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _video.encode(FRAMES, "mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'dissect-pipeline\[video\]'"):
        decoder()(data, "mp4", None)
    assert shades(decoder()(_video.encode(FRAMES, "webp"), "webp", None)) == [4, 5, 6, 7]


def test_two_event_clips_are_what_their_class_says(tmp_path: Path) -> None:
    make("clips", tmp_path / "train", "--count", 24)
    make("clips", tmp_path / "test", "--count", 24, "--split", "test", "--kinds", "zip")
    found, held = samples(tmp_path / "train"), samples(tmp_path / "test")
    assert {one["video.webp"] for one in found}.isdisjoint({one.get("video.webp") for one in held})
    whole = decoder(frames=32, size=8)
    for one, kind in [*((one, "webp") for one in found), *((one, "zip") for one in held)]:
        clean, label = whole(one[f"clean.{kind}"], kind, None)[..., 0], json.loads(one["json"])
        shown = whole(one[f"video.{kind}"], kind, None)[..., 0]
        lit = (clean > clips.ZERO + 2).reshape(32, 2, 4, 2, 4).sum((2, 4)).reshape(32, 4)  # pixels by quadrant
        places = tuple(int(lit[half].sum(0).argmax()) for half in (slice(0, 16), slice(16, 32)))
        assert places == clips.PAIRS[label["label"]] and one["txt"].decode() == label["class"] == clips.CLASSES[label["label"]]
        assert (lit > 4).any(1).sum() == 2 * clips.EVENT
        quiet = ~(lit > 4).any(1)
        assert abs((shown.astype(float) - clean)[quiet].std() - clips.SCALE * clips.NOISE) < 1.5


def test_turns_show_two_events_in_their_halves(tmp_path: Path) -> None:
    said = make("turns", tmp_path, "--limit", 12, "--kinds", "webp,mp4", "--split", "test")
    assert "12 samples" in said and "licence MIT" in said
    whole, labels = decoder(frames=16, size=32), set()
    for one in samples(tmp_path):
        label = json.loads(one["json"])
        labels.add(label["label"])
        assert label["class"] == one["txt"].decode() == turns.CLASSES[label["label"]]
        webp, mp4 = (whole(one[f"video.{kind}"], kind, None).astype(float) for kind in ("webp", "mp4"))
        assert np.abs(webp - mp4).mean() < 6
        moves = np.abs(np.diff(webp, axis=0)).mean((1, 2, 3)) > 0.05
        assert moves[:7].any() and moves[8:].any()
    assert len(labels) > 3
    for wrong, match in ((("--kinds", "avi"), "no kind 'avi'"), (("--weights", "thin,bold,fill"), "expected two, the one before")):
        with pytest.raises(DataError, match=match):
            make("turns", tmp_path / "x", *wrong)
