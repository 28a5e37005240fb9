"""An open_clip tower that keeps no activations gives the gradients of one that does."""

from pathlib import Path

import torch

from pipeline.towers.open_clip import Config
from tests.unit.test_profile import MODEL, SIDE, WORDS


def test_recomputed_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    make = torch.Generator().manual_seed(1)
    fields = {
        "image": torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=make),
        "text": torch.randint(1, 300, (4, WORDS), generator=make),
    }
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = Config(name="open_clip", model=MODEL, gradient_checkpointing=checkpointing).build(tmp_path)
        out = tower(fields)
        (out["image"] @ out["text"].T * torch.arange(16.0).view(4, 4)).sum().backward()
        found.append({name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and len(plain) > 50
    size = max(float(gradient.norm()) for gradient in plain.values())
    worst = max(float((recomputed[name] - gradient).norm()) for name, gradient in plain.items())
    assert worst < 1e-5 * size
