"""Pairs of related items from the source to the figures: what samples hold, a run on frozen vision, its evaluation, the diagnostic."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import systems_notellm2
from pipeline.__main__ import main
from pipeline.config import ConfigError, parse
from pipeline.data.fetch import Fetch
from pipeline.data.sources import DataConfig, Sources
from pipeline.evaluation.items import _words, recalls
from pipeline.evaluation.saliency import saliency
from pipeline.run import TrainedRun
from pipeline.towers._item import ConnectorConfig, ItemEncoder, Places, language_model
from pipeline.towers._prompt import ItemText
from pipeline.towers.mlrm import FILE
from slurm.plan import measure
from tests.distill import refused, train
from tests.items import LLM, clip, config, pairs  # noqa: F401, fixtures
from tests.runs import last_checkpoint
from tests.shards import by_hand, samples
from tools.make_shards import main as make_shards
from tools.sources import icons, items

MEMBERS = {"png", "txt", "related_image.png", "related_text.txt"}


def test_a_sample_is_a_pair_of_one_concept_and_artist_and_no_drawing_is_in_two(tmp_path: Path) -> None:
    for split in ("train", "test"):
        every, found = icons.icons(split), items.pairs_of(split, 0)
        assert max(Counter(row for pair in found for row in pair).values()) == 1
        for one, other in ([every[row] for row in pair] for pair in found):
            assert one.pack == other.pack and one.name.split()[0] == other.name.split()[0] and one.name != other.name
    single = items.pairs_of("test", 1)
    assert set(single) <= set(items.pairs_of("test", 0)) and 400 < len(single) < 500
    assert make_shards(["items", str(tmp_path), "--split", "test", "--limit", "20", "--size", "24", "--workers", "1"]) == 0
    for sample in samples(tmp_path):
        assert set(sample) == MEMBERS
        texts = [sample[name].decode() for name in ("txt", "related_text.txt")]
        assert texts[0] != texts[1] and texts[0].split()[0] == texts[1].split()[0]
        drawn = [np.asarray(Image.open(io.BytesIO(sample[name]))) for name in ("png", "related_image.png")]
        assert drawn[0].shape == (24, 24) and (drawn[0] != drawn[1]).any()


def test_items_lack_what_was_asked_but_never_both(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    found = samples(pairs)
    has = {name: sum(name in sample for sample in found) / len(found) for name in MEMBERS}
    assert all(0.65 < share < 0.95 for share in has.values())
    assert all(sample.keys() & {"png", "txt"} and sample.keys() & {"related_image.png", "related_text.txt"} for sample in found)
    for options, said in (
        (["--without-image", "0.6", "--without-text", "0.6"], "together at most 1"),
        (["--noise", "0.5", "--without-text", "0.1"], "does not go with"),
        (["--short-text", "2"], "shares from 0 to 1"),
    ):
        assert make_shards(["items", str(tmp_path), "--workers", "1", *options]) == 1
        assert said in capsys.readouterr().err


def test_a_run_on_frozen_vision_and_its_evaluation(pairs: Path, clip: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    train(config(pairs, out, clip, evaluation={"data": str(pairs), "workers": 0}))
    theirs, mine = (load_file(last_checkpoint(run) / "model.safetensors") for run in (clip, out))
    vision = {name: value for name, value in mine.items() if name.startswith("towers.student.vision.")}
    assert len(vision) > 10
    for name, value in vision.items():
        assert torch.equal(value, theirs[name.replace("vision.", "model.visual.")]), name
    assert "<IMG>" in (out / FILE).read_text()  # and not the CLIP run's tokenizer, which came with nothing of the text
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 6
    assert main(["evaluate", str(out), "--quiet"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["pairs"] == 96
    asked = {name: figures["queries"] for name, figures in result["related"].items()}
    assert asked.pop("whole") == 96 and len(asked) == 3 and all(0 < count < 96 for count in asked.values())
    words = [len(sample.get("txt", b"").decode().split()) for sample in samples(pairs)]
    assert asked["short_text"] == sum(count <= 1 for count in words)
    whole, image = (result["related"][name] for name in ("whole", "image_only"))
    assert whole["r10"] <= whole["r100"] == 1.0 and whole["chance"]["r10"] == pytest.approx(10 / 96)
    drawn = sum("related_image.png" in sample for sample in samples(pairs))
    assert drawn < 96 and image["chance"]["r10"] == pytest.approx(10 / drawn)
    assert main(["report", str(out)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Of 96 held-out items" in page and "R@10, image only" in page and "no zero-shot figures" not in page
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        (out / FILE).unlink()
        TrainedRun(out)


def test_words_are_counted_in_the_members_that_the_tower_reads(tmp_path: Path) -> None:
    other = {"b.json": b'{"title": "b"}'}
    notes = [{"title": "a red house", "content": "to let"}, {"topic": ["sky"]}, None]
    folder = by_hand(tmp_path / "notes", [{"a.json": json.dumps(note).encode()} | other if note else other for note in notes])
    given = {"sources": [{"url": str(folder)}], "modalities": {"text": {"members": ["a"], "optional": True}}, "batch": 4}
    texts = Fetch(Sources.open(parse(DataConfig, given, "test")), {"text": ItemText(str)}, seed=None)
    assert [_words(texts, row) for row in range(3)] == [5, 1, 0]


def test_what_an_item_run_cannot_do_is_said_before_training(pairs: Path, clip: Path, tmp_path: Path) -> None:  # noqa: F811
    basic = config(pairs, tmp_path / "a", clip).towers["student"].model_copy(update={"prompt": "basic"})
    wired = config(pairs, tmp_path / "a", clip).model_copy(update={"towers": {"student": basic}})
    refused(wired, ConfigError, r"objectives.pairs reads \['visual', 'related_visual'\]")
    periodic = config(pairs, tmp_path / "b", clip, evaluation={"data": str(pairs), "every": 2, "workers": 0})
    refused(periodic, ConfigError, "mlrm is evaluated at the end")


def test_a_dry_run_counts_the_tower_without_any_file_of_weights(pairs: Path, clip: Path, tmp_path: Path) -> None:  # noqa: F811
    run = config(pairs, tmp_path, clip)
    missing = run.towers["student"].model_copy(update={"pretrained": "models/none"})
    counted = measure(run.model_copy(update={"towers": {"student": missing}}))
    assert counted.flops > 1e6 and 5e4 < counted.parameters < 1e5


def test_recall_is_of_the_partner_among_all_second_items() -> None:
    pool = torch.eye(20)
    queries = pool.clone()
    queries[3] = pool[4]  # one goes wrong
    queries[7] = 0  # one has nothing to ask with
    every = torch.ones(20, dtype=torch.bool)
    found = recalls(queries, pool, every)
    assert found["queries"] == 19 and found["r1"] == pytest.approx(18 / 19) and found["chance"]["r1"] == pytest.approx(1 / 20)
    lacking = pool.clone()
    lacking[:15] = 0  # of cosine 0 with all: they were as good as the right answer of a query that points away from it
    lacking[17], away = pool[19], -pool
    found = recalls(away, lacking, every)
    assert found["queries"] == 5 and found["chance"]["r1"] == pytest.approx(1 / 5) and found["r10"] == 1
    assert recalls(queries, pool, torch.arange(20) == 3)["r1"] == 0
    assert recalls(queries, pool, torch.arange(20) == 7) is None


@pytest.mark.parametrize("variant", systems_notellm2.VARIANTS)
def test_the_toy_reads_its_vectors_where_its_prompts_end(variant: str) -> None:
    world = systems_notellm2.World(0)
    one, other = world.pairs(torch.Generator().manual_seed(0), 40, distinct=True)
    model = systems_notellm2.Model(variant, None)
    ids, places = systems_notellm2.ids_of(model.prompt, model.image, one.words)
    last = model.items.last(ids) - model.items.shift
    assert (ids.gather(1, last[:, None]) == systems_notellm2.QUOTE).all()
    assert (last - places.text_at).tolist() == (one.words != 0).sum(1).tolist()
    assert places.answer_at is None or (ids[:, places.answer_at - 1] == systems_notellm2.QUOTE).all()
    same, others = systems_notellm2.measure(model, (one, one)), systems_notellm2.measure(model, (one, other))
    assert same["R@1"] > 80 and same["R@1"] > others["R@1"] and all(0 <= value <= 200 for value in others.values())


def test_saliency_says_where_the_loss_hangs() -> None:
    """A loss of a model whose image is zeros and read by nothing: what flows is told apart by place and adds up to 1."""
    torch.manual_seed(0)
    items_ = ItemEncoder(
        language_model(LLM, None, 50),
        Places(0, 1, 3, 5, 1),
        ConnectorConfig(width=32, layers=1, heads=2),
        8,
        tokens=4,
        late_fusion=True,
        embed_dim=8,
    )
    ids = torch.tensor([[4, 1, 2, 3, 4, 10, 11, 12, 2, 0], [4, 1, 2, 3, 4, 13, 2, 0, 0, 0]])
    flows = saliency(items_, ids, torch.randn(2, 5, 8), lambda views: views.multimodal.square().sum())
    assert flows.shape == (2, 3) and torch.allclose(flows.sum(1), torch.ones(2)) and (flows > 0).all()
    assert all(parameter.grad is None for parameter in items_.parameters()) and items_.llm.config._attn_implementation == "sdpa"
    # by hand, from the definition, for the first layer
    items_.llm.set_attn_implementation("eager")
    kept: list[torch.Tensor] = []
    views = items_(ids, states := torch.randn(2, 5, 8), kept)
    slope = torch.autograd.grad(views.multimodal.square().sum(), kept)[0]
    flow = (kept[0] * slope).abs().sum(1)
    visual = flow[0, 11, 1:5].sum() + flow[1, 9, 1:5].sum()
    text = flow[0, 11, 8:11].sum() + flow[1, 9, 8:9].sum()
    total = flow[0, 11].sum() + flow[1, 9].sum()
    again = saliency(items_, ids, states, lambda views: views.multimodal.square().sum())[0]
    assert torch.allclose(again, torch.stack([visual, text, total - visual - text]) / total, atol=1e-5)
    short = saliency(items_, torch.where(ids == 13, 2, ids)[1:, :7], states[1:], lambda views: views.visual.square().sum())
    assert not short.any()  # a loss of the visual view alone does not reach the last token
