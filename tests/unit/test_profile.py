"""What is counted as the cost of a forward: every product of a transformer, in the mode that the scoring pass runs in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.record.profile import forward_flops
from pipeline.towers.open_clip import Config
from pipeline.types import Batch

WIDTH, LAYERS, SIDE, PATCH, WORDS, OUT = 64, 3, 32, 8, 16, 24
MODEL = {
    "embed_dim": OUT,
    "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": 32},
    "text_cfg": {"context_length": WORDS, "vocab_size": 300, "width": WIDTH, "heads": 2, "layers": LAYERS},
}


def transformer(tokens: int) -> int:
    """A layer: q, k, v and out (4 w^2), the MLP (8 w^2) per token; scores and their sum of values (2 n w) per token. Two FLOP a product."""
    return LAYERS * 2 * tokens * (12 * WIDTH**2 + 2 * tokens * WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_costs_what_a_hand_counts(dtype: torch.dtype, tmp_path: Path) -> None:
    tower = Config(name="open_clip", model=MODEL).build(tmp_path).eval()
    patches = (SIDE // PATCH) ** 2
    image = 2 * patches * 3 * PATCH**2 * WIDTH + transformer(patches + 1) + 2 * WIDTH * OUT
    text = transformer(WORDS) + 2 * WIDTH * OUT
    fields = {"image": torch.zeros(4, 3, SIDE, SIDE, dtype=torch.uint8), "text": torch.zeros(4, WORDS, dtype=torch.long)}

    def features(batch: Batch) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            tower(batch.fields)

    batch = Batch(*torch.arange(4).expand(3, 4), torch.ones(4, dtype=torch.bool), fields)
    before = torch.backends.mha.get_fastpath_enabled()
    assert forward_flops(SimpleNamespace(features=features), batch) == image + text
    assert torch.backends.mha.get_fastpath_enabled() == before
