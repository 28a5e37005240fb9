"""Feature distillation: FitNets (Romero et al. 2015, arXiv 1412.6550), and CLIP-KD's FD (arXiv 2307.12732) with `normalise`."""

from typing import Literal

from pydantic import Field

from pipeline.objectives._match import MatchConfig


class Config(MatchConfig):
    """A hint through a regressor. CLIP-KD's script: normalise true, weight 2000 beside losses of the order of 1."""

    projector: Literal["none", "linear"] = Field("linear", description="a trained map from the student's to the teacher's columns, or none")
