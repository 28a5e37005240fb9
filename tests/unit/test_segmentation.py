"""Maps from the shards to the figures: one geometry for all fields of a sample, what is wrong with a map, and a run that ends like an
uninterrupted one."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from pipeline.config import ConfigError, load, parse
from pipeline.data.errors import BadSample, DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.maps import IGNORE, Geometry, LabelMapDecoder, MapDecoder, label_priors
from pipeline.data.sources import DataConfig, Sources
from pipeline.evaluation.segmentation import confusion, scores
from pipeline.record.report import write_report
from pipeline.run import RunConfig
from pipeline.towers import unet
from tests.distill import command, refused, train
from tests.runs import Launcher, assert_same_end, kill_at, last_checkpoint
from tools.make_shards import main as make_shards
from tools.sources.base import png
from tools.sources.two_sensors import CLASSES, draw, npy

TINY = Path(__file__).parents[2] / "configs" / "pretrain" / "cromss_tiny.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes to train on and 8 to test on."""
    out = tmp_path_factory.mktemp("two_sensors")
    for split, limit in (("train", 24), ("test", 8)):
        assert make_shards(["two_sensors", str(out / split), "--split", split, "--limit", str(limit), "--workers", "1"]) == 0
    return out


def tiny(shards: Path, out: Path, *changes: str) -> RunConfig:
    """configs/pretrain/cromss_tiny.yaml, three steps a visit."""
    given = [f"out={out}", f"data.sources.0.url={shards / 'train'}", f"evaluation.data={shards / 'test'}", "data.batch=8"]
    return load(RunConfig, TINY, [*given, "data.workers=0", "evaluation.workers=0", "record.log_every=1", *changes])


def encoded(values: np.ndarray) -> bytes:
    return png(Image.fromarray(values))


def test_what_is_drawn_for_one_field_of_a_sample_is_drawn_for_all() -> None:
    config = parse(unet.Config, {"sensors": {"s1": 3}, "classes": 9, "tile": 16, "image_size": 12, "rotate": 0.7}, "test")
    label = np.random.default_rng(0).integers(0, 9, (4, 16, 16)).astype(np.uint8)
    members = {"s1": np.stack([label, label + 100, 255 - label], 1), "segmentation": label, "prior": np.repeat(label[:, None], 9, 1)}
    seen, middle = set(), {}
    for train_, seeds in ((True, range(60)), (False, (None,))):
        decoders = config.decoders(Path(), train=train_)
        for seed in seeds:
            fields = {name: decoder.collate([decoder(npy(members[name]), "npy", seed), None]) for name, decoder in decoders.items()}
            wanted = fields["segmentation"][0]
            assert wanted.shape == (12, 12) and (fields["segmentation"][1] == IGNORE).all() and not fields["s1"][1].any()
            assert torch.equal(fields["s1"][0], torch.stack([wanted, wanted + 100, 255 - wanted]))
            assert not train_ or torch.equal(fields["prior"][0], wanted.expand(9, 12, 12))
            seen.add(wanted.numpy().tobytes())
            middle = fields
    assert len(seen) > 55  # seasons, places, mirrored and turned
    assert torch.equal(middle["segmentation"][0], torch.from_numpy(label[0, 2:14, 2:14])) and "prior" not in middle
    picture = MapDecoder("s1", 3, Geometry(16, 16))(encoded(members["s1"][0].transpose(1, 2, 0)), "png", None)
    assert np.array_equal(picture, members["s1"][0])
    assert np.array_equal(LabelMapDecoder("map", 9, Geometry(16, 16))(encoded(label[0]), "png", None), label[0])


