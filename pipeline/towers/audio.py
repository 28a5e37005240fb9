"""An audio encoder on log-mel spectrograms: speech, sound effects, any audio field."""

from pathlib import Path

from torch import Tensor

from pipeline.data.audio import AudioConfig, AudioDecoder
from pipeline.data.decode import Decoder
from pipeline.towers._modality import Modality, ModalityConfig


class Config(ModalityConfig):
    """Audio of `field`, seen as an image of one channel, num_mels high and frames wide."""

    field: str = "audio"
    audio: AudioConfig = AudioConfig()

    def decoders(self, folder: Path, train: bool) -> dict[str, Decoder]:
        return {self.field: AudioDecoder(self.audio)}

    def build(self, folder: Path) -> Modality:
        return Modality(self, (1, self.audio.num_mels, self.audio.frames), _as_image)


def _as_image(spectrogram: Tensor) -> Tensor:
    return spectrogram[:, None]
