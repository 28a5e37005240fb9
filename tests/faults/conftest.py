"""The run that killed ones are compared with, and the store behind a door."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stores import Door
from tests.runs import SAVES, Launcher, arguments


@pytest.fixture(scope="session")
def uninterrupted(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 steps without workers, in a local folder."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    launcher.run(arguments(icons_small, out, *SAVES, "data.workers=0"))
    return out


@pytest.fixture
def door(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """The store, behind a door, for this process and those that it starts."""
    from s3fs import S3FileSystem

    door = Door(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", door.url)
    S3FileSystem.clear_instance_cache()
    yield door
    door.remove()
