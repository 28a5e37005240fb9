"""The frozen frame encoder of a video run, on clips as long as stage 2 wants them: what tools.cache_teacher writes for it, once."""

from functools import cached_property

from pydantic import Field
from torch import Tensor

from pipeline.config import ConfigError, dump
from pipeline.data.decode import Decoder
from pipeline.data.sources import Sources
from pipeline.data.video import VideoDecoder
from pipeline.distributed.views import View
from pipeline.teachers.base import Teacher, TeacherConfig
from pipeline.towers import video
from pipeline.towers._frames import Frames, fingerprint
from pipeline.weights import copy_weights, read_weights, tower_of, weights_file


class Config(TeacherConfig):
    """Gives `frames` [b, t, embed_dim], and `patches` [b, t, n, width] for an attnpool adapter: a middle clip, nothing augmented."""

    run: str = Field(description="the folder of the run of stage 1, or its URL")
    checkpoint: str = Field("newest", description="of that run: newest, best, or a step")
    tower: str = Field("student", description="its video tower")
    frames: int = Field(32, ge=1, description="of a clip, in place of stage 1's")
    stride: int = Field(1, ge=1, description="frames of the video from one frame of the clip to the next")
    patches: bool = Field(False, description="the patches' features too, many times as much to store")
    chunk: int | None = Field(None, ge=1, description="tubelets that the encoder takes at once; null: all of a batch")

    @cached_property
    def _view(self) -> View:
        """Opened once for all that is asked at a start: a URL is listed then."""
        return View(self.run)

    def described(self) -> video.Config:
        """The tower's settings with this one's clips. Raises ConfigError."""
        found = tower_of(self._view.folder, self.tower, "teachers: frames")
        if not isinstance(found, video.Config):
            raise ConfigError(f"teachers: frames: {self.run}: its tower {self.tower!r} is {found.name}; expected one that is video")
        values = dump(found)
        values |= {"clip": values["clip"] | {"frames": self.frames, "stride": self.stride, "views": 1, "crops": 1}}
        values |= {"adapter": "attnpool" if self.patches else "none", "frozen": True, "chunk": self.chunk, "cached": None}
        return video.Config.model_validate(values)

    def gives(self) -> tuple[str, ...]:
        return ("frames", "patches") if self.patches else ("frames",)

    def decoders(self) -> dict[str, Decoder]:
        described = self.described()
        return {described.field: VideoDecoder(described.clip, train=True)}

    def open(self, sources: Sources) -> "EncodedFrames":
        described = self.described()
        self._view.weights(self.checkpoint)
        file = weights_file(self._view.folder, self.checkpoint, "teachers: frames: checkpoint")
        encoder = Frames(described)
        weights = read_weights(file, f"towers.{self.tower}.spatial.", "teachers: frames")
        copy_weights(encoder.state_dict(), weights, "teachers: frames", str(file))
        return EncodedFrames(described.field, encoder, fingerprint(described, weights, self.patches))


class EncodedFrames(Teacher):
    """One video field in."""

    def __init__(self, field: str, encoder: Frames, digest: str) -> None:
        super().__init__()
        self.field, self.encoder, self.digest = field, encoder, digest

    def forward(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        frames, patches = self.encoder(fields[self.field])
        return {"frames": frames.float()} | ({} if patches is None else {"patches": patches.float()})
