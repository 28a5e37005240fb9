"""Audio as log-mel spectrograms: only the part that is needed is decoded, any rate and number of channels, cropped by the sample's seed."""

import importlib.util
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import ConfigError, Strict
from pipeline.data.errors import BadSample

RATES = (1_000, 768_000)  # Hz; a header that says something else is damaged
_BLOCK = 1 << 20  # samples of all channels that are decoded at a time


class AudioConfig(Strict):
    """The spectrogram: float32 [num_mels, frames], frames = 1 + samples // hop."""

    sample_rate: int = Field(16_000, ge=1_000, description="Hz; what has another rate is resampled")
    seconds: float = Field(2.0, gt=0, description="longer clips are cropped, shorter ones padded with silence")
    num_mels: int = Field(64, ge=1)
    window: int = Field(400, ge=2, description="samples of one Fourier transform, Hann weighted")
    hop: int = Field(160, ge=1, description="samples from one frame to the next")
    min_hz: float = Field(20.0, ge=0)
    max_hz: float | None = Field(None, gt=0, description="None: half the sample rate")

    @model_validator(mode="after")
    def _bands(self) -> "AudioConfig":
        top = self.max_hz or self.sample_rate / 2
        if not self.min_hz < top <= self.sample_rate / 2:
            raise ValueError(f"min_hz {self.min_hz:g} and max_hz {top:g}: expected min_hz < max_hz <= {self.sample_rate / 2:g}")
        if not mel_filters(self).any(1).all():
            raise ValueError(f"num_mels {self.num_mels}: some bands are narrower than a step of the transform; lower it, or raise window")
        return self

    @property
    def samples(self) -> int:
        return max(1, round(self.seconds * self.sample_rate))

    @property
    def frames(self) -> int:
        return 1 + self.samples // self.hop


def mel_filters(config: AudioConfig) -> np.ndarray:
    """float64 [num_mels, window // 2 + 1]: triangles of height 1, evenly spaced on the mel scale 2595 log10(1 + f / 700)."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (config.min_hz, config.max_hz or config.sample_rate / 2))
    edges = 700 * (10 ** (np.linspace(low, high, config.num_mels + 2) / 2595) - 1)
    hz = np.linspace(0, config.sample_rate / 2, config.window // 2 + 1)
    rise = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    return np.minimum(rise, fall).clip(0)


class AudioDecoder:
    """Encoded audio -> log-mel spectrogram, float32 [num_mels, frames]; log10 of the power, its loudest 8 decades, about -1 to 1 (Whisper)."""

    extensions = ("ogg", "oga", "opus", "flac", "wav", "mp3")

    def __init__(self, config: AudioConfig) -> None:
        for module in ("soundfile", "scipy"):
            if importlib.util.find_spec(module) is None:
                raise ConfigError(
                    f"package {module}, which reads audio, is not installed. Install it with pip install 'dissect-pipeline[audio]'"
                )
        self.config = config
        from scipy.sparse import csr_array

        # sparse: two triangles for each step of the transform, and no threads of BLAS in a loader worker (30 times slower on busy cores)
        self._filters = csr_array(mel_filters(config).astype(np.float32))
        self._window = np.hanning(config.window + 1)[:-1].astype(np.float32)  # periodic

    def __call__(self, data: bytes, extension: str, seed: int | None) -> np.ndarray:
        return self.spectrogram(self.waveform(data, seed))

    def waveform(self, data: bytes, seed: int | None) -> np.ndarray:
        """float32 [samples], mono. A crop or padding at a place that the seed draws; in the middle without one. Raises BadSample."""
        from scipy.signal import resample_poly

        try:
            sound, rate = self._read(data, seed)
        except (MemoryError, BadSample):
            raise
        except Exception as error:  # in memory only the bytes can be the cause
            raise BadSample("audio", f"{type(error).__name__}: {error}") from None
        if not len(sound):
            raise BadSample("audio_empty")
        if not np.isfinite(sound).all():
            raise BadSample("audio_not_finite")
        # to the next 25 Hz: all usual rates are multiples, and a rate without common factors would need a filter of millions of taps
        rate = 25 * round(rate / 25)
        if rate != self.config.sample_rate:
            common = math.gcd(rate, self.config.sample_rate)
            sound = resample_poly(sound, self.config.sample_rate // common, rate // common).astype(np.float32)
        sound = sound[: self.config.samples]
        short = self.config.samples - len(sound)
        left = short // 2 if seed is None else seed % (short + 1)
        return np.pad(sound, (left, short - left))

    def _read(self, data: bytes, seed: int | None) -> tuple[np.ndarray, int]:
        import soundfile

        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise BadSample("audio_rate", f"{rate} Hz, expected {RATES[0]} to {RATES[1]}")
            need = math.ceil(self.config.seconds * rate) + 1
            excess = max(0, file.frames - need)
            start = excess // 2 if seed is None else seed % (excess + 1)
            if start:
                file.seek(start)
            blocks = file.blocks(max(1, _BLOCK // file.channels), frames=min(need, file.frames - start), dtype="float32", always_2d=True)
            parts = [block.mean(1) for block in blocks]
        return np.concatenate([np.zeros(0, np.float32), *parts]), rate

    def spectrogram(self, sound: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [num_mels, frames]; frame i is centred on sample i * hop."""
        from scipy import fft

        half = self.config.window // 2
        padded = np.pad(sound, (half, self.config.window - half))
        pieces = np.lib.stride_tricks.sliding_window_view(padded, self.config.window)[:: self.config.hop][: self.config.frames]
        power = np.abs(fft.rfft(pieces * self._window)) ** 2
        decades = np.log10((self._filters @ power.T).clip(1e-10))
        return ((decades.clip(decades.max() - 8) + 4) / 4).astype(np.float32)

    def collate(self, items: Sequence[np.ndarray | None]) -> Tensor:
        """float32 [b, num_mels, frames]."""
        nothing = np.zeros((self.config.num_mels, self.config.frames), np.float32)
        return torch.from_numpy(np.stack([nothing if item is None else item for item in items]))

    def settings(self) -> dict[str, str]:
        """Every setting."""
        return {name: str(value) for name, value in self.config}