def test_a_map_that_cannot_be_used_costs_its_sample_and_a_foreign_one_stops_the_run() -> None:
    bands, labels = MapDecoder("s1", 2, Geometry(8, 8)), LabelMapDecoder("map", 3, Geometry(8, 8))
    good = np.zeros((2, 8, 8), np.uint8)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}] * 64, object))
    huge, torn = (npy(good).replace(b"(2, 8, 8)", shape) for shape in (b"(9, 9, 9)", b"(2, 8, 99"))
    broken = good.astype(np.float32)
    broken[0, 0, 0] = np.nan
    for decoder, data, cause in (
        (bands, npy(np.zeros((2, 8, 9), np.uint8)), "map_size"),
        (bands, npy(good[0]), "map_shape"),
        (bands, npy(good)[:-5], "map"),
        (bands, huge, "map"),
        (bands, torn, "map"),
        (bands, b"nothing", "map"),
        (bands, pickled.getvalue(), "map_type"),
        (bands, npy(broken), "map_not_finite"),
        (labels, npy(np.zeros((8, 7), np.uint8)), "map_size"),
        (labels, npy(np.zeros((8, 8), np.int64)), "map_type"),
    ):
        with pytest.raises(BadSample) as caught:
            decoder(data, "npy", 3)
        assert caught.value.cause == cause
    for data, cause in (
        (encoded(np.zeros((8, 8, 3), np.uint8)), "map_mode"),
        (encoded(np.zeros((9, 8), np.uint8)), "map_size"),
        (b"GIF", "map"),
    ):
        with pytest.raises(BadSample) as caught:
            labels(data, "png", None)
        assert caught.value.cause == cause
    with pytest.raises(DataError, match=r"s1: a sample has 3 bands, the tower expects 2.*`sensors`"):
        bands(npy(np.zeros((3, 8, 8), np.uint8)), "npy", None)
    with pytest.raises(DataError, match=r"map: a sample holds class 7, there are 3.*another label set"):
        labels(npy(np.full((8, 8), 7, np.uint8)), "npy", None)
    with pytest.raises(DataError, match="some samples hold bytes, others"):
        bands.collate([good, good.astype(np.float32)])
    assert (labels(npy(np.full((8, 8), IGNORE, np.uint8)), "npy", None) == IGNORE).all()


def test_the_prior_says_what_is_around_in_this_season_and_in_all() -> None:
    labels = draw(0, 0, train=True).noisy
    prior = label_priors(labels, CLASSES).astype(int)
    assert prior.shape == (4, CLASSES, 32, 32) and np.abs(prior.sum(1) - 255).max() <= CLASSES
    constant = np.full((2, 8, 8), 3, np.uint8)
    assert np.array_equal(label_priors(constant, CLASSES)[:, 3], np.full((2, 8, 8), 255))
    unlabelled = label_priors(np.full((1, 8, 8), IGNORE, np.uint8), CLASSES)
    assert not unlabelled.any()
    one, two = label_priors(np.stack([constant[0], constant[0] - 1]), CLASSES)[:, 3, 0, 0].tolist()
    assert (one, two) == (191, 64)  # its own season half, the mean of both the other half


def test_scores_are_scikit_learn_s() -> None:
    make = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (3, 9, 9), generator=make)
    label[0, :3] = IGNORE
    logits = torch.randn(3, 6, 9, 9, generator=make)  # of six classes one is never there and never named
    logits[:, 5] = -100
    found = scores(confusion(logits[:2], label[:2]) + confusion(logits[2:], label[2:]))
    known = label != IGNORE
    wanted, named = label[known].numpy(), logits.argmax(1)[known].numpy()
    assert found["miou"] == pytest.approx(jaccard_score(wanted, named, average="macro"))
    assert found["mf1"] == pytest.approx(f1_score(wanted, named, average="macro"))
    assert found["oa"] == pytest.approx(accuracy_score(wanted, named)) and found["pixels"] == len(wanted)
    assert found["iou"][5] is None and found["iou"][4] == 0
    with pytest.raises(ValueError, match="no pixel has a label"):
        scores(confusion(logits, torch.full_like(label, IGNORE)))


