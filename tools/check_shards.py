"""Looks for everything that can be wrong with a data set: python -m tools.check_shards URL [--decode]. Exit status 1 if anything is."""

import argparse
import hashlib
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from pipeline.data import storage
from pipeline.data.errors import DataError
from pipeline.data.index import Index
from pipeline.data.index_format import REBUILD
from tools.scan import Problem, Scan, scan_tar

IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
MAX_CAPTION = 1 << 20  # bytes; longer ones are a mistake of the source, and every worker would tokenize them
_RESTORE = "Restore the shard from its source or write it again"


def check(url: str, decode: bool = False, workers: int = 2, cache_dir: str | None = None) -> tuple[Index, list[Problem]]:
    """The index and every problem found. Memory: one shard per worker and 8 bytes per sample. Raises DataError where there is no
    usable index at all."""
    index = Index.open(url, cache_dir)
    problems: list[Problem] = []
    hashes: list[np.ndarray] = []
    with ThreadPoolExecutor(max(1, workers)) as pool, tqdm(total=len(index.shards), unit=" shards", disable=None, file=sys.stderr) as bar:
        for found, shard_hashes in pool.map(lambda shard: _check_shard(index, shard, decode), range(len(index.shards))):
            problems += found
            hashes.append(shard_hashes)
            bar.update()
    if not any("://" in name or name.startswith("/") for name in index.shard_names):
        problems += _duplicates(index, np.concatenate(hashes))  # shards of others, indexed in place, only promise it within a shard
    return index, problems


def _check_shard(index: Index, shard: int, decode: bool) -> tuple[list[Problem], np.ndarray]:
    """Problems of one shard, and a 64-bit hash per key of the index."""
    url, expected = index.shards[shard], int(index.shard_bytes[shard])
    rows = range(int(index.shard_start[shard]), int(index.shard_start[shard + 1]))
    keys = index.keys(rows)
    hashes = np.array([int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys], dtype=np.uint64)
    path = storage.local_path(url) if storage.is_local(url) else storage.temporary(url)
    try:
        size = storage.size_of(url)
        if size is None:
            return [Problem(url, "missing", f"{expected} bytes", _RESTORE)], hashes
        if not storage.is_local(url):
            storage.fetch(url, path)
        problems = _check_bytes(index, shard, path, size)
        scan = scan_tar(path, url)
        problems += scan.problems
        problems += _compare(index, shard, scan, keys)
        problems += _contents(scan, path, url, decode)
        return problems, hashes
    except DataError as error:
        return [Problem(url, str(error), "a readable shard", _RESTORE)], hashes
    finally:
        if not storage.is_local(url) and os.path.exists(path):
            os.unlink(path)


def _check_bytes(index: Index, shard: int, path: str, size: int) -> list[Problem]:
    url, expected = index.shards[shard], int(index.shard_bytes[shard])
    if size != expected:
        return [Problem(url, f"has {size} bytes", f"{expected}", _RESTORE)]
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != index.shard_sha256[shard]:
        return [Problem(url, f"sha256 {sha256}", index.shard_sha256[shard], _RESTORE)]
    return []


def _compare(index: Index, shard: int, scan: Scan, keys: list[str]) -> Iterator[Problem]:
    """What the shard holds against what the index says."""
    url, view = index.shards[shard], index.view(shard)
    found = scan.rows["key"].to_pylist()
    mend = f"{_RESTORE}, or {REBUILD}"
    if len(found) != len(keys):
        yield Problem(url, f"holds {len(found)} samples", f"{len(keys)} by the index", mend)
    count = min(len(found), len(keys))
    crc = scan.rows["crc"].to_numpy()
    for at in range(count):
        if found[at] != keys[at]:
            yield Problem(url, f"sample {view.start + at} has the key {found[at]!r}", f"{keys[at]!r} by the index", mend)
            return  # all that follow are shifted
        if crc[at] != view.crc[at]:
            yield Problem(url, f"sample {view.start + at}, key {keys[at]!r}: crc {crc[at]:08x}", f"{view.crc[at]:08x} by the index", mend)
    own = set(scan.rows.column_names)
    for extension, offset, size in view.members:
        here = {
            part: scan.rows[f"{extension}.{part}"].to_numpy() if f"{extension}.size" in own else np.full(count, -1)
            for part in ("offset", "size")
        }
        wrong = (here["offset"][:count] != offset[:count]) | (here["size"][:count] != size[:count])
        if wrong.any():
            at = int(wrong.argmax())
            found_at, expected = (
                f"at {o[at]}+{s[at]}" if s[at] >= 0 else "nowhere" for o, s in ((here["offset"], here["size"]), (offset, size))
            )
            yield Problem(url, f"member {keys[at]}.{extension} lies {found_at}", f"{expected} by the index", mend)


