"""The video tower: what SFA-ViViT's freezing promises, its two stages as runs, and its features from a cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import saved_bytes
from pipeline.config import ConfigError, dump, parse
from pipeline.run import RunConfig, TrainedRun
from pipeline.towers import fusion
from pipeline.towers._frames import fingerprint
from pipeline.towers.video import Config, Video, stretch
from pipeline.weights import InitFrom
from tests.distill import refused, train
from tests.runs import last_checkpoint, losses
from tools.cache_teacher import main as cache_teacher
from tools.make_shards import main as make_shards

NET = {"patch": 4, "width": 16, "layers": 2, "heads": 2, "embed_dim": 16, "temporal_heads": 2, "token_std": 0.5, "classes": 12}
PARTS = {f"student.{part}": f"student.{part}" for part in ("spatial", "temporal", "head")}


def tower(frames: int = 8, **given: Any) -> Video:
    """A tower with a head that says something, whatever was drawn before."""
    torch.manual_seed(0)
    made = Config.model_validate(NET | {"clip": {"frames": frames, "size": 8}} | given).build(Path())
    torch.nn.init.normal_(made.head.weight)
    return made


def clips(rows: int = 3, frames: int = 8, size: int = 8) -> dict[str, Tensor]:
    return {
        "video": torch.randint(0, 256, (rows, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(frames))
    }


def grown(stored: Video, frames: int, **given: Any) -> Video:
    """What init_from makes of a stage 1 in a stage 2."""
    made = tower(frames, frozen=True, **given)
    with torch.no_grad():
        for name, value in stored.state_dict().items():
            mine = made.state_dict()[name]
            mine.copy_(stored.fitted(name, value, mine))
    return made


def test_1_what_is_frozen_stays_and_no_optimizer_has_it() -> None:
    made = tower(frozen=True, adapter="bottleneck").train()
    assert made.training and not any(module.training for module in made.spatial.modules())
    before = {name: value.clone() for name, value in made.state_dict().items()}
    trained = [p for p in made.parameters() if p.requires_grad]
    assert not {id(p) for p in trained} & {id(p) for p in made.spatial.parameters()}
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        made(clips())["logits"].square().sum().backward()
        assert all(p.grad is None for p in made.spatial.parameters()) and all(p.grad is not None for p in trained)
        optimizer.step()
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("spatial."), name


@pytest.mark.parametrize("adapter", ["bottleneck", "attnpool"])
def test_2_a_new_adapter_changes_nothing(adapter: str) -> None:
    one = tower().eval()
    two = grown(one, 8, adapter=adapter).eval()
    given = clips()
    assert (two(given)["logits"] - one(given)["logits"]).abs().max() < 1e-5
    torch.nn.init.normal_((two.adapter.up if adapter == "bottleneck" else two.adapter.attention.out_proj).weight)
    assert (two(given)["logits"] - one(given)["logits"]).abs().max() > 1e-3


def test_3_what_is_kept_for_the_backward_does_not_grow_with_the_frame_encoder() -> None:
    def kept(frames: int = 8, size: int = 8, **given: Any) -> int:
        made = tower(frames, clip={"frames": frames, "size": size}, adapter="bottleneck", **given)
        return saved_bytes(made, lambda: made(clips(4, frames, size))["logits"].sum())

    assert kept(frozen=True) == kept(frozen=True, layers=6) == kept(frozen=True, size=16)
    short, long, longer = (kept(frames, frozen=True, temporal_layers=1) for frames in (8, 16, 24))
    assert short < long and abs((longer - long) - (long - short)) < 0.15 * (long - short)  # attention alone is quadratic
    assert kept(16, 16, frozen=True, layers=8, temporal_layers=1) < 0.1 * kept(16, 16, layers=8, temporal_layers=1)


def test_4_chunks_change_nothing() -> None:
    whole, parts = (tower(frozen=True, chunk=chunk).eval() for chunk in (None, 5))
    assert torch.allclose(whole(clips())["logits"], parts(clips())["logits"], atol=1e-6)


def test_5_frames_are_encoded_one_by_one_and_order_is_in_the_positions() -> None:
    made, given = tower(tubelet=2).eval(), clips()["video"]
    order = torch.tensor([2, 0, 3, 1])
    turned = given.unflatten(1, (4, 2))[:, order].flatten(1, 2)
    assert torch.allclose(made.spatial(turned)[0], made.spatial(given)[0][:, order], atol=1e-6)
    assert not torch.allclose(made({"video": turned})["logits"], made({"video": given})["logits"], atol=1e-3)
    torch.nn.init.zeros_(made.temporal.position)
    assert torch.allclose(made({"video": turned})["logits"], made({"video": given})["logits"], atol=1e-5)


def test_6_positions_are_stretched_linearly_and_cls_is_kept() -> None:
    position = torch.randn(1, 5, 3)
    assert torch.equal(stretch(position, 4), position)
    ramp = torch.cat([torch.full((1, 1, 1), 9.0), torch.linspace(0, 3, 4)[None, :, None]], 1)
    assert torch.allclose(stretch(ramp, 7).flatten(), torch.tensor([9.0, *torch.linspace(0, 3, 7)]))


def test_a_patch_embedding_becomes_one_of_tubelets_that_sees_the_middle_frame() -> None:
    image, video = (tower(tubelet=tubelet).eval() for tubelet in (1, 2))
    name = "spatial.visual.conv1.weight"
    fitted = video.fitted(name, image.state_dict()[name], video.state_dict()[name])
    video.spatial.visual.conv1.weight.data.copy_(fitted)
    given = clips()["video"]
    assert torch.allclose(video.spatial(given)[0], image.spatial(given[:, 1::2])[0], atol=1e-5)


def test_views_are_averaged_and_an_absent_video_is_zeros() -> None:
    made, given = tower().eval(), clips(2, 16)["video"]
    out = made({"video": given})
    each = [made({"video": part})["logits"] for part in given.split(8, 1)]
    assert torch.allclose(out["logits"], (each[0] + each[1]) / 2, atol=1e-5)
    masked = made({"video": given, "video.present": torch.tensor([True, False])})
    assert torch.equal(masked["logits"][0], out["logits"][0]) and not masked["embedding"][1].any() and made({}) == {}


def test_the_image_tower_of_an_open_clip_model_and_what_does_not_fit_one() -> None:
    cfg = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    model = {"embed_dim": 16, "vision_cfg": cfg, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    made = tower(model=model, clip={"frames": 8, "size": 16}, adapter="attnpool", frozen=True)
    assert made(clips(2, 8, 16))["logits"].shape == (2, 12)
    visual = CustomTextCLIP(**model).visual.state_dict()  # what init_from reads of a CLIP run
    assert visual.keys() == made.spatial.visual.state_dict().keys()
    like = made.state_dict()["spatial.visual.conv1.weight"]
    assert made.fitted("spatial.visual.conv1.weight", visual["conv1.weight"], like).shape == like.shape
    with pytest.raises(ConfigError, match="embeds images of 16 pixels in 16 columns, found clip.size 8"):
        tower(model=model)
    resnet = model | {"vision_cfg": cfg | {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
    with pytest.raises(ConfigError, match="only a ViT of open_clip's own has tubelets"):
        tower(model=resnet, clip={"frames": 8, "size": 32})
    assert tower(model=resnet, clip={"frames": 8, "size": 32}, tubelet=1)(clips(2, 8, 32))["embedding"].shape == (2, 16)
    for wrong in ({"tubelet": 3}, {"temporal_heads": 3}):
        with pytest.raises(ValueError, match="expected a multiple"):
            tower(**wrong)


def test_a_fused_video_follows_its_cache_and_takes_other_lengths_over() -> None:
    eye = NET | {"name": "video", "clip": {"frames": 8, "size": 8}, "cached": "frames", "adapter": "attnpool"}
    config = parse(fusion.Config, {"inputs": {"eye": eye}, "embed_dim": 4}, "test")
    assert config.follows() == ("frames",)
    made, like = config.build(Path()), torch.zeros(1, 5, 16)
    out = made({"frames.frames": torch.randn(3, 4, 16), "frames.patches": torch.randn(3, 4, 4, 16)})
    assert out["eye.embedding"].shape == (3, 16) and (out["embedding"] != 0).any(1).all()
    stored = torch.randn(1, 9, 16)
    assert torch.equal(made.fitted("inputs.eye.temporal.position", stored, like), stretch(stored, 4))
    inner = made.inputs["eye"]
    made.check_followed("frames", fingerprint(inner.config, inner.spatial.state_dict(), True))
    made.check_followed("others", "unknown")
    with pytest.raises(ConfigError, match="teachers.frames holds no patches.* write it again with patches: true"):
        made.check_followed("frames", fingerprint(inner.config, inner.spatial.state_dict(), False))
    with pytest.raises(ConfigError, match="another frame encoder"):
        made.check_followed("frames", "unknown")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 two-event clips."""
    out = tmp_path_factory.mktemp("clips") / "train"
    assert make_shards(["clips", str(out), "--count", "96", "--shard-size", "48", "--workers", "1"]) == 0
    return out


