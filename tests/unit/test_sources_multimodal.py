"""The sets with several modalities: what a sample holds, that its renderings are of one drawing, and that splits share no drawing."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from pipeline.data.errors import DataError
from tests.shards import make, samples
from tools.sources import digits, icon_weights, openmoji, tuxpaint

BIRDS = ("owl", "hen", "duck", "stork", "crow", "robin", "dove", "heron", "lark", "swan", "kiwi", "gull")
SAMPLES = list[dict[str, bytes]]


def grey(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), np.float64)


def test_openmoji_layers_make_up_the_drawing(tmp_path: Path) -> None:
    said = make("openmoji", tmp_path, "--limit", 40, "--size", 48)
    assert "40 samples" in said and "licence CC BY-SA 4.0" in said and "no_group 25" in said
    found, dark = samples(tmp_path), []
    for one in found:
        assert set(one) == {"image.png", "line.png", "regions.png", "txt", "json"}
        image, line, regions = (grey(one[f"{name}.png"]) for name in ("image", "line", "regions"))
        assert image.shape == line.shape == regions.shape == (48, 48)
        # aligned: where there is no line the image shows the regions, and what is black in the lines is dark in the image
        assert np.abs(image - regions)[line > 250].mean() < 1
        dark.append(image[line < 10].max(initial=0) < 100)
    assert sum(dark) >= 35  # a few have a layer in front of their lines
    labels = [json.loads(one["json"]) for one in found]
    assert all(openmoji.GROUPS[label["label"]] == label["class"] for label in labels) and len({label["label"] for label in labels}) > 4
    stats = json.loads((tmp_path / "000000.stats.json").read_text())
    assert stats["options"]["licence"] == "CC BY-SA 4.0" and stats["options"]["classes"] == list(openmoji.GROUPS)
    assert "CC BY-SA" in (tmp_path / "NOTICE.txt").read_text()
    before = (tmp_path / "000000.tar").read_bytes()
    (tmp_path / "000000.tar").unlink()
    make("openmoji", tmp_path, "--limit", 40, "--size", 48)
    assert (tmp_path / "000000.tar").read_bytes() == before


def test_openmoji_splits_share_no_motif() -> None:
    train, test = (openmoji.drawings()[split] for split in ("train", "test"))
    assert (len(train), len(test)) == (1515, 383)
    where = {one.name: split for split, some in (("train", train), ("test", test)) for one in some}
    assert where["man running"] == where["woman running"] == where["person running"] == where["woman running facing right"]
    assert {one.group for one in test} == set(range(9))


def test_icon_weights_are_of_one_drawing_and_split_by_name(tmp_path: Path) -> None:
    assert "licence MIT; thin, regular, fill, duotone of 1248 names" in make("icon_weights", tmp_path, "--limit", 30, "--split", "test")
    for one in samples(tmp_path):
        assert set(one) == {"thin.png", "regular.png", "fill.png", "duotone.png", "txt", "json"}
        first, label = one["txt"].decode().split()[0], json.loads(one["json"])
        assert label == ({"label": icon_weights.FAMILIES.index(first), "class": first} if first in icon_weights.FAMILIES else {})
        thin, regular, duotone = (grey(one[f"{weight}.png"]) for weight in ("thin", "regular", "duotone"))
        assert thin.shape == (64, 64) and thin.mean() > regular.mean() >= duotone.mean() - 1
        assert (duotone - regular > 60).mean() < 0.1  # duotone is regular and a tint below it
    families = Counter(name.split()[0] for found in icon_weights.drawings("phosphor", ("thin", "fill")).values() for name, _ in found)
    assert sorted(name for name, count in families.items() if count >= 12) == list(icon_weights.FAMILIES)
    for pack, count in (("phosphor", 1248), ("material_icons", 1293)):
        found = icon_weights.drawings(pack, tuple(icon_weights.DEFAULT[pack].split(",")))
        assert sum(map(len, found.values())) == count
        assert not {name for name, _ in found["train"]} & {name for name, _ in found["test"]}
    with pytest.raises(DataError, match="expected two or more different ones of thin, light"):
        make("icon_weights", tmp_path / "x", "--weights", "thin,thick")


def test_digits_are_paired_by_the_seed(tmp_path: Path) -> None:
    for seed, split in ((3, "train"), (3, "test"), (4, "train")):
        make("digits", tmp_path / f"{seed}{split}", "--seed", seed, "--split", split)
    train, test, other = (samples(tmp_path / name) for name in ("3train", "3test", "4train"))
    assert len(train) == 300 and len(test) == 1497
    assert {json.loads(one["json"])["class"] for one in train} == set(digits.NAMES)
    clean = [{one["clean.png"] for one in some} for some in (train, test, other)]
    assert len(clean[0] & clean[1]) < 3 and len(clean[0] & clean[2]) < 150  # a few digits are there twice
    for one in train:
        canvas, small = ((grey(one[f"{name}.png"]) - digits.ZERO) / digits.SCALE for name in ("image", "clean"))
        assert canvas.shape == (12, 12) and small.shape == (8, 8)
        rest = [np.square(canvas[y : y + 8, x : x + 8] - small).mean() for y in range(5) for x in range(5)]
        assert 0.005 < min(rest) < 0.016  # at one place what is left is noise of variance 0.01, a little cut at the edges


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """A folder as Tux Paint has it: the real one is 161 MB."""
    folder = tmp_path / "stamps"
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(800), 8000, format="OGG")
    for number in range(12):
        place = folder / ("animals/birds" if number % 2 else "medical")
        place.mkdir(parents=True, exist_ok=True)
        name = BIRDS[number]
        Image.new("RGBA", (20, 10), (0, 0, 255, 255)).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"Bird {number}.\nfr.utf8=Oiseau {number}.\nde.utf8=Vogel.\n")
        (place / f"{name}_desc_fr.ogg").write_bytes(sound.getvalue())
        if number < 5:
            (place / f"{name}.ogg").write_bytes(sound.getvalue())
            (place / f"{name}_desc.ogg").write_bytes(sound.getvalue())
    Image.new("RGB", (9, 9)).save(folder / "medical/owl_mirror.png")
    (folder / "symbols/alphabets").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "symbols/alphabets/A.png")
    svg = '<svg width="210mm" height="105mm" xmlns="http://www.w3.org/2000/svg"><path d="M0 0h900v900H0z" fill="red"/></svg>'
    (folder / "medical/pill.svg").write_text(svg)
    (folder / "medical/pill.txt").write_text("A pill.\n")
    return folder


def test_tuxpaint_has_what_a_stamp_has(tmp_path: Path, stamps: Path) -> None:
    found: SAMPLES = []
    for split in ("train", "test"):
        said = make("tuxpaint", tmp_path / split, "--stamps", stamps, "--languages", "fr,en", "--split", split, "--size", 32)
        assert "licence GPL-2" in said and "alphabets 1, mirrored 1" in said
        found += samples(tmp_path / split)
    assert len(found) == 13
    count = {member: sum(member in one for one in found) for member in sorted({member for one in found for member in one})}
    assert count == {
        "caption.fr.txt": 12,
        "effect.ogg": 5,
        "image.png": 13,
        "json": 13,
        "speech.en.ogg": 5,
        "speech.fr.ogg": 12,
        "txt": 13,
    }
    for one in found:
        label, image = json.loads(one["json"]), np.asarray(Image.open(io.BytesIO(one["image.png"])))
        assert image.shape == (32, 32, 3) and (image[1] == 255).all() and (image[16, 16] != 255).any()
        assert label == ({"label": 0, "class": "animals", "folder": "animals/birds"} if "class" in label else {"folder": "medical"})
        assert one["txt"].decode() == "A pill." or one["caption.fr.txt"].decode().removeprefix("Oiseau") in one["txt"].decode()


def test_synthetic_speech_says_so_or_names_the_package_that_it_needs(tmp_path: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("tuxpaint", tmp_path / "out", "--stamps", stamps, "--languages", "fr", "--size", 16, "--synthetic")
    if shutil.which("espeak-ng"):
        said = make(*given, "en")
        found = samples(tmp_path / "out")
        assert "synthetic speech by eSpeak NG" in said and all("speech.fr.ogg" in one for one in found if one["txt"] != b"A pill.")
        heard = [soundfile.info(io.BytesIO(one["synthetic.en.wav"])) for one in found]
        assert len(heard) > 5 and all(0.3 < one.duration < 5 for one in heard)
        assert "no recordings" in (tmp_path / "out" / "NOTICE.txt").read_text()
        with pytest.raises(DataError, match="espeak-ng -v nowhere: .*--voices"):
            make("tuxpaint", tmp_path / "other", *given[2:], "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no such program here.*apt-get install espeak-ng"):
        make("tuxpaint", tmp_path / "none", *given[2:], "en")


def test_tuxpaint_variants_are_in_one_split_and_a_wrong_folder_is_named(tmp_path: Path, stamps: Path) -> None:
    for variant in range(2, 9):
        (stamps / f"medical/owl{variant}.png").write_bytes((stamps / "medical/owl.png").read_bytes())
        (stamps / f"medical/owl{variant}.txt").write_text("Another.")
    by_split = tuxpaint.stamps(str(stamps), ())[0]
    assert sorted(sum("owl" in one.path for one in some) for some in by_split.values()) == [0, 8]
    with pytest.raises(DataError, match="no such folder; expected one with animals/"):
        make("tuxpaint", tmp_path / "x", "--stamps", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no stamps there"):
        make("tuxpaint", tmp_path / "x", "--stamps", tmp_path / "empty")


SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" width="30" height="30">'
    '<metadata><dc:title>{title}</dc:title></metadata><rect width="{width}" height="5"/></svg>'
)


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Drawings as Open Clip Art has them: right titles, copied ones, none, links and stars."""
    folder = tmp_path / "svg"
    titles = {f"animals/{bird}_{n}": f"Big {bird.title()}s" if n else "Part of a Collection" for bird in BIRDS for n in (0, 1)}
    for path, title in (titles | {"shapes/stars/star1": "star", "food/pie": "", "food/12": "Twelve"}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{path}.svg").write_text(SVG.format(title=title, width=len(list(folder.rglob("*.svg"))) + 1))
    (folder / "food" / "cake.svg").symlink_to("pie.svg")
    return folder


def test_openclipart_knows_by_the_file_names_which_titles_are_copied(tmp_path: Path, drawings: Path) -> None:
    given = ("--svg", drawings, "--size", 16)
    said = make("openclipart", tmp_path / "train", *given)
    assert "public domain" in said and "links 1, no_title 1, procedural_stars 1" in said and "unclear 1" in said
    captions = [one["txt"].decode() for one in samples(tmp_path / "train")]
    truth = pq.read_table(tmp_path / "train" / "truth.parquet").to_pylist()
    assert len(truth) == len(captions) - 1  # of 12.svg nobody knows
    for row in truth:
        assert captions[row["sample"]] == row["given"] and row["noisy"] == (row["given"] == "Part of a Collection")
        assert row["caption"].split()[0] in BIRDS
    make("openclipart", tmp_path / "test", *given, "--split", "test", "--captions", "name")
    names = {one["txt"].decode().split()[0] for one in samples(tmp_path / "test")}
    assert names and not names & {row["caption"].split()[0] for row in truth} and not (tmp_path / "test" / "truth.parquet").exists()
    twins = shutil.copytree(drawings, tmp_path / "twins", symlinks=True)
    known = next(path for path in sorted(twins.rglob("*.svg")) if path.stem.split("_")[0] in {one.split()[0] for one in names})
    bird = next(row["caption"].split()[0] for row in truth)
    (twins / "animals" / f"{bird}_2.svg").write_text(known.read_text().replace("Part of a Collection", "A Twin"))  # in train too
    said = make("openclipart", tmp_path / "apart", "--svg", twins, "--size", 16, "--split", "test", "--captions", "name")
    assert "drawings of train under another name 1" in said and len(samples(tmp_path / "apart")) == len(samples(tmp_path / "test")) - 1
    make("openclipart", tmp_path / "unique", *given, "--unique")
    unique = [one["txt"].decode() for one in samples(tmp_path / "unique")]
    assert sorted(unique) == sorted(set(captions))
    (tmp_path / "train" / "truth.parquet").unlink()
    make("openclipart", tmp_path / "train", *given)
    assert len(pq.read_table(tmp_path / "train" / "truth.parquet")) == len(truth)
    with pytest.raises(DataError, match="noise of their own"):
        make("openclipart", tmp_path / "x", *given, "--noise", 0.2)
