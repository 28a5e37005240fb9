"""What a sharded run trained is loaded by open_clip itself, and gives the same features."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.run import TrainedRun
from tests.ranks.test_zero import run_cells
from tests.runs import Launcher
from tools.export import main


@pytest.fixture(scope="module")
def sharded(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of two ranks in stage 3."""
    out = tmp_path_factory.mktemp("sharded")
    run_cells(launcher, 2, out, icons_small, {"run": ["engine.zero={stage: 3, persist_below: 100}", "steps=4"]})
    return out / "run"


def test_open_clip_loads_a_run_of_stage_3_and_agrees(sharded: Path, tmp_path: Path) -> None:
    import open_clip

    assert main([str(sharded), str(tmp_path / "model"), "--format", "open_clip"]) == 0
    model = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    tower = TrainedRun(sharded).task.towers["student"]
    torch.manual_seed(0)
    image, text = torch.rand(4, 3, 32, 32), torch.randint(1, 300, (4, 16))
    with torch.no_grad():
        expected = tower({"image": image, "text": text})
        assert torch.allclose(model.encode_image(image, normalize=True), expected["image"], atol=1e-6)
        assert torch.allclose(model.encode_text(text, normalize=True), expected["text"], atol=1e-6)
        assert torch.allclose(model.logit_scale.exp(), expected["scale"].squeeze())


def test_safetensors_hold_the_student_alone(sharded: Path, tmp_path: Path) -> None:
    assert main([str(sharded), str(tmp_path / "student.safetensors")]) == 0
    names = set(load_file(tmp_path / "student.safetensors"))
    assert names == set(TrainedRun(sharded).task.towers["student"].state_dict())


def test_a_tower_of_another_kind_is_refused_for_open_clip(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(trained), str(tmp_path / "model"), "--format", "open_clip"]) == 2
    assert "towers.student" in capsys.readouterr().err and not (tmp_path / "model").exists()
