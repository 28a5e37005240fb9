"""The trainer: the same bits for a seed, the published recipe, and a stop before anything that is not finite is saved."""

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pipeline.__main__ import main
from pipeline.config import load, read_yaml
from pipeline.distributed import checkpoint
from pipeline.distributed.optimizer import OptimizerConfig
from pipeline.run import RunConfig, TrainedRun
from pipeline.trainer import Trainer
from tests.runs import arguments, assert_same_end, columns, commit_again, last_checkpoint, losses, put_back, selection_log

RESNET = """{name: open_clip, tokenizer: {kind: bpe, vocab_size: 300}, model: {embed_dim: 16,
    vision_cfg: {layers: [1, 1, 1, 1], width: 8, image_size: 32, head_width: 32}, text_cfg: {context_length: 8, width: 16, heads: 2, layers: 1}}}"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What a run sets for its whole process is put back."""
    with put_back():
        yield


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.engine.raw.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_runs_of_one_seed_are_equal_to_the_last_bit_and_two_seeds_are_not(trained: Path, start, tmp_path: Path) -> None:
    assert start().fit()
    assert_same_end(tmp_path / "run", trained)  # this process, and one from the command line
    assert start("seed=1", out="other").fit()
    assert losses(tmp_path / "other") != losses(trained)
    assert not same(
        load_file(last_checkpoint(tmp_path / "other") / "model.safetensors"), load_file(last_checkpoint(trained) / "model.safetensors")
    )


