"""One contract for every tower: what its config promises is what its forward does."""

from pathlib import Path

import pytest
import torch

from pipeline.config import Strict, component, names_in, parse
from pipeline.towers.base import TowerConfig, TowerData

TINY = {"embed_dim": 16, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
TINY["text_cfg"] = {"context_length": 8, "width": 32, "heads": 2, "layers": 1, "vocab_size": 600}
NEEDED = {"open_clip": {"model": TINY, "tokenizer": {"kind": "bpe", "vocab_size": 600}}}
CAPTIONS = ["arrow up", "arrow down", "cloud", "bell", "a house with a garden and a very long name that is cut"]


class Holder(Strict):
    tower: component("pipeline.towers", TowerConfig)


# those: tests/unit/test_towers_multimodal.py, test_mlrm.py, test_video.py, test_cromss.py
OTHERS = {"audio", "fusion", "image", "text"} | {"mlrm"} | {"video"} | {"unet"}
PAIRS = sorted(set(names_in("pipeline.towers")) - OTHERS)


@pytest.fixture(params=PAIRS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TowerConfig:
    made = parse(Holder, {"tower": {"name": request.param} | NEEDED.get(request.param, {})}, "test").tower
    made.prepare(TowerData(tmp_path, lambda: iter(CAPTIONS * 20)))
    return made


def fields(config: TowerConfig, folder: Path, rows: int = 6) -> dict[str, torch.Tensor]:
    decoders = config.decoders(folder, train=True)
    assert set(decoders) == set(config.reads())
    made = {"text": decoders["text"].collate([CAPTIONS[i % 5] for i in range(rows)])}
    size = decoders["image"].size
    generator = torch.Generator().manual_seed(0)
    return made | {"image": torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator)}


def test_gives_what_it_says_as_unit_rows_in_float32(config: TowerConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    out = config.build(tmp_path).eval()(fields(config, tmp_path))
    assert set(out) == set(config.gives())
    for name in ("image", "text"):
        assert out[name].dtype == torch.float32
        assert torch.allclose(out[name].norm(dim=1), torch.ones(6), atol=1e-5)
    assert out["scale"].shape == (1,)


def test_one_field_alone_gives_the_same_rows(config: TowerConfig, tmp_path: Path) -> None:
    tower, both = config.build(tmp_path).eval(), fields(config, tmp_path)
    whole = tower(both)
    for name in ("image", "text"):
        alone = tower({name: both[name]})
        assert torch.equal(alone[name], whole[name])
        assert set(alone) == {name, "scale"}


def test_every_parameter_receives_a_gradient_and_none_is_a_scalar(config: TowerConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = config.build(tmp_path).train()
    out = tower(fields(config, tmp_path))
    (out["scale"] * (out["image"] @ out["text"].T)).softmax(1).diagonal().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.ndim >= 1, name  # DeepSpeed and FSDP refuse scalars
        assert parameter.grad is not None, name


def test_the_logit_scale_stays_within_1_and_100(config: TowerConfig, tmp_path: Path) -> None:
    tower = config.build(tmp_path)
    ((scale, low, high),) = tower.bounds()
    assert scale is next(p for name, p in tower.named_parameters() if name.endswith("logit_scale"))
    for value, expected in ((10.0, 100.0), (-3.0, 1.0)):
        scale.data.fill_(value).clamp_(low, high)
        assert tower(fields(config, tmp_path))["scale"].item() == pytest.approx(expected, rel=1e-5)


def test_decoders_are_the_same_when_the_run_is_opened_again(config: TowerConfig, tmp_path: Path) -> None:
    again = type(config).model_validate(config.model_dump())
    assert torch.equal(fields(config, tmp_path)["text"], fields(again, tmp_path)["text"])
