"""The run that killed ones are compared with."""

from pathlib import Path

import pytest

from tests.runs import SAVES, Launcher, arguments


@pytest.fixture(scope="session")
def uninterrupted(launcher: Launcher, icons_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 steps without workers, in a local folder."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    launcher.run(arguments(icons_small, out, *SAVES, "data.workers=0"))
    return out
