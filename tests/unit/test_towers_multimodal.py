"""Fields from named members, rows that lack one, and the towers that read them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from pipeline.config import ConfigError, Strict, component, parse
from pipeline.data.decode import Decoder
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.sources import DataConfig, Sources
from pipeline.towers.base import Tower, TowerConfig, TowerData
from pipeline.types import Batch
from tests.shards import by_hand
from tools.sources.base import png

CLASSES = ["bird", "boat"]
AUDIO = {"name": "audio", "field": "speech", "width": 8, "layers": 2, "embed_dim": 12, "audio": {"seconds": 0.5, "num_mels": 20}}
LINE = {"name": "image", "field": "line", "image_size": 16, "width": 8, "layers": 2, "embed_dim": 10}
TEXT = {"name": "text", "vocab_size": 300, "width": 16, "embed_dim": 6}
MODALITIES = {
    "speech": {"members": ["speech.fr", "speech.es"], "optional": True},
    "line": {"optional": True},
    "caption": {"members": ["txt"]},
}


class Holder(Strict):
    tower: component("pipeline.towers", TowerConfig)


def tower(**given: object) -> TowerConfig:
    return parse(Holder, {"tower": given}, "test").tower


def speech() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).normal(0, 0.1, (6000, 2)), 8000, format="OGG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 samples: 0 has everything, 1 Spanish only, 2 no speech, 3 no line art, 4 no class, 5 a broken clip, 6 an empty one, 7 neither."""
    image, line = (png(Image.new("L", (16, 16), shade)) for shade in (9, 200))
    plain = {"image.png": image, "txt": b"a bird", "line.png": line, "speech.fr.ogg": speech()}
    rows = [plain | {"json": json.dumps({"class": CLASSES[n % 2], "label": n % 2}).encode()} for n in range(8)]
    rows[1]["speech.es.ogg"] = rows[1].pop("speech.fr.ogg")
    for row, member in ((2, "speech.fr.ogg"), (3, "line.png"), (7, "line.png"), (7, "speech.fr.ogg")):
        del rows[row][member]
    rows[4]["json"] = b"{}"
    rows[5]["speech.fr.ogg"] = speech()[:100]
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0), 8000, format="WAV")
    del rows[6]["speech.fr.ogg"]
    rows[6]["speech.fr.wav"] = empty.getvalue()
    return by_hand(tmp_path_factory.mktemp("modalities") / "shards", rows)


def decoders(folder: Path, *configs: TowerConfig) -> dict[str, Decoder]:
    for config in configs:
        config.prepare(TowerData(folder, lambda: ["a bird", "a boat"] * 20))
    return {name: d for config in configs for name, d in config.decoders(folder, train=True).items()}


def fetch(shards: Path, made: dict[str, Decoder], seed: int | None = 1, **given: object) -> Fetch:
    config = {"sources": [{"url": str(shards)}], "batch": 8, "modalities": MODALITIES, "classes": CLASSES} | given
    return Fetch(Sources.open(parse(DataConfig, config, "test")), made, seed)


def rows(count: int = 8) -> Rows:
    return Rows(np.arange(count), np.arange(count), np.zeros(count, np.int64))


@pytest.fixture
def batch(shards: Path, tmp_path: Path) -> Batch:
    return fetch(shards, decoders(tmp_path, tower(**AUDIO), tower(**LINE), tower(**TEXT)))[rows()]


def test_absent_modalities_are_zeros_under_a_mask_and_broken_ones_invalid_rows(batch: Batch) -> None:
    assert batch.valid.tolist() == [True] * 5 + [False, False, True]
    assert dict(batch.bad) == {5: "audio", 6: "audio_empty"}
    fields = batch.fields
    assert fields["speech"].shape == (8, 20, 51) and fields["line"].shape == (8, 3, 16, 16)
    assert fields["speech.present"].tolist() == [True, True, False, True, True, False, False, False]
    assert fields["line.present"].tolist() == [True, True, True, False, True, False, False, False]
    assert fields["speech"].flatten(1).any(1).equal(fields["speech.present"]) and fields["speech"][0].equal(fields["speech"][0])
    assert fields["line"].flatten(1).any(1).equal(fields["line.present"]) and "caption.present" not in fields
    assert fields["label"].tolist() == [0, 1, 0, 1, -1, -1, -1, 1]


