"""scoring.ahead: a batch is scored at the step before its own, beside training on a GPU, and nothing but that is different."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import kernels
from pipeline.config import ConfigError
from pipeline.selection.scoring import Choice, Scoring
from pipeline.trainer import Trainer
from pipeline.types import Selection
from tests.runs import SKIPS, assert_same_end, columns, losses, selection_log

AHEAD = "scoring.ahead=true"
CLIP_SCORE = "selector={name: clip_score, rate: 0.5, warmup_visits: %s}"


def log_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return columns(selection_log(trainer.folder))


def test_choices_and_losses_are_those_of_a_loop_that_scores_the_next_batch_before_each_update(start) -> None:
    run, plain, hand = start(AHEAD), start(out="plain"), start(out="hand")
    assert run.fit() and plain.fit()
    last, engine, data = torch.full((200,), torch.nan), hand.engine, hand.data
    kept, found = [], []

    def score(batch) -> None:
        features = engine.features(batch)
        last[batch.slot] = kernels.cosine(features["image"], features["text"])

    score(data.peek())
    for step in range(hand.steps):
        batch = data.next()
        chosen, _ = hand.selector.select(batch, {"cosine": last[batch.slot]}, step)
        if (coming := data.peek()) is not None:
            score(coming)
        trained = engine.step(batch.take(chosen.rows), chosen, step)
        kept += [(step, sample) for sample in sorted(batch.sample[chosen.rows].tolist())]
        found.append((step + 1, float(trained.loss), float(trained.grad_norm)))
    assert data.peek() is None and found == losses(run.folder)
    log = log_of(run)
    assert kept == list(zip(log["step"][log["kept"]].tolist(), log["sample"][log["kept"]].tolist()))
    warm = run.selector.selector.warmup_steps
    assert found[:warm] == losses(plain.folder)[:warm] and found[warm + 1 :] != losses(plain.folder)[warm + 1 :]
    assert run.progress.scored == plain.progress.scored == run.progress.offered


CASES = {
    "every": ("scoring.every=2", "selector.warmup_visits=1", "visits=4"),
    "auto": (CLIP_SCORE % "auto", "scoring.every=2", "visits=4"),
    "reuse": ("scoring.reuse=true", CLIP_SCORE % 1, "visits=3"),
    "judges": ("selector={name: blend, rate: 0.5, warmup_visits: 1}", "visits=3"),
    "skip": (*SKIPS, "selector={name: dissect, rate: 0.5, warmup_visits: 2, scope: global}"),
}


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bits(start, tmp_path: Path, options: tuple[str, ...]) -> None:
    whole = start(AHEAD, *options, out="whole")
    assert whole.fit()
    stops = range(1, whole.steps) if whole.steps < 20 else range(4, whole.steps, 5)
    for last in (*stops, whole.steps):
        part = start(AHEAD, *options, out="parts")
        part.stop.agreed = lambda step, last=last: step == last
        assert part.fit() == (last == whole.steps)
        del part.lock
    assert part.progress.scored == whole.progress.scored
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("options", [CASES["every"], (*CASES["auto"], "visits=8"), CASES["reuse"]], ids=["every", "auto", "reuse"])
def test_the_rows_that_are_scored_and_counted_are_those_of_a_run_that_scores_at_each_step(start, options: tuple[str, ...]) -> None:
    ahead, plain = start(AHEAD, *options, out="ahead"), start(*options, out="plain")
    assert ahead.fit() and plain.fit()
    logs, ends = [log_of(run) for run in (ahead, plain)], [run.selector.selector.warmup_steps for run in (ahead, plain)]
    if ends[0] == ends[1]:
        assert all(np.array_equal(np.isfinite(logs[0][name]), np.isfinite(logs[1][name])) for name in ("score", "ranked_by"))
        assert np.array_equal(*(run.scoring.state_dict()["visits"] for run in (ahead, plain)))
    auto = ahead.selector.selector.config.warmup_visits == "auto"
    more = ahead.progress.scored - plain.progress.scored
    assert more == 0 if not auto else 0 < ends[0] < ahead.steps and more > 0  # auto: the batch that was scored as one of warm-up


def test_what_cannot_be_decoded_is_not_remembered_and_not_chosen(start) -> None:
    scoring, data = (trainer := start(AHEAD, "selector.warmup_visits=0")).scoring, trainer.data
    nothing, batch = Choice(Selection(torch.arange(0))), data.next()
    batch.valid[::2] = False
    assert scoring.ahead(nothing, None, 1) is nothing and scoring.ready == -1
    assert scoring.ahead(nothing, batch, 1).scored == 64 and scoring.ready == 1
    known = scoring.last[batch.slot]
    assert known[::2].isnan().all() and not known[1::2].isnan().any()
    choice = scoring.choose(batch, 1)
    assert choice.scored == 0 and choice.selection.rows.tolist() == list(range(1, 64, 2))
    assert scoring.choose(batch, 2).scored == 64, "what is not ready is scored at its own step"


def test_what_a_forward_beside_training_cannot_have_is_refused(start) -> None:
    resnet = """towers.student={name: open_clip, tokenizer: {kind: bpe, vocab_size: 300}, model: {embed_dim: 16, vision_cfg: {layers: [1, 1, 1, 1],
        width: 8, image_size: 32, head_width: 32}, text_cfg: {context_length: 8, width: 16, heads: 2, layers: 1}}}"""
    for option, why in (
        ("selector={name: big_loss}", "ahead: True, but big_loss needs loss .* set scoring.ahead=false"),
        ("objectives.clip.negatives=all", "rejected rows for negatives"),
        (resnet, "a tower has BatchNorm"),
    ):
        with pytest.raises(ConfigError, match=why):
            start(AHEAD, option)
    trainer = start(AHEAD)
    trainer.engine.stage = 3
    with pytest.raises(ConfigError, match="zero.stage 3"):
        Scoring(trainer.scoring.config, trainer.engine, trainer.selector, trainer.data.lanes, 0, False)


def test_the_cost_model_says_that_a_cpu_hides_nothing(start, capsys: pytest.CaptureFixture) -> None:
    assert start(AHEAD, "steps=1", "visits=null").fit()
    assert "ahead: nothing is hidden on a CPU" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [(), ("scoring.every=2", "engine.precision=bf16", "scoring.micro_batch=9")], ids=["all", "part"])
def test_a_stream_of_its_own_gives_the_bits_of_a_run_without_one_however_late_it_is(
    start, tmp_path: Path, options: tuple[str, ...]
) -> None:
    alone, beside = start(AHEAD, *options, out="alone"), start(AHEAD, *options, out="beside")
    alone.engine.side, enter = None, beside.engine.beside

    @contextmanager
    def late() -> Iterator[None]:
        with enter():
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms: training has long been queued, and would be through
            yield

    beside.engine.beside = late
    assert beside.engine.side is not None and alone.fit() and beside.fit()
    assert_same_end(tmp_path / "alone", tmp_path / "beside")
