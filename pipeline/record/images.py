"""The pictures of the report: pairs read from shards by global sample id, as small base64 PNGs."""

import base64
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa

from pipeline.data import storage
from pipeline.data.cache import ShardCache
from pipeline.data.decode import MAX_PIXELS, ImageDecoder, captions
from pipeline.data.errors import BadSample, DataError
from pipeline.data.index import Index
from pipeline.data.read import Reader

THUMB = 96  # pixels of the longer side; shown at 72 to 88 CSS pixels
TRUE_CAPTION = ("caption", "true_caption", "original")  # columns of truth.parquet that may hold the caption before the swap


class Pair(NamedTuple):
    """One sample as stored: `image` None where it could not be decoded, `caption` its first line."""

    image: PIL.Image.Image | None
    caption: str


class Card(NamedTuple):
    """One pair of a contact sheet. `noisy` None and `true_caption` "" where the truth is not known; times of `visits` after warm-up."""

    uri: str
    caption: str
    noisy: bool | None
    true_caption: str
    kept: int
    visits: int


@dataclass(frozen=True)
class Sheet:
    """A contact sheet; `of` pairs in all fit its description, `share_noisy` of them are noisy (None: not known)."""

    cards: list[Card]
    of: int
    share_noisy: float | None
    all_visits: bool  # every pair of it was refused (kept) at every visit, not merely most often


def load_pairs(url: str, rows: Sequence[int]) -> list[Pair]:
    """Reads samples of one source by their row in its index, in the order asked.

    A sample that is bad by its own bytes gives a pair without image. Remote members are read one by one and not cached: a report
    needs few. Raises DataError when there is no index, or the storage does not answer.
    """
    return _pairs(Index.open(url), rows)


def load_samples(urls: Sequence[str], samples: Sequence[int]) -> list[Pair]:
    """Reads samples by their id in the run: source i begins where source i - 1 ends. Raises DataError also for an id past the last."""
    found: dict[int, Pair] = {}
    base = 0
    for url in urls:
        index = Index.open(url)
        mine = [sample for sample in samples if base <= sample < base + index.num_samples]
        found |= dict(zip(mine, _pairs(index, [sample - base for sample in mine])))
        base += index.num_samples
    lost = [sample for sample in samples if sample not in found]
    if lost:
        raise DataError(f"samples {lost[:5]} are not in {', '.join(urls)}, which hold {base}: not the shards that the run was trained on")
    return [found[sample] for sample in samples]


def load_truth(urls: Sequence[str]) -> pa.Table | None:
    """`truth.parquet` of all sources in the run's ids: sample int64, noisy bool, true_caption string; None where no source has one.
    A source without truth leaves its samples out. Raises DataError when the storage does not answer."""
    tables, base = [], 0
    for url in urls:
        try:
            table = storage.read_parquet(storage.join(url, "truth.parquet"))
        except FileNotFoundError:
            table = None
        if table is not None:
            told = next((name for name in TRUE_CAPTION if name in table.column_names), None)
            texts = table[told].cast(pa.string()) if told else pa.nulls(table.num_rows, pa.string())
            ids = pa.array(table["sample"].to_numpy() + base, pa.int64())
            tables.append(pa.table({"sample": ids, "noisy": table["noisy"], "true_caption": texts}))
        if len(urls) > 1:
            base += Index.open(url).num_samples
    return pa.concat_tables(tables) if tables else None


def contact_sheets(
    log: pa.Table, truth: pa.Table | None, urls: Sequence[str], *, warmup_visits: int | None, count: int = 24
) -> tuple[Sheet, Sheet] | None:
    """The pairs refused most often after warm-up and those kept most often, ties by mean rank (what the selector ranked by).

    None when nothing was refused, or no visit came after warm-up (`warmup_visits` None: it is not over). Raises DataError when the shards cannot be read.
    """
    visit, sample = log["visit"].to_numpy(), log["sample"].to_numpy()
    late = visit >= (math.inf if warmup_visits is None else warmup_visits)
    kept, ranked_by = log["kept"].to_numpy()[late], log["ranked_by"].to_numpy()[late]
    if not late.any() or kept.all():
        return None
    ids, place = np.unique(sample[late], return_inverse=True)
    offered, chosen = np.bincount(place), np.bincount(place, weights=kept).astype(np.int64)
    ranked = ~np.isnan(ranked_by)
    with np.errstate(invalid="ignore", divide="ignore"):
        rank = np.bincount(place[ranked], ranked_by[ranked], len(ids)) / np.bincount(place[ranked], minlength=len(ids))
    rank = np.nan_to_num(rank, nan=0.0)
    refused_first = np.lexsort((ids, rank, chosen - offered))
    kept_first = np.lexsort((ids, -rank, -chosen / offered))
    known = _truth_of(ids, truth)
    sheets = []
    for order, extreme in ((refused_first, chosen == 0), (kept_first, chosen == offered)):
        shown = order[:count]
        pairs = load_samples(urls, ids[shown].tolist())
        cards = [
            Card(data_uri(pair.image), pair.caption, *known[ids[i]], int(chosen[i]), int(offered[i]))
            for i, pair in zip(shown.tolist(), pairs)
        ]
        of = ids[extreme] if extreme[shown].all() else ids[shown]
        flags = [known[i][0] for i in of if known[i][0] is not None]
        sheets.append(Sheet(cards, len(of), sum(flags) / len(flags) if flags else None, bool(extreme[shown].all())))
    return sheets[0], sheets[1]


def data_uri(image: PIL.Image.Image | None, size: int = THUMB) -> str:
    """A PNG of at most `size` pixels a side as a data URI, never enlarged; "" for no image."""
    if image is None:
        return ""
    small = image.copy()
    small.thumbnail((size, size), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pairs(index: Index, rows: Sequence[int]) -> list[Pair]:
    reader = Reader(index, ShardCache(None))
    try:
        return [_pair(reader, int(row)) for row in rows]
    finally:
        reader.close()


def _pair(reader: Reader, row: int) -> Pair:
    try:
        members = reader.read(row)
    except BadSample as error:
        return Pair(None, f"({error.cause})")
    try:
        caption = captions(members["txt"])[0] if "txt" in members else "(no caption)"
    except BadSample as error:
        caption = f"({error.cause})"
    extensions = ImageDecoder.extensions
    found = next((name for name in (*(f"image.{e}" for e in extensions), *extensions) if name in members), None)
    return Pair(_decode(members[found]) if found else None, caption)


def _decode(data: bytes) -> PIL.Image.Image | None:
    """RGB on white, as a page shows it; None for what is no image or unpacks to more than MAX_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                return None
            image = image.convert("RGBA")
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins raise what they like; in memory only the bytes can be the cause
        return None
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image).convert("RGB")


def _truth_of(ids: np.ndarray, truth: pa.Table | None) -> dict[int, tuple[bool | None, str]]:
    """Sample -> (noisy, true caption) of the samples asked."""
    found: dict[int, tuple[bool | None, str]] = dict.fromkeys(ids.tolist(), (None, ""))
    if truth is not None:
        mine = truth.filter(pa.array(np.isin(truth["sample"].to_numpy(), ids)))
        texts = mine["true_caption"].to_pylist() if "true_caption" in mine.column_names else [None] * mine.num_rows
        for sample, noisy, text in zip(mine["sample"].to_pylist(), mine["noisy"].to_pylist(), texts):
            found[sample] = (noisy, text or "")
    return found