def test_a_modality_that_no_sample_has_is_an_error_at_start(shards: Path, tmp_path: Path) -> None:
    made = decoders(tmp_path, tower(**AUDIO | {"field": "effect"}))
    for modalities in ({}, {"effect": {"optional": True}}):
        with pytest.raises(
            DataError, match=r"no sample has the modality 'effect': it is read from effect.ogg.*the shards hold image.png, json"
        ) as error:
            fetch(shards, made, modalities=modalities)
        assert "data.modalities.effect.members" in str(error.value)
    masked = fetch(shards, made, seed=None, modalities={"effect": {"optional": True}})[rows()]  # evaluation may lack it
    assert not masked.fields["effect.present"].any() and masked.valid.all()
    with pytest.raises(DataError, match="no sample has the modality"):
        fetch(shards, made, seed=None, modalities={})
    with pytest.raises(DataError, match=r"no tower and no teacher reads speach; they read line"):
        fetch(shards, decoders(tmp_path, tower(**LINE)), modalities={"speach": {}})


def test_without_optional_a_missing_member_is_a_bad_sample(shards: Path, tmp_path: Path) -> None:
    found = fetch(shards, decoders(tmp_path, tower(**LINE)), modalities={})[rows()]
    assert [sample for sample, cause in found.bad if cause == "missing_member"] == [3, 7] and "line.present" not in found.fields


def test_one_field_can_be_read_from_another_member(shards: Path, tmp_path: Path) -> None:
    made = decoders(tmp_path, tower(name="image", image_size=16))
    plain, line = (fetch(shards, made, modalities=given)[rows(2)] for given in ({}, {"image": {"members": ["line.png"]}}))
    assert plain.fields["image"].unique().tolist() == [9] and line.fields["image"].unique().tolist() == [200]


@pytest.mark.parametrize(("classes", "said"), [(["bird"], "of class 'boat', not one of bird"), (1, "of class 1, there are 1")])
def test_another_label_set_is_an_error(shards: Path, tmp_path: Path, classes: object, said: str) -> None:
    found = fetch(shards, decoders(tmp_path, tower(**LINE)), modalities={"line": {"optional": True}}, classes=classes)[rows()]
    assert isinstance(found, DataError) and said in str(found) and "stats.json" in str(found)


def test_a_share_of_the_labels_is_shown_the_same_in_every_batch_and_all_of_them_in_evaluation(shards: Path, tmp_path: Path) -> None:
    made = decoders(tmp_path, tower(**LINE))
    given = {"modalities": {"line": {"optional": True}}}
    every = fetch(shards, made, seed=None, labelled=0.5, **given)[rows()].fields["label"]
    assert every.equal(fetch(shards, made, **given)[rows()].fields["label"])
    drawn = [fetch(shards, made, seed=seed, labelled=0.5, **given)[rows()].fields["label"] for seed in range(8)]
    assert all((label[label >= 0] == every[label >= 0]).all() for label in drawn)
    assert 0.25 < torch.stack(drawn)[:, every >= 0].ge(0).float().mean() < 0.75 and any(not label.equal(drawn[0]) for label in drawn)
    one = fetch(shards, made, seed=0, labelled=0.5, **given)
    later = one[Rows(np.arange(3, 6), np.arange(3), np.full(3, 7))].fields["label"]
    assert later.equal(drawn[0][3:6])


FUSION = {
    "name": "fusion",
    "inputs": {"ear": AUDIO, "eye": LINE | {"classes": 2}, "word": TEXT},
    "hidden": 16,
    "embed_dim": 14,
    "classes": 2,
}
JUDGES = {"ear": AUDIO | {"classes": 2}, "eye": LINE | {"classes": 2}}
KINDS = {
    "audio conv": AUDIO | {"classes": 2},
    "audio vit": AUDIO | {"arch": "vit", "width": 16, "patch": 8},
    "image conv": LINE | {"classes": 2},
    "image mlp": LINE | {"arch": "mlp", "channels": 1, "classes": 2},
    "image vit": LINE | {"arch": "vit", "width": 16, "patch": 5},
    "image timm": LINE | {"arch": "test_efficientnet_gn"},
    "text": TEXT | {"classes": 2},
    "concat": FUSION,
    "gate": FUSION | {"fuse": "gate"},
    "ensemble": {
        "name": "fusion",
        "fuse": "ensemble",
        "inputs": JUDGES,
        "embed_dim": sum(j["embed_dim"] for j in JUDGES.values()),
        "classes": 2,
    },
}


