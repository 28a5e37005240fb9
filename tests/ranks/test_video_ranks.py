"""Video runs from the shipped configurations: AMID with a video student killed and resumed, a frozen encoder on two ranks in ZeRO's stages."""

import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.runs import ROOT, Launcher, assert_same_end, free_port, last_checkpoint, losses, wait_for
from tools.make_shards import main as make_shards

pytestmark = pytest.mark.slow
STAGES = {"DDP": "null", "stage 2": "{stage: 2}", "stage 3": "{stage: 3, persist_below: 100}"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips") / "train"
    assert make_shards(["clips", str(out), "--count", "256", "--shard-size", "64", "--workers", "1"]) == 0
    return out


def command(config: str, clips: Path, out: Path, *overrides: str) -> list[str]:
    given = [
        f"data.sources=[{{url: {clips}}}]",
        "evaluation.data=null",
        "visits=null",
        "data.workers=0",
        "data.lanes=8",
        "record.log_every=1",
    ]
    return ["train", str(ROOT / "configs" / config), f"out={out}", *given, *overrides]


def test_amid_with_a_video_student_resumes_bit_for_bit(launcher: Launcher, clips: Path, tmp_path: Path) -> None:
    runs = {name: command("distill/clips_amid.yaml", clips, tmp_path / name, "steps=10", "checkpoint.every=3") for name in ("whole", "cut")}
    launcher.run(runs["whole"])
    child = launcher.start(runs["cut"], HOLD="5")
    commit = tmp_path / "cut" / "checkpoints" / "step-00000003" / "COMMIT"
    wait_for(lambda: child.poll() is not None or commit.is_file(), "the first checkpoint")
    assert child.kill(signal.SIGKILL)
    child.wait()
    assert len(losses(tmp_path / "cut")) <= 5
    launcher.run(runs["cut"])
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    page = tmp_path / "page.html"
    launcher.run(["report", str(tmp_path / "cut"), "--out", str(page)])
    assert "amid" in page.read_text(encoding="utf-8")


def test_a_frozen_encoder_in_every_stage_trains_what_one_process_trains(launcher: Launcher, clips: Path, tmp_path: Path) -> None:
    launcher.run(command("pretrain/sfa_vivit_tiny_stage1.yaml", clips, tmp_path / "first", "steps=4"))
    second = ("steps=6", "checkpoint.every=3", "data.groups=2", f"init_from.run={tmp_path / 'first'}")
    stage_2 = lambda name, *more: command("pretrain/sfa_vivit_tiny_stage2.yaml", clips, tmp_path / name, *second, *more)  # noqa: E731
    launcher.run(stage_2("alone"))
    before = load_file(last_checkpoint(tmp_path / "first") / "model.safetensors")
    for name, zero in STAGES.items():
        for child in launcher.ranks(2, stage_2(name, f"engine.zero={zero}"), free_port()):
            child.finish()
        one, other = (np.array(losses(tmp_path / run)) for run in (name, "alone"))
        assert one.shape == other.shape and np.abs(one - other).max() < 2e-4, name
        after = load_file(last_checkpoint(tmp_path / name) / "model.safetensors")
        frozen = [key for key in before if ".spatial." in key]
        assert frozen and all(before[key].equal(after[key]) for key in frozen), name
