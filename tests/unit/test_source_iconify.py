"""The source iconify on a package of a few drawings: what is left out and why, names without styles, no author on both sides."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.cache import ShardCache
from pipeline.data.errors import DataError
from pipeline.data.index import Index
from pipeline.data.read import Reader
from tools.make_shards import build, parser
from tools.sources import iconify

AUTHORS = {split: [a for a in (f"Author {n}" for n in range(60)) if split in iconify.splits_of(a)] for split in ("fit", "choose", "test")}
WORDS = ("bell", "star", "moon", "fish", "tree", "lamp")


class Package:
    """A folder as npm's package has it, of which every drawing differs in a line at its top."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.about, self.drawn = folder, {}, 0
        (folder / "json").mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": "1.2.3"}))

    def body(self) -> str:
        self.drawn += 1
        return f'<path fill="currentColor" d="M6 6h12v12H6zM1 1h{self.drawn / 50}v1H1z"/>'

    def add(self, prefix: str, author: str, names: tuple[str, ...] = WORDS, spdx: str = "MIT", more: Any = (), **about: Any) -> None:
        licence = {"title": spdx, "spdx": spdx, "url": f"https://licence.example/{prefix}"}
        self.about[prefix] = {"name": prefix.title(), "author": {"name": author}, "license": licence, "total": len(names), **about}
        icons = {name: {"body": self.body()} for name in names}
        one = {"prefix": prefix, "icons": icons, "width": 24, "height": 24, **dict(more)}
        (self.folder / "json" / f"{prefix}.json").write_text(json.dumps(one))
        (self.folder / "collections.json").write_text(json.dumps(self.about))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """Six sets that may be used, two of them of one author, and six that may not."""
    one = Package(tmp_path / "package")
    one.add("fa", AUTHORS["fit"][0])
    one.add("fb", AUTHORS["fit"][1], (*(f"sharp-{word}-two-tone" for word in WORDS), "sharp-sharp"), "Apache-2.0",
            {"prefixes": {"sharp": "Sharp"}, "suffixes": {"": "Plain", "tone": "Tone", "two-tone": "Two Tone"}})  # fmt: skip
    one.add("ca", AUTHORS["choose"][0], (*WORDS, "star-outline", "paint-fill"), "CC-BY-4.0")
    one.add("cb", AUTHORS["choose"][0], ("bell", "star", "only-here"), "ISC", {"categories": {"Brands": ["star"]}})
    one.add("ta", AUTHORS["test"][0], (*WORDS, "unseen"), "CC0-1.0")
    one.add("tb", AUTHORS["test"][1])
    one.add("gpl", AUTHORS["fit"][0], spdx="GPL-3.0")
    one.add("sa", AUTHORS["fit"][0], spdx="CC-BY-SA-4.0")
    one.add("nc", AUTHORS["test"][0], spdx="CC-BY-NC-4.0")
    one.add("faces", AUTHORS["fit"][0], category="Emoji")
    one.add("brand", AUTHORS["fit"][0], category="Logos")
    one.add("lands", AUTHORS["fit"][0], category="Flags / Maps")
    one.add("paint", AUTHORS["fit"][0], palette=True)
    one.add("old", AUTHORS["fit"][0], hidden=True)
    return one


def make(package: Path, out: Path, *arguments: object) -> str:
    given = ("iconify", out, "--package", package, "--workers", 1, "--min-count", 2, *arguments)
    return build(parser().parse_args([str(argument) for argument in given]))


def samples(folder: Path) -> list[tuple[str, np.ndarray]]:
    index = Index.open(folder)
    reader = Reader(index, ShardCache(None))
    pairs = [reader.read(row) for row in range(index.num_samples)]
    return [(pair["txt"].decode(), np.asarray(Image.open(io.BytesIO(pair["png"])))) for pair in pairs]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".tar", ".parquet", ".txt")}


def test_names_without_styles_drawn_black_on_white_by_sets_that_may_be_used(package: Package, tmp_path: Path) -> None:
    said = make(package.folder, tmp_path / "train", "--size", 24)
    assert "6 names of 4 sets" in said and "logos_and_such 1" in said
    found = samples(tmp_path / "train")
    # sets, not drawings, are counted: paint fill, only here and sharp are of one set each
    assert Counter(name for name, _ in found) == {word: 3 + (word == "bell") + (word == "star") for word in WORDS}
    for _, image in found:
        assert image.shape == (24, 24) and (image[7:17, 7:17] == 0).all() and (image[20:] == 255).all()
    notice = (tmp_path / "train" / "NOTICE.txt").read_text()
    assert all(text in notice for text in (f"Fb (fb) by {AUTHORS['fit'][1]}", "licence Apache-2.0 https://licence.example/fb", "CC-BY-4.0"))
    assert not any(f"({prefix})" in notice for prefix in ("ta", "tb", "gpl", "sa", "nc", "faces", "brand", "lands", "paint", "old"))


def test_an_author_is_on_one_side_and_a_copied_drawing_is_not_held_out(package: Package, tmp_path: Path) -> None:
    splits = {split: iconify.packs(str(package.folder), split) for split in ("train", "test", "fit", "choose")}
    assert splits == {"train": ("ca", "cb", "fa", "fb"), "test": ("ta", "tb"), "fit": ("fa", "fb"), "choose": ("ca", "cb")}
    path = package.folder / "json" / "tb.json"
    copied = json.loads(path.read_text())
    copied["icons"]["moon"] = json.loads((package.folder / "json" / "fa.json").read_text())["icons"]["tree"]
    copied["icons"]["fish"]["hidden"] = True
    copied["icons"]["tree"]["body"] += '<animate attributeName="d"/>'
    path.write_text(json.dumps(copied))
    said = make(package.folder, tmp_path / "test", "--split", "test", "--shared")
    assert "animated 1, drawn_in_train_too 1, old_drawings 1" in said
    assert sorted(name for name, _ in samples(tmp_path / "test")) == sorted([*WORDS, "bell", "lamp", "star"])


def test_the_tarball_gives_the_same_shards_as_the_folder_with_noise_and_a_limit(package: Package, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "iconify-json.tgz", "w:gz") as archive:
        archive.add(package.folder, "package")
    for name, given in (("a", package.folder), ("b", tmp_path / "iconify-json.tgz")):
        make(given, tmp_path / name, "--noise", 0.5, "--limit", 16, "--seed", 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    truth = pq.read_table(tmp_path / "a" / "truth.parquet").to_pydict()
    assert sum(truth["noisy"]) == 8 and truth["given"] == [name for name, _ in samples(tmp_path / "a")]
    assert "nothing to do" in make(package.folder, tmp_path / "a", "--noise", 0.5, "--limit", 16, "--seed", 3)
    with pytest.raises(DataError, match=r"--limit 99: there are 20 icons"):
        make(package.folder, tmp_path / "c", "--limit", 99)


def test_what_is_no_package_is_named_and_so_is_npm(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package.folder / "json" / "fa.json").unlink()
    with pytest.raises(DataError, match=r"has no json/fa\.json, which its collections\.json names"):
        make(package.folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8b no tarball")
    for wrong in ("empty", "cut.tgz", "nowhere"):
        with pytest.raises(DataError, match=rf"--package \S*{wrong}.*@iconify/json, as a \.tgz or the folder"):
            make(tmp_path / wrong, tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"npm: there is no such program here.*npm pack @iconify/json@.*--package"):
        build(parser().parse_args(["iconify", str(tmp_path / "out")]))
    assert list((tmp_path / "cache" / "dissect-pipeline").iterdir()) == []
