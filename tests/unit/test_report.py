"""The report: self-contained, complete, escaped, right in its numbers, and still a page when half of the run is missing."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.record import plots
from pipeline.record.images import contact_sheets, load_pairs, load_samples, load_truth
from pipeline.record.report import write_report
from tests.unit.report_runs import COLOURS, EVIL, Page, bomb, large, log_table, make_run, page_of, png, shards

SECTIONS = {"run", "comparison", "curves", "pairs", "retrieval"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    """Training shards with truth (odd samples are noisy, sample 1 has an evil caption) and held-out shards."""
    root = tmp_path_factory.mktemp("data")
    captions = [f"thing {i}" for i in range(8)]
    captions[1] = EVIL
    train = shards(root / "train", [{"png": png(COLOURS[i]), "txt": captions[i].encode()} for i in range(8)])
    own = [f"own name {i}" for i in range(8)]
    truth = pa.table({"sample": pa.array(range(8), pa.int64()), "noisy": [i % 2 == 1 for i in range(8)], "caption": own})
    pq.write_table(truth, root / "train" / "truth.parquet")
    test = shards(root / "test", [{"png": png(COLOURS[i]), "txt": b"seen"} for i in range(6)])
    return train, test


@pytest.fixture
def run(tmp_path, data) -> Path:
    return make_run(tmp_path / "runs" / "first", data, "dissect", 0.095)


def test_the_page_refers_to_nothing_outside_of_itself(run, data):
    page = page_of(run, make_run(run.parent / "second", data, "random", 0.066))
    allowed = re.compile(r"(data:image/png;base64,[A-Za-z0-9+/=]+|#[\w.-]+)")
    links = [value for name in ("src", "href", "xlink:href", "srcset", "action", "poster") for value in page.values(name)]
    assert len(links) > 30 and all(allowed.fullmatch(link) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    styles = " ".join(re.findall(r"<style.*?</style>", page.source, re.DOTALL)) + " ".join(page.values("style"))
    assert "@import" not in styles and "url(" not in styles.replace("url(#", "")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "http" not in re.sub(r"http://evil\.example/x\.png", "", page.source)


def test_captions_are_data_wherever_they_appear(run):
    page = page_of(run)
    assert EVIL[:60] in page.text  # as text, in the contact sheet and the retrieval examples
    assert not [attrs for tag, attrs in page.tags if tag == "img" and "evil" in attrs.get("src", "")]
    assert "{{ 7 * 7 }}" in " ".join(page.values("title"))
    assert {tag for tag, _ in page.tags} >= {"bdi"}


def test_names_from_the_run_are_escaped_too(tmp_path, data):
    first = make_run(tmp_path / "a <b>$x_1$ & co", data, "dissect", 0.1)
    second = make_run(tmp_path / "_hidden", data, "dissect", 0.1)
    page = page_of(first, second)
    assert "a <b>$x_1$ & co" in page.text and "_hidden" in page.text  # one selector: the folders tell the runs apart
    assert "b" not in {tag for tag, _ in page.tags}
    legend = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", page.source))
    assert "_hidden" in legend and "a &lt;b&gt;$x_1$" in legend


def test_all_sections_are_there_and_say_what_was_measured(run, data):
    page = page_of(run, make_run(run.parent / "second", data, "random", 0.066))
    assert set(page.values("id")) >= SECTIONS
    for words in (
        "9.5 ± 0.6 %",
        "6.6 ± 0.6 %",
        "0.33 %",  # chance
        "31.0 %",
        "image → text R@5",
        "42.0 %",
        "40.0 %",  # probe
        "8, 50 % of them mismatched",
        "1.83 M parameters, 32 px",
        "train 12 min",
        "text_empty 2",
        "8 in 2 groups",
    ):
        assert words in page.text, words
    quality = json.loads((run / "result.json").read_text())["selection"]
    assert f"{100 * quality['precision']:.1f} %" in page.text and f"{quality['auc']:.3f}" in page.text
    figures = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(figures) == 5  # loss, precision, drift of the run that scores, throughput, accuracy on the way
    assert all(len(attrs["aria-label"]) > 30 for attrs in figures)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_the_loss_is_called_by_what_is_trained(run, data):
    second = make_run(run.parent / "second", data, "clip_score", 0.066)
    terms = {run: {"clip": {"weight": 1.0}, "soft": {"name": "logit_kd", "weight": 0.5}}, second: {"ce": {"name": "cross_entropy"}}}
    for folder, objectives in terms.items():
        told = yaml.safe_load((folder / "resolved.yaml").read_text()) | {"objectives": objectives}
        (folder / "resolved.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    page = page_of(run)
    assert "Loss: clip + 0.5 soft (logit_kd)." in page.text and "contrastive" not in page.text
    assert "dissect: clip + 0.5 soft (logit_kd). clip_score: ce (cross_entropy)." in page_of(run, second).text


def test_ids_are_unique_and_every_reference_is_met(run, data):
    page = page_of(run, make_run(run.parent / "second", data, "clip_score", 0.066))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    asked = re.findall(r'(?:href="|url\()#([\w.-]+)', page.source)
    assert asked and set(asked) <= set(ids)


@pytest.mark.parametrize(
    "theirs, error, trained, words",
    [
        (0.066, 0.006, 1000, "28 times chance. With random on as many samples it is 6.6 %."),
        (0.090, 0.006, 1000, "it is 9.0 %, no further away than the choice of test images explains."),
        (0.120, 0.002, 2000, "With random on 2 times as many samples it is 12.0 %."),
    ],
)
def test_the_headline_says_what_the_numbers_say(run, data, theirs, error, trained, words):
    page = page_of(run, make_run(run.parent / "second", data, "random", theirs, error, trained))
    assert words in page.text
    assert "Trained with dissect, the model names 9.5 % of 1 234 held-out images right, with 300 captions to choose from" in page.text


def cards(page: Page) -> list[tuple[tuple[int, ...], str]]:
    """Colour and class of each pair of the contact sheets, in order."""
    found, mark = [], ""
    for tag, attrs in page.tags:
        if tag == "li":
            mark = attrs["class"]
        elif tag == "img" and mark:
            picture = PIL.Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1])))
            found.append((picture.getpixel((3, 3)), mark))
        if attrs.get("id") == "retrieval":
            break
    return found


def test_contact_sheets_show_the_right_pairs_with_their_truth(run):
    page = page_of(run)
    shown = cards(page)
    assert shown[0] == (COLOURS[1], "card noisy")  # refused at all visits
    assert shown[8] == (COLOURS[0], "card clean")  # kept at all visits
    assert "true: own name 1" in page.text
    assert "own name 0" not in page.text  # a clean pair has its own caption already


def test_contact_sheets_order_counts_and_ids_of_a_second_source(data):
    train, test = data
    log = log_table(True)
    refused, kept = contact_sheets(log, load_truth([train]), [train], warmup_visits=2, count=3)
    times = np.bincount(log["sample"].to_numpy(), weights=log["kept"].to_numpy() & (log["visit"].to_numpy() >= 2))
    assert [card.kept for card in refused.cards] == sorted(times)[:3] and refused.cards[0].visits == 4
    assert [card.kept for card in kept.cards] == sorted(times, reverse=True)[:3]
    assert (refused.all_visits, kept.all_visits) == (False, False)
    assert contact_sheets(log, None, [train], warmup_visits=2)[0].share_noisy is None
    assert contact_sheets(log, None, [train], warmup_visits=9) is None
    # the held-out shards as first source: its 6 samples come first
    pairs = load_samples([test, train], [7, 0, 6])
    assert [pair.caption for pair in pairs] == [EVIL, "seen", "thing 0"]
    assert load_truth([test, train])["sample"].to_pylist() == list(range(6, 14))
    with pytest.raises(DataError, match=r"samples \[14\] are not in"):
        load_samples([test, train], [14])


def test_bytes_that_are_no_picture_give_a_gap(tmp_path):
    url = shards(
        tmp_path / "odd",
        [
            {"png": b"not a picture", "txt": b"text"},
            {"png": bomb(), "txt": b"bomb"},
            {"png": large(), "txt": b"large"},
            {"png": png((1, 2, 3)), "txt": b"\xff\xfe"},
            {"txt": b"words only"},
            {"png": png((4, 5, 6))},
        ],
    )
    pairs = load_pairs(url, range(6))
    assert [pair.image is None for pair in pairs] == [True, True, True, False, True, False]
    assert [pair.caption for pair in pairs] == ["text", "bomb", "large", "(text_encoding)", "words only", "(no caption)"]


@pytest.mark.parametrize(
    "gone, sentence",
    [
        (["result.json"], "the run has not been evaluated"),
        (["metrics.jsonl"], "has no metrics.jsonl, so no loss"),
        (["resolved.yaml"], "There is no resolved.yaml"),
        (["selection"], "No run given has a selection log"),
        (["selection", "result.json"], "kept no selection log"),
        (["evaluation"], "No run given has retrieval examples"),
        (["result.json", "metrics.jsonl", "selection", "evaluation"], "has no figures yet"),
        (["resolved.yaml", "metrics.jsonl", "selection", "evaluation"], "9.5 ± 0.6 %"),
    ],
)
def test_what_is_missing_becomes_a_sentence(run, gone, sentence):
    for name in gone:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    page = page_of(run)
    assert sentence in page.text
    assert set(page.values("id")) >= SECTIONS


def test_shards_that_have_moved_cost_the_pictures_only(run):
    config = yaml.safe_load((run / "resolved.yaml").read_text())
    config["data"]["sources"][0]["url"] = str(run / "nowhere")
    (run / "resolved.yaml").write_text(yaml.safe_dump(config))
    (run / "evaluation" / "examples.json").write_text(
        json.dumps({"retrieval": [{"caption": "c", "images": [{"row": 0}]}], "data": "/nowhere"})
    )
    page = page_of(run)
    assert "The pairs of dissect cannot be shown" in page.text and "retrieval examples cannot be shown" in page.text
    assert "9.5 ± 0.6 %" in page.text


def test_no_truth_no_precision(tmp_path, data, run):
    plain = shutil.copytree(data[0], tmp_path / "plain")
    (plain / "truth.parquet").unlink()
    result = json.loads((run / "result.json").read_text())
    for name, values in {"result.json": json.dumps(result | {"selection": None, "linear_probe": None})}.items():
        (run / name).write_text(values)
    (run / "resolved.yaml").write_text((run / "resolved.yaml").read_text().replace(data[0], str(plain)))
    page = page_of(run)
    assert "has no precision after warm-up: which pairs are noisy is not known" in page.text
    assert "has no linear probe" in page.text
    assert "never selected, all" in page.text and "never selected, noisy" not in page.text
    assert "mismatched" not in page.text.replace("50 % of them mismatched", "")


@pytest.mark.parametrize(
    "name, text",
    [
        ("result.json", "{broken"),
        ("resolved.yaml", "a: [1"),
        ("metrics.jsonl", '{"step": 1, "loss": NaN}\n{"ste'),
        ("evaluation/examples.json", '{"retrieval": 3}'),
        ("evaluation/examples.json", '{"retrieval": [{"caption": "\\ud800", "images": [{"row": 99999}]}], "data": "/nowhere"}'),
        ("selection/step-00000009-rank0000.parquet", "no parquet"),
    ],
)
def test_broken_files_do_not_break_the_page(run, name, text):
    (run / name).write_text(text)
    assert set(page_of(run).values("id")) >= SECTIONS


def test_a_resumed_run_shows_each_step_once(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "visit": 6.0, "loss": 0.125, "candidates_per_second": 1e6}) + "\n")
    page = page_of(run)
    assert "Last values: dissect 0.12." in " ".join(page.values("aria-label"))
    assert "Median: dissect 531" in page.text


def test_the_same_runs_give_the_same_page(run):
    first = write_report([run], run / "a.html").read_bytes()
    assert first == write_report([run], run / "b" / "b.html").read_bytes()
    assert not list(run.glob(".*.part"))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(ConfigError, match=r"is no run folder, it holds neither resolved\.yaml"):
        write_report([tmp_path], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_smoothing_and_thinning_keep_the_level():
    flat = np.full(1000, 2.5)
    np.testing.assert_allclose(plots._moving_average(flat), flat)
    x, y = plots._thin(range(10_000), np.arange(10_000.0))
    assert len(x) == plots.POINTS
    np.testing.assert_allclose(x, y)
    assert y.mean() == pytest.approx(np.arange(10_000).mean())
    holed = np.array([1.0, np.nan, 1.0, 1.0])
    assert plots._moving_average(holed)[[0, 2, 3]].tolist() == [1.0, 1.0, 1.0]


def test_curves_follow_their_points():
    """The line of the SVG is the data up to the two scales: a doubled series has every step twice as high."""

    def heights(factor: float) -> np.ndarray:
        points = [0.0, 1.0, 3.0, 2.0]
        series = [plots.Series("a", range(4), [factor * p for p in points], 0), plots.Series("b", [0, 3], [0, 6], 1)]
        svg = plots.lines("t", series, xlabel="x", ylabel="y")
        path = re.search(r'id="t-line2d_\d+">\s*<path d="([^"]*)"[^>]*stroke: #1f5fa8', svg)[1]
        return -np.array([float(pair.split()[1]) for pair in re.findall(r"[ML] ([\d. ]+)", path)])

    once, twice = heights(1), heights(2)
    np.testing.assert_allclose(twice - twice[0], 2 * (once - once[0]), atol=1e-3)
