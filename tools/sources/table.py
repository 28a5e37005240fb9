"""Pairs from a Parquet or CSV table with a caption column and an image column (bytes, paths or URLs)."""

import argparse
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.data.errors import BadSample, DataError
from tools.sources.base import Pair, Plan
from tools.sources.base import Source as Base

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}


class Source(Base):
    """One row of the table is one pair; rows that cannot be used are counted by cause."""

    shard_size = 10_000

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--table", required=True, help="path or URL of a .parquet, .csv or .tsv file")
        parser.add_argument("--caption-column", required=True)
        parser.add_argument("--image-column", required=True, help="holds encoded images, paths (from the table's folder) or URLs")
        parser.add_argument(
            "--size", type=int, help="shrink images so that the shorter side has this many pixels (default: the bytes as they are)"
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self.table, self.caption, self.image, self.size = options.table, options.caption_column, options.image_column, options.size
        if storage.is_local(self.table):  # the options of a rerun must be the same from any working directory
            self.table = os.path.abspath(storage.local_path(self.table))
        self.folder = self.table.rpartition("/")[0] or "."
        self._opened: Any = None

    def fingerprint(self) -> dict:
        size = storage.size_of(self.table)
        if size is None:
            raise DataError(f"--table {self.table}: no such file")
        return {"source": "table", "table": self.table, "bytes": size, "caption": self.caption, "image": self.image, "size": self.size}

    def plan(self, seed: int, captions: bool, window: int) -> Plan:
        groups = self._groups()
        rng = np.random.default_rng([seed, 0x6F72646572])
        # Row groups in random order, then rows within windows: reading a shard costs the row groups of its window and not the table.
        starts = np.concatenate([[0], np.cumsum(groups)])
        rows = (
            np.concatenate([np.arange(starts[g], starts[g + 1]) for g in rng.permutation(len(groups))])
            if groups
            else np.zeros(0, dtype=np.int64)
        )
        for start in range(0, len(rows), window):
            rng.shuffle(rows[start : start + window])
        if not len(rows):
            raise DataError(f"--table {self.table}: has no rows")
        if not captions:
            return Plan(rows, None)
        column = pa.concat_arrays([self._read(group, [self.caption])[self.caption].combine_chunks() for group in range(len(groups))])
        texts = column.to_pylist()
        return Plan(rows, [texts[row] or "" for row in rows])

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        starts = np.concatenate([[0], np.cumsum(self._groups())])
        group_of = np.searchsorted(starts, rows, side="right") - 1
        picked: list[Any] = [None] * len(rows)
        for group in np.unique(group_of):  # one row group in memory at a time, and the rows that are wanted
            at = np.flatnonzero(group_of == group)
            taken = self._read(int(group), [self.caption, self.image]).take(pa.array(rows[at] - starts[group]))
            for place, row in zip(at, taken.to_pylist()):
                picked[place] = row
        for row in picked:
            try:
                yield self._pair(row[self.caption], row[self.image])
            except BadSample as bad:
                yield bad

    def _pair(self, caption: Any, image: Any) -> Pair:
        if not isinstance(caption, str) or not caption.strip():
            raise BadSample("empty_caption")
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")  # the image type of the datasets library
        if not image:
            raise BadSample("no_image")
        return Pair(*self._encoded(self._load(image) if isinstance(image, str) else image), caption)

    def _load(self, place: str) -> bytes:
        url = place if "://" in place or place.startswith("/") else storage.join(self.folder, place)
        try:
            # a link of the web that does not answer is one sample's trouble, counted and capped, so ask only twice
            return storage.read_bytes(url, attempts=2)
        except FileNotFoundError:
            raise BadSample("missing_file", url) from None
        except DataError as error:
            raise BadSample("unreadable_file", str(error)) from None

    def _encoded(self, data: bytes) -> tuple[str, bytes]:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data))
                kind = image.format or ""
                if self.size is None or min(image.size) <= self.size:
                    return _EXTENSIONS.get(kind, kind.lower()), data
                scale = self.size / min(image.size)
                small = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSample("too_many_pixels") from None
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for bytes that are no image
            raise BadSample("not_an_image", str(error)) from None
        out = io.BytesIO()
        small.save(out, **({"format": "PNG"} if kind == "PNG" else {"format": "JPEG", "quality": 95}))
        return "png" if kind == "PNG" else "jpg", out.getvalue()

    def _open(self) -> Any:
        """The table: a ParquetFile, or for CSV an Arrow table in memory."""
        if self._opened is None:
            try:
                fs, path = storage.filesystem(self.table)
                if self.table.endswith(".parquet"):
                    self._opened = pq.ParquetFile(path, filesystem=fs)
                else:
                    tab = pa.csv.ParseOptions(delimiter="\t" if self.table.endswith(".tsv") else ",", newlines_in_values=True)
                    text = pa.csv.ConvertOptions(column_types={self.caption: pa.string(), self.image: pa.string()})
                    with fs.open(path, "rb") as file:
                        self._opened = pa.csv.read_csv(file, parse_options=tab, convert_options=text)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"--table {self.table}: cannot be read: {error}. Expected a .parquet, .csv or .tsv file") from None
            names = getattr(self._opened, "schema_arrow", None) or self._opened.schema
            for column in (self.caption, self.image):
                if column not in names.names:
                    raise DataError(f"--table {self.table}: has no column {column!r}. Its columns: {', '.join(names.names)}")
        return self._opened

    def _groups(self) -> list[int]:
        table = self._open()
        if isinstance(table, pa.Table):
            return [table.num_rows]
        return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        table = self._open()
        if isinstance(table, pa.Table):
            return table.select(columns)
        return storage.with_retries(lambda: table.read_row_group(group, columns=columns), self.table)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}
