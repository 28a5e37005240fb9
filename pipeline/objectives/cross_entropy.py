"""Classification of labelled rows, on logits that a tower gives or through a linear head of its own."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import Comm
from pipeline.objectives._rows import Used, feature, fresh, labels_of, weight_of
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection


class Config(ObjectiveConfig):
    """One entry per tower that is to classify: `feature: teacher.logits` trains the teacher."""

    feature: str = "logits"
    label: str = Field("label", description="the batch field with int64 labels; rows with one below 0 are left out")
    classes: int | None = Field(
        None, ge=2, description="a linear head from `width` columns to as many classes; null: the feature is logits"
    )
    width: int | None = Field(None, ge=1, description="columns of the feature, where there is a head")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    present: str | None = Field(None, description="bool field of rows that have what the tower needs")

    def reads(self) -> tuple[str, ...]:
        return (self.feature,)

    def fields(self) -> tuple[str, ...]:
        return (self.label, *([self.present] if self.present else []))

    def per_sample(self) -> bool:
        return True

    def build(self) -> "CrossEntropy":
        if (self.classes is None) != (self.width is None):
            raise ConfigError("objectives: cross_entropy: a head needs both `classes` and `width`; without a head leave both out")
        return CrossEntropy(self)


class CrossEntropy(Objective):
    """The mean over all rows, rows without a label counting as 0, so that a row weighs the same in every batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        key = f"cross_entropy {config.feature}"
        self.head = nn.Identity() if config.classes is None else fresh(key, lambda: nn.Linear(config.width, config.classes))

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        c = self.config
        label = labels_of("cross_entropy", batch, c.label)
        weight = weight_of("cross_entropy", batch, selection, c.present).masked_fill(label < 0, 0)
        logits = self.head(feature("cross_entropy", features, batch, c.feature, weight))
        logits = logits if logits.dtype.itemsize > 2 else logits.float()  # a head under autocast gives half precision
        known = label.clamp_min(0)
        if known.device.type == "cpu" and int(known.max()) >= logits.shape[1]:
            raise ConfigError(
                f"cross_entropy: label {int(known.max())} in field {c.label!r}, but {c.feature} has {logits.shape[1]} classes"
            )
        self.telemetry = {"accuracy": Used.of(weight, comm).mean((logits.argmax(1) == label).float())}
        each = F.cross_entropy(logits, known, reduction="none", label_smoothing=c.smoothing)
        self.per_sample = each.detach().masked_fill(weight == 0, torch.nan)
        return (each * weight).mean()