def _contents(scan: Scan, path: str, url: str, decode: bool) -> Iterator[Problem]:
    """Captions must be UTF-8 text of a sensible length; with `decode`, images must decode."""
    keys = scan.rows["key"].to_pylist()
    every = Counter(extension for extension in scan.extensions for size in scan.rows[f"{extension}.size"].to_pylist() if size >= 0)
    with open(path, "rb") as file:
        for extension in scan.extensions:
            kind = extension.rsplit(".", 1)[-1]
            modality = "." in extension  # speech.fr.ogg: a sample may lack it, and says so in its mask
            if every[extension] < len(keys) and kind not in IMAGES and not modality:
                at = scan.rows[f"{extension}.size"].to_pylist().index(-1)
                what = f"{len(keys) - every[extension]} samples have no member {extension!r}, the first is {keys[at]!r}"
                yield Problem(
                    url, what, "the same members in every sample", "They are left out of training and counted; write them again to use them"
                )
            if kind != "txt" and not (decode and kind in IMAGES):
                continue
            for key, offset, size in zip(keys, scan.rows[f"{extension}.offset"].to_pylist(), scan.rows[f"{extension}.size"].to_pylist()):
                if size < 0:
                    continue
                file.seek(offset)
                trouble = _caption_trouble(file.read(size)) if kind == "txt" else _image_trouble(file.read(size))
                if trouble:
                    mend = "It is left out of training and counted; write it again to use it"
                    yield Problem(url, f"{key}.{extension} at byte {offset} {trouble}", "an image" if kind != "txt" else "UTF-8 text", mend)


def _caption_trouble(data: bytes) -> str:
    if not data.strip():
        return "is empty"
    if len(data) > MAX_CAPTION:
        return f"has {len(data)} bytes, more than {MAX_CAPTION}"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8: {error}"
    return ""


def _image_trouble(data: bytes) -> str:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(data)).load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"is too large to decode: {error}"
    except (OSError, ValueError, SyntaxError) as error:
        return f"does not decode: {error}"
    return ""


def _duplicates(index: Index, hashes: np.ndarray) -> Iterator[Problem]:
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for at in again[:20].tolist():
        first, second = sorted((int(order[at]), int(order[at + 1])))
        if index.keys([first]) != index.keys([second]):
            continue  # two keys with one hash
        where = f"{index.shards[index.shard_of(first)]} and {index.shards[index.shard_of(second)]}"
        yield Problem(
            where, f"key {index.keys([first])[0]!r} is that of samples {first} and {second}", "a key once in a data set", "Rename one"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_shards", description=__doc__)
    parser.add_argument("url", metavar="URL", help="folder or URL of a data set, or its index file")
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    parser.add_argument("--workers", type=int, default=2, help="shards looked at together (default 2)")
    parser.add_argument("--cache-dir", help="where the index is mapped from (default: beside it, else the user's cache folder)")
    options = parser.parse_args(arguments)
    try:
        index, problems = check(options.url, options.decode, options.workers, options.cache_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(problem)
    print(f"{options.url}: {index.num_samples} samples in {len(index.shards)} shards, {len(problems) or 'no'} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
