"""Webdataset shards that exist already, indexed where they are: nothing is rewritten."""

import argparse
import os
import re

from pipeline.data import storage
from pipeline.data.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this source."""
    parser.add_argument(
        "--shards", required=True, help="path or URL with globs and braces: 's3://bucket/cc12m/{00000..01242}.tar', '/data/*.tar'"
    )


def find(pattern: str) -> list[str]:
    """The shards that a glob or brace pattern names, sorted, each once, local ones as file:// URLs. Raises DataError."""
    import braceexpand

    try:
        # braceexpand reads backslashes as escapes; none belongs in a URL
        patterns = list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError as error:
        raise DataError(f"--shards {pattern}: {error}. Expected something like s3://bucket/{{00000..00099}}.tar") from None
    found: set[str] = set()
    for one in patterns:
        url = f"file://{os.path.abspath(storage.local_path(one))}" if storage.is_local(one) else one
        if re.search(r"[*?\[]", url):
            fs, path = storage.filesystem(url)
            matches = storage.with_retries(lambda fs=fs, path=path: fs.glob(path), url)
            found.update(fs.unstrip_protocol(match) for match in matches)
        else:
            found.add(url)
    if not found:
        raise DataError(f"--shards {pattern}: names no file. Check the pattern, and quote it so that the shell leaves it alone")
    return sorted(found)


def fingerprint(shards: list[str]) -> dict:
    """The shards and their sizes: what the index depends on. One listing per folder. Raises DataError for a shard that is missing."""
    listings: dict[str, dict[str, int]] = {}
    sizes = {}
    for url in shards:
        folder, _, name = url.rpartition("/")
        if folder not in listings:
            listings[folder] = storage.sizes_in(folder)
        size = listings[folder].get(name)
        sizes[url] = storage.size_of(url) if size is None else size
        if sizes[url] is None:
            raise DataError(f"{url}: no such shard. Check --shards")
    return {"source": "tars", "shards": sizes}
