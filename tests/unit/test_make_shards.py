"""Shards as tools.make_shards writes them: the same for any number of workers, restartable, noise that is exactly what was asked."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.cache import ShardCache
from pipeline.data.errors import DataError
from pipeline.data.index import Index
from pipeline.data.read import Reader
from tools.check_shards import check
from tools.make_shards import build, main, parser
from tools.noise import swapped
from tools.sources import icons
from tools.sources.base import png

SMALL = ["--limit", "60", "--size", "16", "--noise", "0.5", "--shard-size", "9"]


def make(*arguments: object) -> str:
    return build(parser().parse_args([str(argument) for argument in arguments]))


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that must not depend on how it was made; statistics hold seconds."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".tar", ".parquet", ".txt")}


def captions(folder: Path) -> list[str]:
    index = Index.open(folder)
    reader = Reader(index, ShardCache(None))
    return [reader.read(row, ["txt"])["txt"].decode() for row in range(index.num_samples)]


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    make("icons", tmp_path / "one", *SMALL, "--workers", 1)
    make("icons", tmp_path / "three", *SMALL, "--workers", 3)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three") and len(one) == 7 + 3
    assert {p.name for p in (tmp_path / "one").iterdir()} == one.keys() | {f"{n:06d}.stats.json" for n in range(7)}
    assert check(str(tmp_path / "one"), decode=True, cache_dir=tmp_path)[1] == []


def test_webdataset_reads_them_in_the_order_of_the_index(icons_small: Path) -> None:
    index = Index.open(icons_small)
    samples = list(wds.WebDataset(index.shards, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == index.keys(range(200))
    assert len({sample["__key__"] for sample in samples}) == 200
    assert all(sample["png"].size == (32, 32) for sample in samples)
    assert [sample["txt"] for sample in samples] == captions(icons_small)
    dark = [np.asarray(sample["png"].convert("L")).min() for sample in samples]
    assert max(dark) < 160, "an icon that draws nothing"


def test_truth_is_exact_and_nowhere_else(icons_small: Path) -> None:
    truth = pq.read_table(icons_small / "truth.parquet").to_pydict()
    assert truth["sample"] == list(range(200)) and truth["key"] == Index.open(icons_small).keys(range(200))
    assert sum(truth["noisy"]) == 80
    assert truth["noisy"] == [a != b for a, b in zip(truth["caption"], truth["given"])]
    assert truth["given"] == captions(icons_small)
    assert Counter(truth["given"]) == Counter(truth["caption"]), "noise must not change how often a caption occurs"
    for file in icons_small.glob("*.tar"):
        names = [name for name in (caption.replace(" ", "-") for caption in truth["caption"]) if "-" in name]
        assert not any(name.encode() in file.read_bytes() for name in names), "the name of a drawing is in the shard"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=12, max_size=80), st.floats(0, 1), st.integers(0, 2**40))
def test_noise_is_exact_for_any_names(kinds: list[int], rate: float, seed: int) -> None:
    names = [str(kind) for kind in kinds]
    try:
        given_ = swapped(names, rate, seed)
    except ValueError as error:
        assert "one name" in str(error)
        return
    assert sum(names[a] != names[b] for a, b in enumerate(given_)) == round(rate * len(names))
    assert sorted(given_) == list(range(len(names)))
    assert (given_ == swapped(names, rate, seed)).all()


def test_renderings_of_one_name_get_independent_wrong_captions() -> None:
    names = [f"name {row // 8}" for row in range(8000)]
    given_ = swapped(names, 0.5, seed=3)
    wrong = [{names[given_[row]] for row in range(start, start + 8) if given_[row] != row} for start in range(0, 8000, 8)]
    wrong_count = sum(int((given_[start : start + 8] != np.arange(start, start + 8)).sum()) for start in range(0, 8000, 8))
    assert sum(map(len, wrong)) > 0.98 * wrong_count
    per_name = np.array([(given_[start : start + 8] != np.arange(start, start + 8)).sum() for start in range(0, 8000, 8)])
    assert len(set(per_name.tolist())) > 4, "noise falls on samples, not on names"
    assert (swapped(names, 0.5, seed=3) != swapped(names, 0.5, seed=4)).any()
    with pytest.raises(ValueError, match="one name"):
        swapped(["a"] * 10, 0.5, 0)


def test_rerun_does_nothing_and_is_quick(tmp_path: Path) -> None:
    make("icons", tmp_path, *SMALL, "--workers", 1)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    started = time.monotonic()
    assert "nothing to do" in make("icons", tmp_path, *SMALL, "--workers", 1)
    assert time.monotonic() - started < 1
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("lost", ["000003.tar", "000003.stats.json", "index.parquet", "truth.parquet"])
def test_rerun_makes_what_is_missing_and_nothing_else(lost: str, tmp_path: Path) -> None:
    make("icons", tmp_path, *SMALL, "--workers", 1)
    whole = contents(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    (tmp_path / lost).unlink()
    made = 1 if lost.startswith("000003") else 0
    assert f"({made} made now)" in make("icons", tmp_path, *SMALL, "--workers", 1)
    assert contents(tmp_path) == whole
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert {name for name in after if after[name] != before[name]} == ({"000003.tar"} if made else set())


def test_killed_run_is_continued(tmp_path: Path) -> None:
    options = ["--limit", "240", "--size", "32", "--noise", "0.5", "--shard-size", "16"]
    process = subprocess.Popen([sys.executable, "-m", "tools.make_shards", "icons", str(tmp_path / "a"), *options, "--workers", "1"])
    while len(list((tmp_path / "a").glob("*.stats.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("*.stats.json")}
    assert 3 <= len(kept) < 15 and not (tmp_path / "a/index.parquet").exists()
    make("icons", tmp_path / "a", *options, "--workers", 1)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("*.stats.json")}.items()
    make("icons", tmp_path / "b", *options, "--workers", 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list((tmp_path / "a").glob(".*.tmp")), "left-overs of the killed run"


def test_other_options_on_the_same_folder(tmp_path: Path) -> None:
    make("icons", tmp_path, *SMALL, "--workers", 1)
    with pytest.raises(DataError, match=r"made with other options.*size: 16 there, 24 asked"):
        make("icons", tmp_path, *SMALL, "--size", 24)
    (tmp_path / "index.parquet").unlink()  # not finished: the shards say it
    with pytest.raises(DataError, match="seed: 0 there, 1 asked"):
        make("icons", tmp_path, *SMALL, "--seed", 1)


def test_statistics_say_what_was_done(icons_small: Path) -> None:
    stats = json.loads((icons_small / "000001.stats.json").read_text())
    assert stats["name"] == "000001.tar" and stats["samples"] == 50 and stats["failures"] == {}
    assert stats["bytes"] == (icons_small / "000001.tar").stat().st_size and stats["seconds"] > 0
    assert stats["sha256"] == Index.open(icons_small).shard_sha256[1] and stats["build"] == Index.open(icons_small).build
    assert "licence MIT" in (icons_small / "NOTICE.txt").read_text()


def test_icons_are_split_by_artist_and_named_without_style() -> None:
    train, test = icons.icons("train"), icons.icons("test")
    assert {icon.pack for icon in train} == {"phosphor", "mdi", "material_icons", "lucide"}
    assert {icon.pack for icon in test} == {"font_awesome", "heroicons"}
    assert len(train) == 7488 + 7447 + 6862 + 1688 and len(test) == 2060 - 495 + 1288
    names = {icon.entry: icon.name for icon in train if icon.pack != "lucide"}
    assert names["bold/bell-slash-bold.svg"] == names["regular/bell-slash.svg"] == "bell slash"
    assert names["folder-key-outline.svg"] == "folder key" and names["light/traffic-sign-light.svg"] == "traffic sign"
    assert names["two-tone/wb-sunny.svg"] == "wb sunny" and names["wall-sconce-flat-outline.svg"] == "wall sconce flat"
    counts = Counter(icon.name for icon in train)
    options = parser().parse_args(["icons", "x", "--split", "test", "--min-count", "4"])
    plan = icons.Source(options).plan(0, True, 0)
    assert len(set(plan.captions)) > 300 and all(counts[name] >= 4 for name in plan.captions)
    with pytest.raises(DataError, match=f"there are {len(plan.captions)} icons"):
        icons.Source(parser().parse_args(["icons", "x", "--split", "test", "--min-count", "4", "--limit", "99999"])).plan(0, True, 0)


def test_drawings_are_padded_not_stretched() -> None:
    wide = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20" width="40"><path d="M0 0h40v20H0z"/></svg>'
    image = np.asarray(Image.open(io.BytesIO(icons.draw(wide, 32))))
    assert image.shape == (32, 32) and (image[8:24] == 0).all() and (image[:7] == 255).all() and (image[25:] == 255).all()


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(icons.PACKS, "train", ("phosphor", "nosuchpack"))
    with pytest.raises(DataError, match=r"justmyresource-nosuchpack.*not installed.*\[demo\]"):
        icons.Source(parser().parse_args(["icons", "x"]))


def _red(value: int, side: int = 20) -> bytes:
    return png(Image.new("RGB", (side * 2, side), (value, 0, 0)))


def test_table_of_bytes_keeps_them_and_counts_bad_rows(tmp_path: Path) -> None:
    images: list[bytes | None] = [_red(row) for row in range(95)] + [b"no image", None, _red(1)[:40], _red(7), _red(8)]
    texts = [f"caption {row} é" for row in range(98)] + ["", None]
    pq.write_table(pa.table({"jpg": images, "text": texts}), tmp_path / "t.parquet", row_group_size=13)
    arguments = ["table", tmp_path / "out", "--table", tmp_path / "t.parquet", "--caption-column", "text", "--image-column", "jpg"]
    arguments += ["--shard-size", 30, "--workers", 1]
    with pytest.raises(DataError, match=r"of 100 rows could not be used, --max-bad-fraction is 0.01"):
        make(*arguments)
    said = make(*arguments, "--max-bad-fraction", 0.1, "--workers", 2)
    assert "95 samples in 4 shards" in said
    assert "empty_caption 2, no_image 1, not_an_image 2" in said
    index = Index.open(tmp_path / "out")
    reader = Reader(index, ShardCache(None))
    pairs = [reader.read(row, ("png", "txt")) for row in range(95)]
    by_caption = {pair["txt"].decode(): pair["png"] for pair in pairs}
    assert by_caption == {texts[row]: images[row] for row in range(95)}
    assert [pair["txt"].decode() for pair in pairs] != texts[:95], "not shuffled"
    with pytest.raises(DataError, match=r"no column 'x'\. Its columns: jpg, text"):
        make("table", tmp_path / "o2", "--table", tmp_path / "t.parquet", "--caption-column", "x", "--image-column", "jpg")


def test_table_of_paths_resized_with_noise(tmp_path: Path) -> None:
    for row in range(20):
        (tmp_path / f"{row}.png").write_bytes(_red(row))
    places = [f"{row}.png" if row % 2 else f"file://{tmp_path}/{row}.png" for row in range(20)] + ["nowhere.png"]
    table = pa.table({"path": places, "caption": [f"a {row}, b" for row in range(21)]})
    pa.csv.write_csv(table, tmp_path / "t.csv")
    options = [
        "--caption-column",
        "caption",
        "--image-column",
        "path",
        "--size",
        10,
        "--noise",
        0.5,
        "--max-bad-fraction",
        0.1,
        "--workers",
        1,
    ]
    said = make("table", tmp_path / "out", "--table", tmp_path / "t.csv", *options)
    assert "20 samples" in said and "missing_file 1" in said
    truth = pq.read_table(tmp_path / "out/truth.parquet").to_pydict()
    reader = Reader(Index.open(tmp_path / "out"), ShardCache(None))
    for row, caption in enumerate(truth["caption"]):
        pair = reader.read(row, ("png", "txt"))
        image = Image.open(io.BytesIO(pair["png"])).convert("RGB")
        assert image.size == (20, 10) and f"a {image.getpixel((5, 5))[0]}, b" == caption and pair["txt"].decode() == truth["given"][row]
    assert 9 <= sum(truth["noisy"]) <= 10  # 10 of the 21 rows, one of which may be the one that is left out


def test_tars_are_indexed_where_they_are(icons_small: Path, tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in icons_small.iterdir()}
    for number, pattern in enumerate((f"{icons_small}/00000{{0..3}}.tar", f"file://{icons_small}/*.tar")):
        out = tmp_path / str(number)
        assert "200 samples in 4 shards" in make("tars", out, "--shards", pattern, "--workers", 1 + number)
        assert [p.name for p in out.iterdir()] == ["index.parquet"]
        own, here = Index.open(icons_small, tmp_path / "c"), Index.open(out, tmp_path / "c")
        assert here.shards == own.shards and here.shard_sha256 == own.shard_sha256
        assert all(here.members(row) == own.members(row) for row in range(200))
        here.check_shards()
        assert check(str(out), cache_dir=tmp_path / "c")[1] == []
        assert "nothing to do" in make("tars", out, "--shards", pattern)
        with pytest.raises(DataError, match="other options"):
            make("tars", out, "--shards", f"{icons_small}/000001.tar")
    assert {p.name: p.stat().st_mtime_ns for p in icons_small.iterdir()} == before | {
        p.name: p.stat().st_mtime_ns for p in icons_small.glob(".index*")
    }


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for source in ("icons", "table", "tars"):
        with pytest.raises(SystemExit) as left:
            main([source, "--help"])
        assert left.value.code == 0 and "--workers" in capsys.readouterr().out
    assert main(["tars", str(tmp_path), "--shards", str(tmp_path / "*.tar")]) == 1
    assert "names no file" in capsys.readouterr().err
