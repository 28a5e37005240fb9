"""Synthetic speech of captions, by the program espeak-ng. What is made of it has to say that it is synthetic."""

import subprocess
import tempfile
from pathlib import Path

from pipeline.data.errors import DataError

PACKAGE = "espeak-ng"


def version() -> str:
    """The program's own words. Raises DataError where it is not installed."""
    return _run(["--version"], b"").decode(errors="replace").split(" Data at")[0].strip()


def speak(text: str, language: str) -> bytes:
    """A WAV file, 22,050 Hz, one channel: `text` by the voice of a `language` (en, fr, es-419 ...). Raises DataError for one there is not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "speech.wav")
        _run(["-v", language, "-w", str(file), "--stdin"], text.encode())
        return file.read_bytes()


def _run(arguments: list[str], given: bytes) -> bytes:
    try:
        done = subprocess.run([PACKAGE, *arguments], input=given, capture_output=True, check=False)
    except FileNotFoundError:
        raise DataError(
            f"{PACKAGE}: there is no such program here, and it makes the synthetic speech. Install Debian's package: apt-get install {PACKAGE}"
        ) from None
    if done.returncode:
        said = (done.stderr.decode(errors="replace").strip() or "it failed").splitlines()[-1]
        raise DataError(f"{PACKAGE} {' '.join(arguments[:2])}: {said}. `{PACKAGE} --voices` lists the languages")
    return done.stdout