def run(shards: Path, out: Path, student: dict[str, Any], **given: Any) -> RunConfig:
    values = {
        "out": str(out),
        "steps": 4,
        "data": {"sources": [{"url": str(shards)}], "batch": 16, "lanes": 4, "groups": 1, "workers": 0, "classes": 12},
        "towers": {"student": {"name": "video"} | NET | student},
        "objectives": {"task": {"name": "cross_entropy"}},
        "selector": {"name": "keep_all", "rate": 1.0},
        "optimizer": {"lr": 0.01},
        "engine": {"precision": "fp32", "threads": 1},
        "record": {"log_every": 1},
    }
    return parse(RunConfig, values | given, "test")


@pytest.fixture(scope="module")
def stage_1(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "run"
    train(run(shards, out, {"clip": {"frames": 8, "stride": 4, "size": 8}}))
    return out


LONG = {"clip": {"frames": 32, "size": 8}, "frozen": True, "adapter": "bottleneck"}


def test_7_stage_2_trains_the_same_from_cached_features(shards: Path, stage_1: Path, tmp_path: Path, capsys) -> None:
    begin = {"init_from": {"run": str(stage_1), "towers": PARTS}}

    def look(trainer: Any) -> tuple[set[int], set[int]]:
        groups = trainer.engine.optimizer.param_groups
        return {id(p) for g in groups for p in g["params"]}, {id(p) for p in trainer.engine.raw.towers["student"].spatial.parameters()}

    optimised, frozen = train(run(shards, tmp_path / "live", LONG, **begin), look)
    assert frozen and not optimised & frozen
    before, after = (load_file(last_checkpoint(path) / "model.safetensors") for path in (stage_1, tmp_path / "live"))
    for name, value in before.items():
        assert torch.equal(after[name], value) == (".spatial." in name) or value.shape != after[name].shape, name
    assert after["towers.student.temporal.position"].shape == (1, 17, 16)

    frames = {"frames": {"name": "frames", "run": str(stage_1), "frames": 32}}
    config = run(shards, tmp_path / "write", LONG, teachers=frames)
    path = tmp_path / "write.json"
    path.write_text(json.dumps(dump(config)), encoding="utf-8")
    assert cache_teacher([str(path), str(tmp_path / "cache"), "--workers", "0", "--batch", "16", "--dtype", "float32"]) == 0
    assert "frames [16, 16]" in capsys.readouterr().out
    cached = {"teachers": {"frames": {"name": "cached", "path": str(tmp_path / "cache")}}} | begin
    train(run(shards, tmp_path / "cached", LONG | {"cached": "frames"}, **cached))
    one, other = (torch.tensor(losses(tmp_path / name)) for name in ("live", "cached"))
    assert len(one) == 4 and torch.allclose(one, other, rtol=1e-4)
    opened = TrainedRun(tmp_path / "cached")
    assert set(opened.decoders) == {"video"}  # without training it looks at videos again

    bad, student = tmp_path / "bad", LONG | {"cached": "frames"}
    refused(run(shards, bad, student, teachers=frames, **begin), ConfigError, "teachers.frames is frames; write")
    other = run(shards, bad, student, teachers=cached["teachers"])  # its frame encoder would be the random one
    refused(other, ConfigError, "teachers.frames was written by another frame encoder")
    refused(run(shards, bad, student, **begin), ConfigError, "there is no teachers.frames")


def test_init_from_takes_parts_over_and_names_what_does_not_fit(stage_1: Path) -> None:
    towers = torch.nn.ModuleDict({"student": tower(16, adapter="bottleneck")})
    InitFrom(run=str(stage_1), towers=PARTS).load(towers)
    stored = load_file(last_checkpoint(stage_1) / "model.safetensors")
    assert torch.equal(towers["student"].temporal.position, stretch(stored["towers.student.temporal.position"], 8))
    for wrong, said in (
        ({"width": 32}, r"class_embedding is \[32\] in this run and \[16\]"),
        ({"adapter": "bottleneck"}, "adapter.*is in this"),
    ):
        with pytest.raises(ConfigError, match=said):
            InitFrom(run=str(stage_1), towers={"student": "student"}).load(torch.nn.ModuleDict({"student": tower(16, **wrong)}))


@pytest.mark.slow
def test_8_freezing_alone_fails_and_a_short_first_stage_mends_it() -> None:
    from benchmarks import systems_sfa_vivit as sfa

    one = sfa.Experiment(0)
    image, _ = sfa.image_checkpoint(0)
    one.fit("frozen", sfa.made(sfa.LONG, 0, image, ("spatial",), frozen=True), sfa.LONG, sfa.STAGE_2, sfa.LR)
    short = sfa.made(sfa.SHORT, 0, image, ("spatial",))
    one.fit("stage 1", short, sfa.SHORT, sfa.WHOLE, sfa.LR)
    long = sfa.made(sfa.LONG, 0, short.state_dict(), ("spatial", "temporal", "head"), frozen=True, adapter="bottleneck")
    one.fit("stage 2", long, sfa.LONG, sfa.STAGE_2, sfa.LR_STAGE_2)
    accuracy = {row: values["accuracy"] for row, values in one.results.items()}
    assert accuracy["frozen"] < 20 < accuracy["stage 1"] < accuracy["stage 2"] and accuracy["stage 2"] > 90