def test_the_sources_say_what_they_are_wrong_in(tmp_path: Path) -> None:
    scene = draw(3, 0, train=True, wrong=0.45)
    assert [round(float((season != scene.clean).mean()), 1) for season in scene.noisy] == [0.4] * 4  # a few drawn labels are right
    earth = parse(unet.Config, {"sensors": {"relief": 3, "optical": 3}, "classes": 2, "image_size": 64}, "test")
    fields = {}
    for accuracy in ("c", "f"):
        assert make_shards(["earth", str(tmp_path / accuracy), "--labels", accuracy, "--limit", "12", "--workers", "1"]) == 0
        sources = Sources.open(parse(DataConfig, {"sources": [{"url": str(tmp_path / accuracy)}], "batch": 8}, "test"))
        rows = np.arange(12)
        fields[accuracy] = Fetch(sources, earth.decoders(Path(), train=False), seed=None)[Rows(rows, rows, rows)].fields
    crude, full = (fields[accuracy]["segmentation"] for accuracy in ("c", "f"))
    assert 0.01 < (crude != full).double().mean() < 0.1
    red, _, blue = fields["f"]["optical"].double().unbind(1)
    assert (blue - red)[full == 0].mean() > 20 > (blue - red)[full == 1].mean()  # the mask lies where the picture's coast is


def test_a_run_is_trained_evaluated_and_reported_and_its_encoder_goes_on(shards: Path, tmp_path: Path) -> None:
    from pipeline.__main__ import main

    run = tmp_path / "run"
    train(tiny(shards, run, "visits=1", "evaluation.every=1"))
    assert main(["evaluate", str(run), "--quiet"]) == 0
    told = json.loads((run / "result.json").read_text(encoding="utf-8"))
    *_, last = (line["eval"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "eval" in line)
    assert [last["s1_miou"], last["s2_miou"]] == pytest.approx([told["segmentation"][name]["miou"] for name in ("s1", "s2")])
    assert last["miou"] == pytest.approx((last["s1_miou"] + last["s2_miou"]) / 2)
    assert json.loads((run / "best" / "best.json").read_text())["miou"] >= last["miou"]
    assert told["images"] == 8 and set(told["segmentation"]) == {"s1", "s2"} and told["segmentation"]["s1"]["pixels"] == 8 * 32 * 32
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Segmentation, held-out maps" in page and "8 held-out maps" in page and "zero-shot" not in page and "Mean IoU on the way" in page
    assert "<h3>Pixels whose label is predicted" in page and "<h3>How far labels are believed" in page
    single = ["towers.student.sensors={s2: 4}", "towers.student.frozen=true", "objectives.cromss.second=null", "visits=1"]
    single += ["objectives.cromss.first=s2.logits", f"init_from={{run: {run}, towers: {{student.encoders.s2: student.encoders.s2}}}}"]
    train(tiny(shards, tmp_path / "transfer", *single))
    before, after = (load_file(last_checkpoint(path) / "model.safetensors") for path in (run, tmp_path / "transfer"))
    encoder = [name for name in after if ".encoders." in name]
    assert encoder and all(torch.equal(after[name], before[name]) for name in encoder)  # batch norm's statistics too
    refused(tiny(shards, tmp_path / "y", "towers.student.encoder=resnet51"), ConfigError, "Did you mean 'resnet50'")


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(launcher: Launcher, shards: Path, tmp_path: Path) -> None:
    """The ramp's place, batch norm's statistics and the seasons drawn go on where they were."""
    changes = ("visits=6", "checkpoint.every=4", "objectives.cromss.ramp_steps=12")
    launcher.run(command(tiny(shards, tmp_path / "whole", *changes)))
    given = command(tiny(shards, tmp_path / "killed", *changes))
    for steps in (6, 11):
        kill_at(steps, tmp_path / "killed", launcher.start(given, HOLD=str(steps)))
    launcher.run(given)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    assert int(load_file(last_checkpoint(tmp_path / "killed") / "model.safetensors")["objectives.cromss.step"]) == 18
