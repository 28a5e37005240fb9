"""OpenMoji, 1,898 drawings in 9 groups: line art at test time, the colours while training."""

import functools
import os
from typing import Any

import numpy as np
import torch

from benchmarks.kd.real import Data, Fields, Methods, Problem, against_no_teacher, read, split
from pipeline.towers import image
from tools.sources.openmoji import _WHO, GROUPS

CANVAS, SIDE = 48, 32
WEIGHTS = {"logit_kd": 2.0}  # the others are the objectives' defaults or 0.5 to 1; tried on seeds 0 and 1
_MLP = {"arch": "mlp", "width": 128, "layers": 2}
PROBLEM = Problem(
    {"line": image.Config(field="line", channels=1, **_MLP), "colour": image.Config(field="colour", **_MLP)}, classes=len(GROUPS)
)


@functools.cache
def data() -> tuple[Data, list[str]]:
    """All drawings, and the motif of each: he, she and they of one motif stay together."""
    found = read(os.environ.get("OPENMOJI", "data/openmoji"), PROBLEM, {"colour": ["image.png"]}, GROUPS)
    return found, [" ".join(_WHO.sub(" ", caption.lower()).split()) for caption in found.captions]


def scattered(fields: Fields, seed: int) -> Fields:
    """The line art somewhere on a larger white page, as E1 does it with digits: nothing is lost, but an MLP has it hard."""
    line, rng = fields["line"], np.random.default_rng(seed)
    page = torch.full((len(line), 3, CANVAS, CANVAS), 255, dtype=line.dtype)
    for row, (top, left) in enumerate(rng.integers(0, CANVAS - SIDE + 1, (len(line), 2))):
        page[row, :, top : top + SIDE, left : left + SIDE] = line[row]
    return fields | {"line": page}


def run(seed: int) -> dict[str, dict[str, float]]:
    """Test figures in percent by method: line art as it is drawn and 200 labels; line art scattered over a larger page and all labels."""
    (found, motifs), line = data(), PROBLEM.inputs["line"]
    few = PROBLEM.but(labelled=200, weights=WEIGHTS)
    results = Methods(few, split(found.fields, motifs, few.labelled, seed), seed).run()
    hard = PROBLEM.but(inputs=PROBLEM.inputs | {"line": line.model_copy(update={"image_size": CANVAS})}, weights=WEIGHTS)
    again = Methods(hard, split(scattered(found.fields, seed), motifs, hard.labelled, seed), seed).run()
    return {f"200 labels: {name}": told for name, told in results.items()} | {f"scattered: {name}": told for name, told in again.items()}


def bars(results: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """What is compared; nothing is promised."""
    return [bar for regime in ("200 labels", "scattered") for bar in against_no_teacher(results, f"{regime}: ")]
