"""Uni-modal teachers (Du et al., ICML 2023, arXiv 2305.01233): each encoder of a multimodal net is held to its uni-modal twin.

One entry per modality, its weight the entry's: the features before the fusion head against those of a frozen tower that was trained on
this modality alone, both on the same augmented tensor. A teacher that never saw the other modality has thrown away what only the two
together tell; with `projector: none` and a weight of 1 or more the student loses it too, so `linear` is the default and a weight is
best looked for among 0.1, 1, 10, 50.
"""

from typing import Literal

from pydantic import Field

from pipeline.objectives._match import MatchConfig


class Config(MatchConfig):
    """`projector: none` is the paper's; `linear` keeps cues that need two modalities."""

    weight: float = Field(0.1, ge=0)
    projector: Literal["none", "linear"] = Field("linear", description="a trained map from the student's to the teacher's columns, or none")
