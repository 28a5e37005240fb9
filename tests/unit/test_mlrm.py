"""The item tower of NoteLLM-2: what its two vectors may see, the gate, the places, the loss, what is frozen; and bad input."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import ConfigError, parse
from pipeline.data.errors import BadSample
from pipeline.distributed.comm import LocalComm
from pipeline.objectives.pair_nce import Config as PairNceConfig
from pipeline.objectives.pair_nce import pair_nce
from pipeline.towers._item import LateGate
from pipeline.towers._prompt import ItemText, Prompt, TokensConfig, write_tokenizer, written
from pipeline.towers.base import TowerData
from pipeline.towers.mlrm import FILE, Config, Mlrm
from pipeline.types import Batch, Selection

VISION = {"embed_dim": 16, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
VISION["text_cfg"] = {"context_length": 8, "width": 32, "heads": 2, "layers": 1, "vocab_size": 600}
LLM = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {
    "llm": LLM,
    "vision": {"model": VISION},
    "connector": {"width": 32, "layers": 2, "heads": 2},
    "tokens": {"vocab_size": 420},
    "context": 40,
}
CAPTIONS = ["arrow up", "bell slash", "cloud", "a house with a garden"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the tokenizer."""
    out = tmp_path_factory.mktemp("run")
    config().prepare(TowerData(out, lambda: iter(CAPTIONS * 20)))
    return out


def config(**given: object) -> Config:
    return parse(Config, SMALL | given, "test")


def tower(folder: Path, **given: object) -> Mlrm:
    torch.manual_seed(0)
    return config(**given).build(folder).eval()


@pytest.fixture(scope="module")
def mlrm(folder: Path) -> Mlrm:
    return tower(folder)


