"""Data that comes as a Debian package: downloaded and unpacked into the cache, not installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pipeline.data.errors import DataError


def fetched(package: str, licence: str, megabytes: int, inside: str, option: str) -> Path:
    """The folder `inside` of the unpacked package; fetched by apt-get on first use, which is told with its licence. Raises DataError that
    names `option`, which takes a folder unpacked by hand."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dissect-pipeline" / package
    if cache.is_dir():
        return cache / inside
    cache.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{package}-", dir=cache.parent))
    mend = f"Run apt-get update first, or unpack the Debian package {package} by hand and give its folder {inside} as {option}"
    try:
        print(f"{package}: fetching {megabytes} MB into {cache} (licence {licence})", flush=True)
        _run(["apt-get", "download", package], place, mend)
        _run(["dpkg-deb", "-x", str(next(place.glob("*.deb"))), str(place / "x")], place, mend)
        (place / "x").replace(cache)
    finally:
        shutil.rmtree(place)
    return cache / inside


def _run(command: list[str], folder: Path, mend: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{command[0]}: there is no such program here. {mend}") from None
    if done.returncode:
        raise DataError(f"{' '.join(command[:3])}: {(done.stderr.strip() or 'failed').splitlines()[-1]}. {mend}")
