"""The options of the scoring pass: what each embeds, what stands in for it, and that training itself stays as it is."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from benchmarks.loops import PublishedLoop
from pipeline import kernels
from pipeline.config import ConfigError, dump, load, parse
from pipeline.data.lanes import RankLanes, SourceShape, layout
from pipeline.data.sources import Sources
from pipeline.evaluation.curate import judge
from pipeline.run import RunConfig
from pipeline.selection.scoring import Scoring, ScoringConfig
from pipeline.trainer import Trainer
from tests.runs import DEBUG, assert_same_end, columns, last_checkpoint, losses, selection_log

VIT = """towers.student={name: open_clip, tokenizer: {kind: bpe, vocab_size: 300}, model: {embed_dim: 16,
    vision_cfg: {image_size: 32, patch_size: 8, width: 32, layers: 1, head_width: 16}, text_cfg: {context_length: 8, width: 16, heads: 2, layers: 1}}}"""


def trainer_config(trainer: Trainer) -> RunConfig:
    return load(RunConfig, trainer.folder / "resolved.yaml")


def log_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return columns(selection_log(trainer.folder))


def test_every_setting_survives_and_reuse_is_not_mixed_with_views() -> None:
    given = {"precision": "bf16", "image_size": 16, "patches": 0.5, "every": 3, "reuse": False, "ahead": True, "micro_batch": 5}
    config = load(RunConfig, DEBUG, [f"scoring.{key}={json.dumps(value)}" for key, value in given.items()])
    assert config.scoring.model_dump() == given and parse(RunConfig, dump(config), "again") == config
    assert load(RunConfig, DEBUG, ["scoring.reuse=true"]).scoring.reuse
    for other in ("image_size=16", "patches=0.5"):
        with pytest.raises(ConfigError, match="cannot be compared"):
            load(RunConfig, DEBUG, ["scoring.reuse=true", f"scoring.{other}"])


def test_scores_of_another_precision_leave_training_as_it_was(start) -> None:
    common = ("selector={name: dissect, rate: 1.0}", "steps=3", "visits=null", VIT)
    plain, half = start(*common, out="plain"), start(*common, "scoring.precision=bf16", out="half")
    assert plain.fit() and half.fit()
    assert losses(plain.folder) == losses(half.folder)
    scores = [log_of(trainer)["score"] for trainer in (plain, half)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 2


def test_views_are_smaller_images_and_some_patches(start) -> None:
    trainer = start(VIT, "scoring.image_size=16", "scoring.patches=0.5", "scoring.micro_batch=7")
    batch, tower = trainer.data.next(), trainer.engine.raw.towers["student"]
    view = trainer.scoring.view(batch)
    assert view.fields["image"].shape == (64, 3, 16, 16) and view.fields["image"].dtype == torch.uint8
    kept = view.fields["image.patches"]
    assert kept.shape == (64, 2) and (kept[:, 0] < kept[:, 1]).all() and len(kept.unique()) == 4 and batch.fields["image"].shape[-1] == 32
    again = trainer.scoring.view(batch.map(lambda value: value.flip(0)))
    assert torch.equal(again.fields["image.patches"].flip(0), kept), "the patches belong to the sample, not to its place"
    whole = trainer.engine.features(view)
    assert torch.allclose(trainer.scoring.embed(batch)["image"], whole["image"], atol=1e-5)
    with torch.no_grad():
        full = trainer.engine.features(batch)["image"]
        everything = torch.arange(16).expand(64, -1)
        same = tower.eval()(batch.fields | {"image.patches": everything})["image"]
        assert torch.allclose(same, full, atol=1e-5) and not torch.allclose(whole["image"], full, atol=1e-3)
        # patches that are not kept are not looked at
        few, spoiled = torch.tensor([[0, 5]]).expand(64, -1), batch.fields["image"].clone()
        spoiled[:, :, 16:, :], spoiled[:, :, :8, 8:], spoiled[:, :, 8:16, 16:] = 255, 255, 255
        one, other = (tower({"image": image, "image.patches": few})["image"] for image in (batch.fields["image"], spoiled))
        assert torch.equal(one, other)
    trainer.steps = 3
    assert trainer.fit() and trainer.progress.scored == trainer.progress.offered


def test_position_embeddings_are_interpolated_for_smaller_images(start) -> None:
    visual = start(VIT, "scoring.image_size=16").engine.raw.towers["student"].model.visual
    with torch.no_grad():
        visual.conv1.weight.zero_()
        grid = visual.positional_embedding[1:].view(4, 4, -1)
        grid.copy_(torch.arange(4.0)[:, None, None].expand_as(grid))  # grows downwards
        visual.ln_pre = torch.nn.Identity()
        rows = visual._embeds(torch.zeros(1, 3, 16, 16))[0, 1:, 0].view(2, 2)
    assert torch.equal(rows[:, 0], rows[:, 1]) and rows[0, 0] < 1.5 < rows[1, 0]


@pytest.mark.parametrize("option", ["image_size=8", "patches=0.5"])
def test_a_tower_without_views_is_refused(start, option: str) -> None:
    with pytest.raises(ConfigError, match=r"here: \{'student': None\}.*scoring.patches=1.0"):
        start(f"scoring.{option}")


def test_a_size_that_cuts_patches_and_a_loss_that_must_be_new_are_refused(start) -> None:
    with pytest.raises(ConfigError, match="12 is no multiple of the towers' patches of 8 px"):
        start(VIT, "scoring.image_size=12")
    with pytest.raises(ConfigError, match="big_loss needs loss of every candidate"):
        start("selector={name: big_loss}", "scoring.every=2")


def test_which_lanes_are_scored_is_the_same_for_every_number_of_ranks() -> None:
    plan = layout([SourceShape(np.array([0, 640]), 1.0)], 64, 8, 4, 4, 0)

    def rows(size: int, step: int) -> list[tuple[list[int], int]]:
        made = []
        for rank in range(size):
            scoring = Scoring.__new__(Scoring)
            scoring.config, scoring.lanes = ScoringConfig(every=3), RankLanes(plan, rank, size)
            found, padding = scoring.rows(step)
            mine = np.arange(64 // size) if found is None else found
            made.append(((mine + rank * 64 // size).tolist(), padding))
        return made

    seen = np.zeros(64, int)
    for step in range(10, 40):  # visits 1, 2 and 3: steps of 64 of 640
        alone = rows(1, step)[0][0]
        for size in (2, 4):
            parts = rows(size, step)
            assert [row for part, _ in parts for row in part] == alone
            assert len({len(part) + padding for part, padding in parts}) == 1, "every rank embeds as many rows"
        seen[alone] += 1
    assert (seen == 10).all(), "each place once in three visits"
    assert rows(1, 0)[0][0] == list(range(64)), "a first visit has nothing that could stand in"


def test_a_last_score_stands_in_and_is_not_recorded_as_a_visit(start) -> None:
    trainer = start("scoring.every=2", "visits=8")
    assert trainer.fit()
    log, plan = log_of(trainer), trainer.data.lanes.layout
    warm = plan.steps_for(2)
    assert warm * 64 < trainer.progress.scored < 0.7 * trainer.progress.offered
    scored, later = np.isfinite(log["score"]), log["step"] >= warm
    assert scored[~later].all() and 0.4 < scored[later].mean() < 0.6 and np.isfinite(log["ranked_by"][later]).all()
    found = judge(trainer.folder, Sources.open(trainer_config(trainer).data))
    assert np.array_equal(found.visits[trainer.data.lanes.ids], trainer.scoring.state_dict()["visits"].numpy())
    full = start("visits=8", out="full")
    assert full.fit()
    visits = [t.scoring.state_dict()["visits"].float().mean().item() for t in (trainer, full)]
    assert visits[1] > 7.5 and visits[0] == pytest.approx(trainer.progress.scored / plan.num_samples, abs=0.1)
    assert torch.equal(trainer.scoring.state_dict()["score"], trainer.selector.selector.scores.score)


def test_a_warm_up_that_scores_nothing_is_followed_by_a_visit_that_scores_all(start) -> None:
    trainer = start("scoring.every=2", "visits=6", "selector={name: clip_score, rate: 0.5, warmup_visits: 2}")
    assert trainer.fit()
    log, plan, first = log_of(trainer), trainer.data.lanes.layout, trainer.scoring.first_scores
    warm, later = plan.steps_for(2), plan.steps_for(3)
    assert warm - 1 <= first.start <= warm < later == first.stop
    assert np.isnan(log["score"][log["step"] < first.start]).all() and not np.isnan(log["score"][np.isin(log["step"], first)]).any()
    assert len(first) * 64 < trainer.progress.scored < (len(first) + 0.7 * (trainer.steps - later)) * 64
    for step in range(warm, trainer.steps):  # the better half of each group, not the lanes that happened to be scored
        for group in np.split(np.flatnonzero(log["step"] == step), 2):
            kept, scores = log["kept"][group], log["ranked_by"][group]
            assert kept.sum() == 16 and scores[kept].min() >= scores[~kept].max()
    reused = start("scoring.every=2", "scoring.reuse=true", "selector={name: clip_score, rate: 0.5, warmup_visits: 2}", out="reused")
    assert not reused.scoring.first_scores, "training forwards were scores already"
    idle = start("scoring.every=2", "selector={name: random, rate: 0.5, warmup_visits: 2}", out="idle")
    assert not idle.scoring.first_scores, "it asks for no scores"


def test_training_forwards_can_replace_the_warm_ups_scoring_pass(start) -> None:
    plain, reused = start(out="plain"), start("scoring.reuse=true", out="reused")
    assert plain.fit() and reused.fit()
    warm = plain.data.lanes.layout.steps_for(2) * 64
    assert plain.progress.scored - reused.progress.scored == warm
    here, there = log_of(plain), log_of(reused)
    assert np.array_equal(here["kept"], there["kept"]) and losses(plain.folder) == losses(reused.folder)
    assert np.allclose(here["score"], there["score"], atol=1e-3) and not np.isnan(there["score"]).any()


def test_all_options_together_resume_to_the_same_bits(start, tmp_path: Path) -> None:
    given = ("scoring.every=2", "scoring.reuse=true", "scoring.precision=bf16", "objectives.clip.negatives=all", "checkpoint.every=7")
    assert start(*given, out="whole").fit()
    stopped = start(*given, out="parts")
    stopped.stop.agreed = lambda step: step == 14  # in the middle of a visit, after warm-up
    assert not stopped.fit()
    del stopped.lock
    resumed = start(*given, out="parts")
    assert resumed.progress.step == 14 and resumed.fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert last_checkpoint(tmp_path / "parts").name == "step-00000018"


def test_rejected_rows_are_negatives_without_gradient(start) -> None:
    trainer = start("objectives.clip.negatives=all", "selector={name: dissect, rate: 0.5}")
    batch = trainer.data.next()
    choice = trainer.scoring.choose(batch, 0)
    rows, features = choice.selection.rows, trainer.engine.features(batch)
    taken = batch.take(rows, choice.features)
    left = sorted(set(range(64)) - set(rows.tolist()))
    assert len(taken) == 32 and torch.equal(taken.unselected["image"], features["image"][left]) and taken.unselected["valid"].all()
    images, texts = (torch.cat([features[name][rows], features[name][left]]) for name in ("image", "text"))
    images, texts = (value.double().requires_grad_() for value in (images, texts))
    s, own = features["scale"].double(), torch.arange(32)
    expected = (F.cross_entropy(s * images[:32] @ texts.T, own) + F.cross_entropy(s * texts[:32] @ images.T, own)) / 2
    with torch.enable_grad():
        out = trainer.engine.raw(taken, "train", choice.selection)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(out.cosine, kernels.cosine(features["image"][rows], features["text"][rows]), atol=1e-5)
    plain = trainer.engine.raw(batch.take(rows), "train", choice.selection)
    assert out.loss > plain.loss
    expected.backward()
    assert images.grad[32:].any(), "they push the chosen rows; that they are not pushed back is what detached means"
    out.loss.backward()


def test_random_rows_ask_for_a_scoring_pass_only_where_the_rejected_are_wanted(start) -> None:
    for negatives, scored in (("selected", 0), ("all", 2 * 64)):
        trainer = start(
            "selector={name: random, rate: 0.5}", f"objectives.clip.negatives={negatives}", "steps=2", "visits=null", out=negatives
        )
        assert trainer.fit() and trainer.progress.scored == scored


def test_a_super_batch_trains_as_many_rows_as_the_batch_says(start) -> None:
    trainer = start("data.batch=32", "data.candidates=2", "selector.rate=0.5", "visits=6")
    assert trainer.steps == 18
    batch = trainer.data.next()
    assert len(batch) == 64 and len(trainer.scoring.choose(batch, 17).selection.rows) == 32


def test_the_published_loop_that_is_timed_chooses_and_trains_what_a_run_does(start) -> None:
    options = ("selector={name: dissect, rate: 0.25}", "data.groups=1", "optimizer={lr: 0.001, weight_decay: 0.1, warmup: 0.0}")
    trainer = start(VIT, *options, "steps=1", "visits=null")
    tower, batch = copy.deepcopy(trainer.engine.raw.towers["student"]), trainer.data.next()
    peer = PublishedLoop(tower, iter([batch]), torch.float32, 0.25, trainer.data.lanes.num_samples)
    table = trainer.selector.selector.scores
    table.visits.fill_(1)
    table.score.copy_(torch.tensor([peer.book.history[f"{sample:09}"] for sample in trainer.data.lanes.ids.tolist()]))
    assert peer.step() == 64
    choice = trainer.scoring.choose(batch, 0)
    chosen = {int(key) for key, kept in peer.book.chosen.items() if kept}
    assert chosen == set(batch.sample[choice.selection.rows].tolist()) and len(chosen) == 16
    trainer.engine.step(batch.take(choice.selection.rows), choice.selection, 0)
    for name, value in trainer.engine.raw.towers["student"].state_dict().items():
        if not name.endswith("bias"):  # which ours does not decay
            assert ((value - tower.state_dict()[name]).abs() < 3e-4).float().mean() > 0.99, name  # of a first step of 1e-3


def test_the_cost_model_is_printed_at_the_first_step(start, capsys: pytest.CaptureFixture) -> None:
    assert start(VIT, "scoring.image_size=16", "scoring.every=2", "steps=1", "visits=null").fit()
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring: "))
    forward = float(said.split("forward is ")[1].split()[0])
    assert 0.2 < forward < 0.6 and "every 2 visits" in said and "rate 0.50" in said
    step, share = float(said.split("a step is ")[1].split()[0]), float(said.split("(scoring ")[1].split()[0])
    assert share == pytest.approx(forward / 6, abs=0.011) and step == pytest.approx(share + 0.5, abs=0.011)
    assert f"in warm-up {1 + forward / 3:.2f}" in said


def test_what_a_view_knows_is_told_once_after_warm_up(start, capsys: pytest.CaptureFixture) -> None:
    trainer = start(VIT, "scoring.image_size=16", "scoring.micro_batch=9", "selector.warmup_visits=1")
    batch, scoring = trainer.data.next(), trainer.scoring
    views = [trainer.engine.features(view) for view in (batch, scoring.view(batch))]
    right = spearmanr(*((found["image"] * found["text"]).sum(1) for found in views)).statistic
    trainer.progress.step = scoring.groups.selector.warmup_steps
    trainer.choose(batch)
    assert f"whole images {right:.2f}" in capsys.readouterr().out and abs(right) < 0.999
    trainer.progress.step += 1
    trainer.choose(batch)
    assert "rank correlation" not in capsys.readouterr().out


def test_the_cost_model_counts_scores_that_only_the_automatic_warm_up_wants(start, capsys: pytest.CaptureFixture) -> None:
    assert start("selector={name: random, rate: 0.5, warmup_visits: auto}", "steps=4", "visits=null").fit()
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring: "))
    assert "in warm-up 1.33" in said and "(scoring 0.00 + rate 0.50)" in said


def test_a_rate_that_changes_trains_more_rows_first(start) -> None:
    trainer = start("selector={name: dissect, rate: {start: 1.0, end: 0.25, visits: 2}, warmup_visits: 1}", "visits=4")
    ends = [trainer.data.lanes.layout.steps_for(visits) for visits in (1, 3)]
    assert trainer.fit()
    log = log_of(trainer)
    kept = [int(log["kept"][log["step"] == step].sum()) for step in range(trainer.steps)]
    size = trainer.data.lanes.layout.batch
    assert kept == sorted(kept, reverse=True) and kept[: ends[0] + 1] == [size] * (ends[0] + 1) and size / 4 < kept[ends[0] + 1] < size
    assert set(kept[ends[1] :]) == {size // 4}