@pytest.fixture(params=KINDS)
def built(request: pytest.FixtureRequest, batch: Batch, tmp_path: Path) -> tuple[TowerConfig, Tower, dict[str, torch.Tensor]]:
    config = tower(**KINDS[request.param])
    decoders(tmp_path, config)
    torch.manual_seed(0)
    return config, config.build(tmp_path), batch.fields


def test_gives_what_it_says_and_trains_every_parameter(built: tuple) -> None:
    config, made, fields = built
    assert set(config.decoders(Path("/nowhere"), train=True) if config.name in ("audio", "image") else config.reads()) == set(
        config.reads()
    )
    out = made(fields)
    assert set(out) == set(config.gives())
    assert all(value.dtype == torch.float32 and value.ndim == 2 and len(value) == 8 and value.isfinite().all() for value in out.values())
    assert out["embedding"].shape[1] == config.embed_dim
    sum(value.square().sum() for value in out.values()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.ndim >= 1 and parameter.grad is not None and parameter.grad.any(), name
    made.zero_grad()
    nothing = {f"{field}.present": torch.zeros(8, dtype=torch.bool) for field in config.reads()}
    sum(value.sum() for value in made(fields | nothing).values()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in made.parameters())  # absent everywhere


def test_rows_do_not_sway_one_another(built: tuple) -> None:
    _, made, fields = built
    made.eval()
    whole, half = made(fields), made({name: value[:3] for name, value in fields.items()})
    for name, value in half.items():
        assert torch.allclose(value, whole[name][:3], atol=1e-5), name


def test_an_absent_modality_changes_nothing(built: tuple) -> None:
    config, made, fields = built
    made.eval()
    field = config.reads()[0]
    there = fields.get(f"{field}.present", torch.ones(8, dtype=torch.bool)).clone()
    there[0] = False
    other = {name: value.clone() for name, value in fields.items()} | {f"{field}.present": there}
    first = made(other)
    other[field][~there] = 1
    second = made(other)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    if config.name != "fusion":
        assert not first["embedding"][0].any()
    else:
        without = made({name: value for name, value in fields.items() if name != field})
        assert torch.allclose(without["embedding"][0], first["embedding"][0], atol=1e-6)
    assert made({}) == {}


def test_an_ensemble_is_the_mean_over_what_a_row_has(batch: Batch, tmp_path: Path) -> None:
    config = tower(**KINDS["ensemble"])
    decoders(tmp_path, config)
    out = config.build(tmp_path).eval()(batch.fields)
    there = torch.stack([batch.fields.get(f"{field}.present", torch.ones(8)).float() for field in config.reads()])
    each = torch.stack([out[f"{name}.logits"].softmax(1) for name in JUDGES])
    wanted = (each * there[:, :, None]).sum(0) / there.sum(0).clamp_min(1)[:, None]
    some = there.any(0)
    assert some.any() and torch.allclose(out["logits"][some].exp(), wanted[some], atol=1e-6) and not out["logits"][~some].any()


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inputs.a: linear gives no embedding of one field"):
        tower(name="fusion", inputs={"a": {"name": "linear"}})
    with pytest.raises(ConfigError, match="the same in inputs word"):
        tower(name="fusion", fuse="ensemble", inputs=JUDGES | {"word": TEXT}, classes=2)
    with pytest.raises(ConfigError, match="embed_dim must be"):
        tower(name="fusion", fuse="ensemble", inputs=JUDGES, embed_dim=5, classes=2)
    with pytest.raises(ConfigError, match="unknown arch 'resnet5'"):
        tower(**LINE | {"arch": "resnet5"}).build(tmp_path)
    config = tower(**FUSION)
    assert type(config).model_validate(config.model_dump()) == config
