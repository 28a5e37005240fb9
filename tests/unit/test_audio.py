"""Audio becomes a spectrogram of one shape, whatever it is; what is no audio is a bad sample."""

import io
import struct

import numpy as np
import pytest
import soundfile

from pipeline.config import ConfigError, parse
from pipeline.data.audio import AudioConfig, AudioDecoder, mel_filters
from pipeline.data.errors import BadSample

CONFIG = AudioConfig(seconds=1.0)


@pytest.fixture(scope="module")
def decoder() -> AudioDecoder:
    return AudioDecoder(CONFIG)


def tone(seconds: float, rate: int, hz: float = 1000.0, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1)


def encoded(sound: np.ndarray, rate: int, kind: str = "FLAC", **more: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, sound, rate, format=kind, **more)
    return out.getvalue()


def cause(decoder: AudioDecoder, data: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        decoder(data, "ogg", 1)
    return caught.value.cause


def test_the_spectrogram_is_that_of_an_independent_implementation(decoder: AudioDecoder) -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(201, 64, 20.0, 8000.0, 16_000, mel_scale="htk")
    assert np.allclose(filters.T, mel_filters(CONFIG), atol=1e-10)
    sound = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    settings = {"frame_length": 400, "hop_length": 160, "power": 2.0, "center": True, "pad_mode": "constant", "mel_filters": filters}
    reference = np.log10(spectrogram(sound, window_function(400, "hann"), mel_floor=1e-10, **settings))
    ours = decoder.spectrogram(sound)
    assert ours.shape == reference.shape == (64, CONFIG.frames) and ours.dtype == np.float32
    assert np.allclose(ours, (np.maximum(reference, reference.max() - 8) + 4) / 4, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000, 44_099])
@pytest.mark.parametrize("kind", ["FLAC", "OGG", "WAV"])
def test_every_rate_and_format_keeps_the_pitch(decoder: AudioDecoder, rate: int, kind: str) -> None:
    found = decoder(encoded(tone(1.2, rate), rate, kind), kind.lower(), None)
    assert found.shape == (64, 101)
    loudest = np.abs(mel_filters(CONFIG)[:, 25] - 1).argmin()  # the band whose middle is nearest to 1000 Hz, step 25 of 40 Hz
    assert abs(int(found[:, 20:80].mean(1).argmax()) - int(loudest)) <= 1


def test_channels_are_mixed(decoder: AudioDecoder) -> None:
    seven = tone(1, 16_000, channels=7)
    seven[:, 1:] = 0
    assert np.allclose(decoder.waveform(encoded(seven, 16_000), None), tone(1, 16_000)[:, 0] / 7, atol=1e-4)


def test_crop_and_padding_are_drawn_by_the_seed_alone(decoder: AudioDecoder) -> None:
    ramp = np.linspace(-0.9, 0.9, 48_000)
    long, short = encoded(ramp, 16_000), encoded(np.full(4_000, 0.5), 16_000)
    middle = decoder.waveform(long, None)
    assert len(middle) == 16_000 and abs(middle.mean()) < 1e-3
    places = {decoder.waveform(long, seed)[0] for seed in range(0, 2**63, 2**58 + 12_345)}
    assert len(places) > 20 and min(places) < -0.7 and max(places) > 0.1
    assert (decoder.waveform(long, 77) == decoder.waveform(long, 77)).all()
    starts = {int(decoder.waveform(short, seed).argmax()) for seed in (0, 5_000, 12_000)}
    assert starts == {0, 5_000, 12_000} and decoder.waveform(short, None).argmax() == 6_000


def test_of_ten_hours_only_the_needed_part_is_decoded(decoder: AudioDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        hour = np.zeros(3600 * 8_000, np.int16)
        for _ in range(10):
            file.write(hour)
    read, plain = [], soundfile.SoundFile.read

    def counting(self: soundfile.SoundFile, frames: int = -1, *rest: object, **more: object) -> np.ndarray:
        found = plain(self, frames, *rest, **more)
        read.append(len(found))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    for seed in (None, 2**62 + 1):
        assert decoder(out.getvalue(), "flac", seed).shape == (64, 101)
    assert sum(read) <= 2 * 8_002


def test_what_is_no_audio_is_a_bad_sample(decoder: AudioDecoder) -> None:
    whole = encoded(tone(1, 16_000), 16_000, "OGG")
    for data in (b"", b"a song", bytes(1000), whole[:40], b"RIFF" + bytes(40)):
        assert cause(decoder, data) == "audio"
    for kind in ("FLAC", "WAV", "OGG"):
        assert cause(decoder, encoded(np.zeros(0), 16_000, kind)) in ("audio_empty", "audio")
    assert cause(decoder, encoded(np.zeros(0), 16_000, "WAV")) == "audio_empty"
    assert cause(decoder, encoded(np.full(16_000, np.nan), 16_000, "WAV", subtype="FLOAT")) == "audio_not_finite"
    wav = bytearray(encoded(tone(1, 16_000), 16_000, "WAV"))
    wav[24:28] = struct.pack("<I", 2**31 - 1)
    assert cause(decoder, bytes(wav)) == "audio_rate"


def test_damage_inside_a_clip_is_a_bad_sample_or_a_clip(decoder: AudioDecoder) -> None:
    whole, rng = encoded(tone(1, 16_000), 16_000, "OGG"), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            found = decoder(bytes(data[: rng.integers(40, len(data))]), "ogg", 3)
        except BadSample:
            continue
        assert found.shape == (64, 101) and np.isfinite(found).all()


def test_silence_and_absence(decoder: AudioDecoder) -> None:
    silence = decoder(encoded(np.zeros(16_000), 16_000), "flac", None)
    assert np.isfinite(silence).all()
    batch = decoder.collate([silence, None])
    assert batch.shape == (2, 64, 101) and not batch[1].any() and batch[0].any()


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong, said in ({"max_hz": 9000.0}, "max_hz 9000"), ({"num_mels": 300}, "num_mels 300"), ({"n_mels": 3}, "num_mels"):
        with pytest.raises(ConfigError, match=said):
            parse(AudioConfig, wrong, "here")
