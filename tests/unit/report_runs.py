"""Small run folders and shards made by hand for the tests of the report, and a parser for the page."""

import html.parser
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
import yaml

from pipeline.evaluation.selection_quality import LOG_SCHEMA, read_log, selection_quality
from pipeline.record.images import load_truth
from pipeline.record.report import write_report
from tools import make_shards

EVIL = '<script>alert("x")</script> & <img src="http://evil.example/x.png" onerror=\'go()\'> \u202edlrow {{ 7 * 7 }}'
COLOURS = [(10 * i, 255 - 10 * i, 50) for i in range(8)]


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: tags, attributes, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]


def png(colour: tuple[int, int, int], size: int = 16) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def large() -> bytes:
    """A sound PNG of 8 kB and 64.02 million pixels: just too many, and too few for Pillow to refuse."""
    buffer = io.BytesIO()
    PIL.Image.new("1", (8001, 8001)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def shards(folder: Path, samples: list[dict]) -> str:
    """Writes one tar by hand and indexes it."""
    folder.mkdir(parents=True)
    with wds.TarWriter(str(folder / "000000.tar"), encoder=False) as tar:
        for i, sample in enumerate(samples):
            tar.write({"__key__": f"{i:04d}"} | sample)
    assert make_shards.main(["tars", str(folder), "--shards", str(folder / "*.tar"), "--workers", "1"]) == 0
    return str(folder)


def log_table(scored: bool, warmup: int = 2, visits: int = 6) -> pa.Table:
    """8 samples, two of four kept after warm-up: 0 always, 1 never, 7 once, the others now and then."""
    rows = []
    for visit in range(visits):
        for sample in range(8):
            kept = visit < warmup or sample == 0 or (sample != 1 and (sample + visit) % 3 == 0) or (sample, visit) == (7, 4)
            score = 30.0 - sample + visit if scored else np.nan
            rank = np.nan if visit < warmup else float(-sample)
            rows.append((visit, visit, sample, score, rank, kept))
    return pa.Table.from_pylist([dict(zip(LOG_SCHEMA.names, row)) for row in rows], schema=LOG_SCHEMA)


def make_run(folder: Path, data: tuple[str, str], selector: str, top1: float, error: float = 0.006, trained: int = 1000) -> Path:
    train, test = data
    (folder / "selection").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    settings = {"name": selector, "rate": 0.5, "warmup_visits": 2}
    config = {"seed": 3, "data": {"sources": [{"url": train}], "batch": 8, "groups": 2}, "selector": settings, "optimizer": {"lr": 0.001}}
    (folder / "resolved.yaml").write_text(yaml.safe_dump(config))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 61):
            line = {
                "step": step,
                "visit": step / 10,
                "loss": 3.0 - step / 30,
                "candidates_per_second": 500.0 + step,
                "data_wait_share": 0.02,
            }
            file.write(json.dumps(line) + "\n")
        for step in (30, 60):
            file.write(json.dumps({"step": step, "eval": {"zero_shot_top1": top1 * step / 60}}) + "\n")
    pq.write_table(log_table(selector != "random"), folder / "selection" / "step-00000006-rank0000.parquet")
    recalls = {"r1": 0.21, "r5": 0.42, "r10": 0.63, "queries": 6, "chance": {"r1": 0.1, "r5": 0.5, "r10": 1.0}}
    images = [{"row": i, "right": i == 0, "caption": EVIL if i == 1 else "seen", "score": 20.0} for i in range(5)]
    (folder / "evaluation" / "examples.json").write_text(json.dumps({"retrieval": [{"caption": EVIL, "images": images}], "data": test}))
    result = {
        "run": folder.name,
        "step": 60,
        "config": {"selector": selector},
        "model": {"parameters": 1_834_000, "image_size": 32},
        "device": "CPU",
        "data": {"samples": 8, "lanes": 2, "noise": 0.5},
        "zero_shot": {"top1": top1, "top1_error": error, "top5": 0.31, "classes": 300, "images": 1234, "chance": 1 / 300},
        "retrieval": {"image_to_text": recalls, "text_to_image": recalls, "images": 6, "texts": 3},
        "linear_probe": {"top1": 0.4, "chance": 0.01},
        "selection": selection_quality(read_log(folder / "selection"), load_truth([train]), warmup_visits=2),
        "samples": {"offered": 2000, "scored": 2000, "trained": trained, "bad": {"text_empty": 2}},
        "seconds": {"data": 1.5, "score": 20.0, "train": 700.0, "total": 730.0},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def page_of(*runs: Path) -> Page:
    return Page(write_report(list(runs), runs[0].parent / "out" / "report.html"))
