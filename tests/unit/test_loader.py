"""The data module: the same batches for any number of workers and after any resume, and bad samples that keep their place."""

import pickle
import random
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from pipeline.config import parse
from pipeline.data.decode import ImageDecoder, Resize, TextDecoder
from pipeline.data.errors import DataError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.loader import DataModule
from pipeline.data.sources import DataConfig, Sources
from pipeline.data.text import BpeTokenizer, train_bpe
from pipeline.types import Batch
from tests.shards import by_hand
from tools.sources.base import png

STEPS = 200


class Crop:
    """An augmentation that draws from both generators that libraries use."""

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        left, top = random.randrange(9), int(torch.randint(9, ()))
        return image.crop((left, top, left + 16, top + 16))


@pytest.fixture(scope="module")
def tokens(icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(Sources.open(parse(DataConfig, {"sources": [{"url": str(icons_small)}], "batch": 8}, "here")).captions(), 512, path)
    return BpeTokenizer(path, 8)


@pytest.fixture
def module(tokens: BpeTokenizer):
    """Makes data modules over shards."""

    def make(*urls: Path, weights: tuple = (), world: tuple[int, int] = (0, 1), **settings: Any) -> DataModule:
        sources = [{"url": str(url), **({"weight": weights[i]} if weights else {})} for i, url in enumerate(urls)]
        given = {"sources": sources, "batch": 64, "lanes": 4, "groups": 2, "window": 2, "workers": 0} | settings
        config = parse(DataConfig, given, "here")
        opened = Sources.open(config)
        plan = layout(opened.shapes, config.batch, config.lanes, config.groups, config.window, 5)
        decoders = {"image": ImageDecoder(16, Resize(16), Crop()), "text": TextDecoder(tokens)}
        return DataModule(config, plan, *world, Fetch(opened, decoders, 5), STEPS, torch.device("cpu"))

    return make


def equal(one: Batch, other: Batch) -> bool:
    names = ("sample", "slot", "visit", "valid")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names) and one.bad == other.bad
    return same and one.fields.keys() == other.fields.keys() and all(torch.equal(one.fields[k], other.fields[k]) for k in one.fields)


def test_batches_do_not_depend_on_the_workers(icons_small: Path, module) -> None:
    expected = [data.next() for data in [module(icons_small)] for _ in range(9)]
    assert expected[0].fields["image"].shape == (64, 3, 16, 16) and expected[0].fields["text"].shape == (64, 8)
    assert {int(v) for batch in expected for v in batch.visit} == {0, 1, 2}
    for workers, prefetch in ((1, 1), (2, 3)):
        data = module(icons_small, workers=workers, prefetch=prefetch)
        assert all(equal(batch, data.next()) for batch in expected)


def test_augmentation_differs_between_the_visits_of_a_sample(icons_small: Path, module) -> None:
    data = module(icons_small)
    batches = [data.next() for _ in range(7)]
    looks: dict[int, set[bytes]] = {}
    for batch in batches:
        for sample, image in zip(batch.sample.tolist(), batch.fields["image"]):
            looks.setdefault(sample, set()).add(image.numpy().tobytes())
    assert len(looks) == 200 and np.mean([len(seen) for seen in looks.values()]) > 1.9


@pytest.mark.parametrize("step", [1, 4, 31])
def test_a_resume_at_any_step_continues_identically(icons_small: Path, module, step: int) -> None:
    through = module(icons_small)
    for _ in range(step):
        through.next()
    state = through.state_dict()
    assert state["step"] == step and state["offered"] == step * 64
    expected = [through.next() for _ in range(3)]
    for workers in (0, 2):
        resumed = module(icons_small, workers=workers)
        resumed.next()  # what was begun before is forgotten
        resumed.load_state_dict(state)
        assert all(equal(batch, resumed.next()) for batch in expected)
        assert resumed.state_dict() == through.state_dict()


def test_the_next_thousand_ids_after_a_resume_are_those_of_the_uninterrupted_run(icons_small: Path, module) -> None:
    plain = module(icons_small)
    ids = torch.cat([plain.next().sample for _ in range(37 + 16)])[37 * 64 :]
    assert len(ids) >= 1000
    for workers in (0, 1, 2):  # bar 5 of the issue
        resumed = module(icons_small, workers=workers)
        resumed.load_state_dict({"step": 37, "offered": 37 * 64, "bad": {}})
        assert torch.cat([resumed.next().sample for _ in range(16)]).equal(ids)


def test_two_ranks_read_the_halves_of_what_one_rank_reads(icons_small: Path, module) -> None:
    alone, ranks = module(icons_small), [module(icons_small, world=(rank, 2)) for rank in range(2)]
    for _ in range(5):
        whole, parts = alone.next(), [rank.next() for rank in ranks]
        assert torch.cat([part.sample for part in parts]).equal(whole.sample)
        assert torch.cat([part.fields["image"] for part in parts]).equal(whole.fields["image"])


def test_after_its_last_step_a_data_module_has_no_batch(icons_small: Path, module) -> None:
    data = module(icons_small)
    data.load_state_dict({"step": STEPS - 1, "offered": 0, "bad": {}})
    data.next()
    with pytest.raises(StopIteration):
        data.next()