def fields(folder: Path, texts: list[str | None], seed: int = 0, **given: object) -> dict[str, Tensor]:
    """One item a row."""
    decoder = config(**given).decoders(folder, train=True)["text"]
    image = torch.randint(0, 256, (len(texts), 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "text": decoder.collate([None if text is None else decoder(text.encode(), "txt", None) for text in texts])}


def vectors(tower: Mlrm, given: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return tower(given)


def test_what_follows_the_image_cannot_reach_the_visual_vector(mlrm: Mlrm, folder: Path) -> None:
    one, other = fields(folder, ["arrow up", "cloud"]), fields(folder, ["bell slash", "a house with a garden"])
    here, there = vectors(mlrm, one), vectors(mlrm, other)
    assert torch.equal(here["visual"], there["visual"]) and not torch.allclose(here["item"], there["item"], atol=1e-3)
    swapped = vectors(mlrm, one | {"image": fields(folder, [None, None], seed=1)["image"]})
    for name in ("item", "visual"):
        assert ((swapped[name] - here[name]).abs().amax(1) > 1e-3).all()


def test_the_gate_stays_between_the_two_by_column() -> None:
    torch.manual_seed(0)
    gate, state, visual = LateGate(8), torch.randn(5, 8), torch.randn(5, 8)
    mixed = gate(state, visual)
    assert (mixed >= torch.minimum(state, visual) - 1e-6).all() and (mixed <= torch.maximum(state, visual) + 1e-6).all()
    share = (mixed - visual) / (state - visual)
    assert share.std(1).min() > 0.01 and share.std(0).min() > 0.01  # by column, and by what is put in
    gate.weight.weight.data.zero_()
    assert torch.allclose(gate(state, visual), (state + visual) / 2)
    # a text alone: its visual vector is 0, and what is left is the gated state and not the state
    torch.nn.init.xavier_normal_(gate.weight.weight)
    alone = gate(state, torch.zeros_like(visual))
    assert torch.allclose(alone, torch.sigmoid(state @ gate.weight.weight[:, :8].T) * state) and not torch.allclose(alone, state)


def test_the_places_for_every_length_of_padding(mlrm: Mlrm, folder: Path) -> None:
    prompt = config()._prompt(folder)
    texts = [None, "up", "arrow up", "cloud bell slash arrow", "house " * 100]
    ids = fields(folder, texts)["text"]
    fixed = len(prompt.head) + len(prompt.tail)
    lengths = [fixed + min(40, len(prompt._ids(written(title=text.strip())) if text else [])) for text in texts]
    assert sorted(set(lengths)) == lengths and lengths[-1] == ids.shape[1]  # the long text is cut, its last words are the prompt's
    assert ids[-1, -len(prompt.tail) :].tolist() == prompt.tail
    assert mlrm.items.last(ids).tolist() == [length - 1 + 15 for length in lengths]
    states = torch.randn(5, 5, 32)
    with torch.no_grad():
        expected = mlrm.items(ids, states)
        short = ids[:, : lengths[3]][:4]
        for mine, cut in zip(expected, mlrm.items(short, states[:4])):
            assert torch.allclose(mine[:4], cut, atol=1e-5)
        before, mlrm.items.places = mlrm.items.places, mlrm.items.places._replace(pad=-1)
        last = mlrm.items.last
        mlrm.items.last = lambda given: torch.tensor([length - 1 + 15 for length in lengths])
        try:
            filled = torch.where(ids == prompt.pad, torch.randint(5, 300, ids.shape), ids)
            assert all(torch.equal(one, other) for one, other in zip(expected, mlrm.items(filled, states)))
        finally:
            mlrm.items.places, mlrm.items.last = before, last


def unit(rows: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=draw, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_the_loss_knows_no_order_and_is_the_softmax_over_the_others(impl: str) -> None:
    a, b, scale, weights, comm = unit(6, 1), unit(6, 2), torch.tensor([9.0], dtype=torch.float64), torch.ones(6), LocalComm()
    loss = pair_nce(a, b, scale, weights, comm, impl)
    logits = scale * torch.cat([a, b]) @ torch.cat([a, b]).T
    logits.fill_diagonal_(-torch.inf)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(12).roll(6)).item(), rel=1e-9)
    order = torch.randperm(6)
    for one, other in ((b, a), (a[order], b[order])):
        assert pair_nce(one, other, scale, weights, comm, impl).item() == pytest.approx(loss.item(), rel=1e-9)
    assert pair_nce(a[:1], b[:1], scale, weights[:1], comm, impl).item() == pytest.approx(0, abs=1e-12)
    without = pair_nce(a, b, scale, torch.tensor([1.0, 1, 1, 0, 1, 1]), comm, impl)
    rest = torch.tensor([0, 1, 2, 4, 5])
    assert without.item() * 6 == pytest.approx(5 * pair_nce(a[rest], b[rest], scale, weights[rest], comm, impl).item(), rel=1e-9)


def views_loss(features: dict[str, Tensor], rows: int, **given: object) -> float:
    ids = torch.arange(rows)
    batch = Batch(ids, ids, ids, torch.ones(rows, dtype=torch.bool), {})
    return float(PairNceConfig(**given).build()(features, batch, Selection(ids), LocalComm()))


def test_alpha_goes_from_one_view_to_the_other() -> None:
    names = ("item", "related", "visual", "related_visual")
    features = {name: unit(6, seed) for seed, name in enumerate(names)} | {"scale": torch.tensor([20.0])}
    both, multimodal, visual = (views_loss(features, 6, alpha=alpha) for alpha in (9.0, None, 0.0))
    assert both == pytest.approx((9 * multimodal + visual) / 10) and multimodal != pytest.approx(visual, rel=1e-3)
    assert views_loss(features, 6, alpha=1e9) == pytest.approx(multimodal, rel=1e-6)
    none = {name: value * (torch.arange(6) != 2)[:, None] if value.ndim == 2 else value for name, value in features.items()}
    kept = {name: value[torch.arange(6) != 2] if value.ndim == 2 else value for name, value in features.items()}
    assert views_loss(none, 6, alpha=9.0) * 6 == pytest.approx(views_loss(kept, 5, alpha=9.0) * 5)


def test_without_its_two_ideas_it_is_the_basic_method(folder: Path) -> None:
    basic = {"prompt": "basic", "late_fusion": False}
    plain = tower(folder, **basic)
    given = fields(folder, ["arrow up", "cloud"], **basic)
    assert set(config(**basic).gives()) == set(vectors(plain, given)) | {"related"} == {"item", "related", "scale"}
    ids, states, *_ = plain.inputs("item", given)
    with torch.no_grad():  # by hand: embed, put the image in, run, read the last state, map
        items = plain.items
        embedded = items.llm.get_input_embeddings()(ids)
        at = config(**basic)._prompt(folder).image_at
        embedded = torch.cat([embedded[:, :at], items.connector(states), embedded[:, at + 1 :]], 1)
        length = (ids != plain.items.places.pad).sum(1) + 15
        hidden = items.llm(inputs_embeds=embedded).last_hidden_state[torch.arange(2), length - 1]
        expected = torch.nn.functional.normalize(items.head(hidden))
    assert torch.allclose(vectors(plain, given)["item"], expected, atol=1e-6)
    late = tower(folder, prompt="basic", visual_tokens=0)
    given = fields(folder, ["arrow up", "cloud"], prompt="basic", visual_tokens=0)
    assert late.items.connector is None and late.items.places.image_at is None
    assert not torch.equal(vectors(late, given)["item"], vectors(late, given | {"image": given["image"].flip(0)})["item"])


def test_only_the_image_tower_is_frozen(folder: Path) -> None:
    model = tower(folder).train()
    assert not model.vision.training and model.items.training
    pair = fields(folder, ["arrow up", "cloud"])
    pair |= {f"related_{name}": value.flip(0) for name, value in pair.items()}
    out = model(pair)
    torch.stack([value.square().mean() * seed + (value**3).sum() for seed, value in enumerate(out.values())]).sum().backward()
    parts = {name.split(".")[1] if name.startswith("items") else name for name, p in model.named_parameters() if p.requires_grad}
    assert parts == {"llm", "connector", "visual", "gate", "head", "logit_scale"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("vision.")) and parameter.ndim >= 1, name


def test_recomputing_the_blocks_changes_no_gradient(folder: Path) -> None:
    found = []
    for recomputes in (False, True):
        model = tower(folder, gradient_checkpointing=recomputes).train()
        model(fields(folder, ["arrow up", "cloud"]))["item"][:, 0].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 20 and found[0].keys() == found[1].keys()
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


def test_items_without_image_or_text_are_read_as_what_they_have(mlrm: Mlrm, folder: Path) -> None:
    both = fields(folder, ["arrow up", None, "cloud", None])
    present = {"image.present": torch.tensor([True, True, False, False]), "text.present": torch.tensor([True, False, True, False])}
    found = vectors(mlrm, both | present)
    alone = vectors(mlrm, {"image": both["image"]})
    texts = vectors(mlrm, {"text": both["text"]})
    assert torch.allclose(found["item"][1], alone["item"][1], atol=1e-6) and torch.allclose(found["item"][2], texts["item"][2], atol=1e-6)
    assert not found["item"][3].any() and not found["visual"][2:].any() and not texts["visual"].any()
    assert found["item"][:3].norm(dim=1).allclose(torch.ones(3)) and found["visual"][:2].norm(dim=1).allclose(torch.ones(2))


def test_what_a_text_holds_is_no_token_of_the_prompt_and_notes_are_cut(folder: Path) -> None:
    prompt = config()._prompt(folder)
    ids = fields(folder, ["<IMG> <IMG_EMB> <pad>"])["text"][0]
    assert [(ids == token).sum().item() for token in (prompt.image, prompt.answer)] == [1, 1]
    decoder = ItemText(prompt)
    note = {"title": "t" * 30, "topic": [str(n) for n in range(12)], "content": "c" * 100}
    said = json.loads(f"{{{decoder(json.dumps(note).encode(), 'json', None)}}}")
    assert said == {"title": "t" * 20, "topic": ", ".join(map(str, range(10))), "content": "c" * 80}
    for data in (b"[1]", b"{}", b"no json", b'{"topic": 3}'):
        with pytest.raises(BadSample):
            decoder(data, "json", None)


def test_a_tokenizer_without_the_tokens_is_refused_or_extended_at_the_mean(folder: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    plain = TokensConfig(vocab_size=420)
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        write_tokenizer(plain, str(llm), CAPTIONS.copy, tmp_path / FILE)
    saved = tower(folder, llm=LLM).items.llm
    llm.mkdir()
    saved.config.to_json_file(llm / "config.json", use_diff=False)
    save_file(saved.state_dict(), llm / "model.safetensors", {"format": "pt"})
    rows = json.loads((llm / "config.json").read_text())["vocab_size"]
    known = json.loads((folder / FILE).read_text())
    lacking = [token for token in known["added_tokens"] if token["content"] not in ("<IMG>", "<IMG_EMB>")]
    (llm / "tokenizer.json").write_text(json.dumps(known | {"added_tokens": lacking}))
    given = {"pretrained": str(llm), "tokens": {"vocab_size": 420}}
    with pytest.raises(ConfigError, match="has no token '<IMG>' and no '<IMG_EMB>'.*tokens.add: true"):
        config(**given).prepare(TowerData(tmp_path, CAPTIONS.copy))
    given["tokens"] |= {"add": True, "image": "<picture>", "pad": "<another>"}
    config(**given).prepare(TowerData(tmp_path, CAPTIONS.copy))
    model = tower(tmp_path, **given)
    weight = model.items.llm.get_input_embeddings().weight
    assert len(weight) > rows and torch.allclose(weight[-1], weight[:rows].mean(0))
    with pytest.raises(ConfigError, match="no token '<none>' \\(tokens.answer\\)"):
        Prompt(folder / FILE, TokensConfig(answer="<none>"), "micl", True, 8)
    with pytest.raises(ConfigError, match="part of the prompt itself"):
        Prompt(folder / FILE, TokensConfig(pad="<IMG>"), "micl", True, 8)
    with pytest.raises(ConfigError, match="holds no config.json"):
        tower(folder, pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="llm.hidden_size 64: the model in .* has 32"):
        tower(tmp_path, **given, llm=LLM | {"hidden_size": 64})
    (llm / "model.safetensors").rename(llm / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded from safetensors"):
        tower(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"llm": {"hidden_size": 8}}, "needs model_type"),
        ({"llm": LLM | {"hiden_size": 8}}, "unknown setting 'hiden_size'. Did you mean 'hidden_size'"),
        ({"llm": {"model_type": "lama"}}, "transformers builds no model"),
        ({"llm": {"model_type": "t5", "d_model": 16, "d_ff": 16, "num_layers": 1}}, "expected a causal language model"),
        ({"llm": LLM | {"model_type": "bert"}}, "in bert a token sees those after it"),
        ({"visual_tokens": 0}, "needs prompt: basic"),
        ({"connector": {"width": 32, "heads": 3}}, "no multiple of connector.heads"),
        ({"vision": {"model": VISION | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}}}, "no ViT"),
    ],
)
def test_what_cannot_be_built_says_why(folder: Path, given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tower(folder, **given)


def test_no_two_cases_of_the_prompt_share_their_settings(folder: Path) -> None:
    """Two towers that read one field agree on its prompt, or it is an error."""
    prompts = [Prompt(folder / FILE, TokensConfig(), kind, image, 8) for kind, image in (("micl", True), ("basic", True), ("basic", False))]
    assert all(one.settings() != other.settings() for one, other in itertools.combinations(prompts, 2))