def test_a_finished_run_that_is_started_again_changes_nothing(trained: Path, icons_small: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    assert main(arguments(icons_small, copy)) == 0
    assert_same_end(copy, trained)
    result = json.loads((copy / "result.json").read_text())
    assert result["complete"] and result["samples"] == json.loads((trained / "result.json").read_text())["samples"]


def test_the_scoring_pass_leaves_batch_norm_and_generators_alone(start) -> None:
    trainer = start(f"towers.student={RESNET}", "selector.rate=1.0", "steps=3", "visits=null")
    norms = [module for module in trainer.engine.raw.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    batch, before, state = trainer.data.next(), weights(trainer), torch.get_rng_state()
    features = trainer.engine.features(batch)
    assert features["image"].shape == (64, 16) and not features["image"].requires_grad
    assert same(weights(trainer), before) and torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in trainer.engine.raw.modules())
    assert all(p.grad is None for p in trainer.engine.raw.parameters())
    for step in range(3):
        trainer.engine.features(batch)
        trainer.engine.step(batch, trainer.selector.select(batch, features, step)[0], step)
        trainer.engine.features(batch)
        assert all(int(norm.num_batches_tracked) == step + 1 for norm in norms)


@pytest.mark.parametrize("tower", ["{name: linear, dropout: 0.3}", RESNET], ids=["dropout", "batch norm"])
def test_selection_at_rate_one_is_training_without_selection_bit_for_bit(start, tower: str) -> None:
    common = (f"towers.student={tower}", "steps=4", "visits=null")
    scored = start(*common, "selector={name: dissect, rate: 1.0}", out="scored")
    assert scored.fit() and scored.progress.scored == 4 * 64
    plain = start(*common, "selector={name: keep_all}", out="plain")
    assert plain.fit() and plain.progress.scored == 0
    assert same(weights(scored), weights(plain))
    assert losses(scored.folder) == losses(plain.folder)


def test_a_step_with_selection_is_plain_clip_training_on_the_chosen_rows(start) -> None:
    """Against a loop of its own in plain torch, with cross_entropy and AdamW."""
    trainer = start("selector={name: dissect, rate: 0.5}", "steps=3", "visits=null", "optimizer.weight_decay=0.2", "optimizer.warmup=0.0")
    first = {name: value.double() for name, value in weights(trainer).items()}
    assert trainer.fit()
    log = columns(selection_log(trainer.folder))
    names = ["image.weight", "image.bias", "text.weight", "logit_scale"]
    p = {name: nn.Parameter(first[f"towers.student.{name}"]) for name in names}
    groups = [
        {"params": [p["image.weight"], p["text.weight"]], "weight_decay": 0.2},
        {"params": [p["image.bias"], p["logit_scale"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    again = start("selector={name: dissect, rate: 0.5}", "steps=3", "visits=null", out="again").data
    for step in range(3):
        batch = again.next()
        kept = set(log["sample"][(log["step"] == step) & log["kept"]].tolist())
        assert len(kept) == 32
        rows = torch.tensor([sample in kept for sample in batch.sample.tolist()])
        pixels = (batch.fields["image"][rows].double() / 255 - 0.5) / 0.5
        image = F.normalize(F.linear(pixels.flatten(1), p["image.weight"], p["image.bias"]))
        text = F.normalize(F.embedding_bag(batch.fields["text"][rows], p["text.weight"], padding_idx=0, mode="mean"))
        logits = p["logit_scale"].exp() * image @ text.T
        loss = (F.cross_entropy(logits, torch.arange(32)) + F.cross_entropy(logits.T, torch.arange(32))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(p.values(), 1.0)
        assert losses(trainer.folder)[step] == pytest.approx((step + 1, loss.item(), norm.item()), rel=1e-5)
        optimizer.step()
    for name in names:
        assert torch.allclose(weights(trainer)[f"towers.student.{name}"].double(), p[name].detach(), rtol=1e-4, atol=1e-5), name


def test_the_score_table_is_what_the_steps_recorded(trained: Path) -> None:
    log = columns(selection_log(trained))
    lanes = [pq.read_table(path) for path in sorted(last_checkpoint(trained).glob("lanes-*.parquet"))]
    visits = np.concatenate([table["visits"].to_numpy() for table in lanes])
    assert len(visits) == 200 and sorted(visits) == sorted(Counter(log["sample"].tolist()).values())
    warm = dict(zip(log["sample"][log["visit"] < 2].tolist(), log["score"][log["visit"] < 2].tolist()))  # the last one, rows go by step
    scores = np.concatenate([table["score"].to_numpy() for table in lanes]).tolist()
    assert sorted(scores) == sorted(warm.values())  # frozen at the sample's own last warm-up visit
    assert [int(log["kept"][log["step"] == step].sum()) for step in range(18)] == [64] * 7 + [32] * 11


def test_only_matrices_decay(start) -> None:
    trainer = start(f"towers.student={RESNET}", "optimizer.weight_decay=0.3")
    decayed, free = trainer.engine.optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in trainer.engine.raw.named_parameters()}
    assert {id(p) for group in (decayed, free) for p in group["params"]} == set(names)
    for p in free["params"]:
        assert p.ndim == 1
    without = {names[id(p)] for p in free["params"]}
    assert {
        name for name in names.values() if name.endswith("bias") or "logit_scale" in name or ".bn1." in name or ".ln_" in name
    } <= without
    assert all(name.endswith(("weight", "embedding", "projection")) for name in names.values() if name not in without)


def test_the_schedule_is_linear_then_cosine() -> None:
    recipe = OptimizerConfig(lr=2.0, warmup=10, final_lr=0.1)
    rates = [recipe.rate_at(step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)
    assert rates[35] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    share = OptimizerConfig(lr=1.0, warmup=0.1)
    assert [share.rate_at(step, 100) for step in (0, 4, 9, 10, 100)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.0])
    assert OptimizerConfig(lr=1.0, warmup=0.0).rate_at(0, 10) == 1.0


@pytest.mark.parametrize(("value", "bound"), [(9.0, math.log(100)), (-5.0, 0.0)])
def test_the_logit_scale_stays_between_one_and_a_hundred(start, value: float, bound: float) -> None:
    trainer = start("selector={name: keep_all}")
    scale = trainer.engine.raw.towers["student"].logit_scale
    nn.init.constant_(scale, value)
    batch = trainer.data.next()
    trainer.engine.step(batch, trainer.selector.select(batch, None, 0)[0], 0)
    assert scale.item() == pytest.approx(bound)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_an_infinite_weight_stops_the_run_with_the_sample_ids_and_without_a_checkpoint(
    trained: Path, icons_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture, log_every: int
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000018")
    model = run / "checkpoints" / "step-00000010" / "model.safetensors"
    values = load_file(model)
    values["towers.student.image.weight"][0, 0] = math.inf
    save_file(values, model)
    commit_again(model.parent)
    assert main(arguments(icons_small, run, f"record.log_every={log_every}", "checkpoint.every=3")) == 2
    said = capsys.readouterr().err
    assert "step 10: loss nan" in said and "not-finite-rank0000.json" in said and "optimizer.lr" in said
    found = json.loads((run / "not-finite-rank0000.json").read_text())
    log = columns(selection_log(trained))
    offered = set(log["sample"][log["step"] == 10].tolist())
    assert found["step"] == 10 and len(found["samples"]) == 32 and set(found["samples"]) <= offered
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]
    assert losses(run)[-1][0] == 10


def test_a_learning_rate_that_explodes_leaves_no_checkpoint_that_is_not_finite(icons_small: Path, tmp_path: Path, capsys) -> None:
    changes = ["optimizer.lr=1e38", "optimizer.warmup=0.0", "checkpoint.every=1", "checkpoint.keep=99"]
    assert main(arguments(icons_small, tmp_path / "run", *changes)) == 2
    said = capsys.readouterr().err
    assert "step 0: loss 5." in said and "not all finite" in said  # the loss was fine, what the step left was not
    for path in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


def test_metrics_say_what_each_step_did(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    fields = "step visit loss clip logit_scale grad_norm lr candidates_per_second trained_per_second kept_share skipped_share padded_share bad_share data_wait_share "
    fields += "peak_memory_bytes eta_seconds wall_seconds flop_utilisation"
    assert [line["step"] for line in lines] == list(range(1, 19))
    recipe = OptimizerConfig(lr=0.01)
    for line in lines:
        assert set(line) == set(fields.split()) and all(math.isfinite(value) for value in line.values())
        assert line["kept_share"] == (1.0 if line["step"] <= 7 else 0.5) and line["skipped_share"] == 0
        assert line["lr"] == recipe.rate_at(line["step"] - 1, 18) and line["visit"] == pytest.approx(line["step"] * 64 / 200)
        assert line["loss"] == line["clip"] and 0 <= line["data_wait_share"] <= 1 and 0 < line["flop_utilisation"] < 1
    assert lines[-1]["eta_seconds"] == 0 and lines[-1]["loss"] < lines[0]["loss"]
    result = json.loads((trained / "result.json").read_text())
    expected = {"offered": 18 * 64, "scored": 18 * 64, "trained": 7 * 64 + 11 * 32, "bad": {}}
    assert result["samples"] == expected and result["complete"] is True
    assert set(result["seconds"]) >= {"data", "score", "train", "save", "total"}


def test_the_run_folder_holds_the_resolved_config_before_the_first_step(trained: Path, start, icons_small: Path, tmp_path: Path) -> None:
    _, path, *given = arguments(icons_small, trained)
    assert load(RunConfig, trained / "resolved.yaml") == load(RunConfig, path, given)
    start("optimizer.lr=0.5", "towers.student.vocab_size=300")  # built, not trained: there is no checkpoint to agree with
    start("optimizer.lr=0.25", "towers.student.vocab_size=400")
    config = load(RunConfig, tmp_path / "run" / "resolved.yaml")
    assert config.optimizer.lr == 0.25
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["added_tokens"][-1]["id"] > 300  # no tokenizer of the run before


def test_what_was_trained_can_be_opened_and_used(trained: Path) -> None:
    run = TrainedRun(trained)
    assert same(run.task.state_dict(), load_file(last_checkpoint(trained) / "model.safetensors"))
    older = TrainedRun(trained, "10")
    assert not same(run.task.state_dict(), older.task.state_dict())


def test_trackers_and_traces_are_written(start, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = start("record.trackers=[tensorboard]", "steps=6", "visits=null", "record.profile=4:6")
    assert trainer.fit()
    events = EventAccumulator(str(next((tmp_path / "run" / "trackers").rglob("events.out.tfevents*")).parent))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(step, loss) for step, loss, _ in losses(tmp_path / "run")]
    trace = json.loads((tmp_path / "run" / "trace-4-6.json").read_text())
    named = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")
    assert named["kernels.clip_loss"] == 2 and named["kernels.score"] == 2 * 2, "two steps of two groups"


@pytest.mark.parametrize("kernel", ["pipeline.objectives.clip.clip_loss", "pipeline.kernels.score", "pipeline.kernels.cosine"])
def test_nothing_is_trained_without_the_kernels(start, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step goes through them: there is no second formula beside them."""

    def broken(*given: Any, **named: Any) -> None:
        raise RuntimeError("the kernel is gone")

    trainer = start()
    monkeypatch.setattr(kernel, broken)
    with pytest.raises(RuntimeError, match="the kernel is gone"):
        trainer.fit()


def test_an_evaluation_while_training_does_not_change_it(trained: Path, start, icons_small: Path, tmp_path: Path) -> None:
    trainer = start(f"evaluation={{data: {icons_small}, classes: all, every: 6, workers: 0}}")
    assert trainer.fit()
    assert_same_end(tmp_path / "run", trained)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated: list[dict[str, Any]] = [line for line in lines if "eval" in line]
    assert [line["step"] for line in evaluated] == [6, 12, 18]
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best["zero_shot_top1"] == max(line["eval"]["zero_shot_top1"] for line in evaluated)
    if best["step"] == 18:
        assert same(
            load_file(tmp_path / "run" / "best" / "model.safetensors"),
            load_file(checkpoint.folder_of(tmp_path / "run", 18) / "model.safetensors"),
        )
    assert read_yaml((tmp_path / "run" / "resolved.yaml").read_text())["evaluation"]["every"] == 6