def shade(value: int = 128) -> bytes:
    return png(PIL.Image.new("RGB", (24, 24), (value, 0, 255 - value)))


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 in 200 bytes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(10**5))), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD = {
    3: ("image", {"png": b"this is text", "txt": b"a"}),
    7: ("image", {"png": shade()[:-30], "txt": b"a"}),
    12: ("image_too_large", {"png": bomb(), "txt": b"a"}),
    20: ("text_empty", {"png": shade(), "txt": b" \n"}),
    21: ("text_too_long", {"png": shade(), "txt": b"word " * 2_000_000}),
    33: ("text_encoding", {"png": shade(), "txt": b"caf\xe9"}),
    40: ("missing_member", {"txt": b"a picture that is not there"}),
    41: ("missing_member", {"png": shade()}),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 samples, 9 of them bad: those of BAD, and sample 50, of which a bit was changed after it was indexed."""
    good = [{"png": shade(n), "txt": f"number {n}".encode()} for n in range(64)]
    folder = by_hand(tmp_path_factory.mktemp("damaged") / "shards", [BAD[n][1] if n in BAD else good[n] for n in range(64)])
    path = folder / "000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"number 50") + 7] ^= 1
    path.write_bytes(bytes(data))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_keep_their_place_and_are_counted_by_cause(damaged: Path, module, workers: int) -> None:
    data = module(damaged, batch=32, lanes=2, max_bad_fraction=0.2, workers=workers)
    lanes = RankLanes(data.lanes.layout, 0, 1)
    causes = {sample: cause for sample, (cause, _) in BAD.items()} | {50: "checksum"}
    for step in range(4):  # two visits
        batch = data.next()
        assert (batch.sample.numpy() == lanes.rows(step).sample).all()
        assert dict(batch.bad) == {s: causes[s] for s in batch.sample.tolist() if s in causes}
        for sample, valid, image, text in zip(batch.sample.tolist(), batch.valid.tolist(), batch.fields["image"], batch.fields["text"]):
            assert valid == (sample not in causes)
            assert bool(image.any()) == valid and bool(text.any()) == valid
    assert data.bad == Counter(causes.values()) + Counter(causes.values())
    assert data.state_dict()["bad"] == dict(data.bad)


def test_too_many_bad_samples_stop_the_run_and_name_the_causes(damaged: Path, module) -> None:
    data = module(damaged, batch=32, lanes=2, max_bad_fraction=0.1)
    data.next()  # half of the samples: too few to judge
    with pytest.raises(DataError) as caught:
        data.next()
    said = str(caught.value)
    assert "9 of 64 samples could not be used, more than data.max_bad_fraction 0.1" in said
    assert "image 2" in said and "missing_member 2" in said and "checksum 1" in said and "check_shards" in said
    resumed = module(damaged, batch=32, lanes=2, max_bad_fraction=0.1)
    resumed.load_state_dict({"step": 1, "offered": 32, "bad": {"image": 5}})
    with pytest.raises(DataError, match="image"):  # what was counted before a resume counts
        resumed.next()


class Trace:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pickle_in_a_shard_is_never_loaded(tmp_path: Path, module, workers: int) -> None:
    evil = pickle.dumps(Trace(tmp_path / "trace"))
    pickle.loads(evil).close()
    (tmp_path / "trace").unlink()  # it works
    extensions = ("pkl", "pickle", "pyd", "pth", "png.pkl")
    samples = [{"png": shade(n), "txt": b"word", extensions[n % 5]: evil} for n in range(30)]
    samples += [{"pickle": evil, "txt": b"word"}, {"png": evil, "txt": evil}]
    data = module(by_hand(tmp_path / "shards", samples), batch=16, lanes=1, groups=1, max_bad_fraction=1.0, workers=workers)
    valid = torch.cat([batch.sample[batch.valid] for batch in (data.next(), data.next())])
    assert sorted(valid.tolist()) == list(range(30))
    assert data.bad == {"missing_member": 1, "image": 1}
    assert not (tmp_path / "trace").exists()


def test_several_sources_are_mixed_by_weight_and_keep_their_own_samples(icons_small: Path, damaged: Path, module) -> None:
    data = module(icons_small, damaged, weights=(3.0, 1.0), lanes=8, max_bad_fraction=1.0)
    assert data.lanes.layout.mix() == [0.75, 0.25]
    seen: Counter[int] = Counter()
    for _ in range(4):
        batch = data.next()
        second = batch.sample >= 200
        assert int(second.sum()) == 16
        seen.update(batch.sample[second].tolist())
        for row in second.nonzero()[:, 0].tolist():
            number = int(batch.sample[row]) - 200
            if number not in BAD and number != 50:
                assert batch.fields["image"][row, :, 0, 0].tolist() == [number, 0, 255 - number]
    assert seen == Counter(range(200, 264))  # its whole first visit


def test_shards_that_are_not_those_of_the_index_are_refused_at_start(icons_small: Path, tmp_path: Path, module) -> None:
    for name, change in {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1024]),
        "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
        "gone": lambda path: path.unlink(),
    }.items():
        copy = shutil.copytree(icons_small, tmp_path / name)
        change(copy / "000002.tar")
        with pytest.raises(DataError, match=r"000002.tar: (has|missing).*the index expects \d+") as caught:
            module(copy)
        assert "make_shards" in str(caught.value)
    with pytest.raises(DataError, match="no such index"):
        module(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_off_while_it_is_read_stops_the_run(icons_small: Path, tmp_path: Path, module, workers: int) -> None:
    copy = shutil.copytree(icons_small, tmp_path / "copy")
    data = module(copy, workers=workers)
    for path in copy.glob("*.tar"):
        with path.open("r+b") as file:
            file.truncate(2048)
    with pytest.raises(DataError, match=r"\.tar: ends at byte \d+, the index expects a member at") as caught:
        data.next()
    assert "Traceback" not in str(caught.value)  # also from a worker it is a message for people
