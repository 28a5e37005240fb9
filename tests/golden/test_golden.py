"""Every file of configs/ resolves to its committed text, so that a changed default shows in review as a diff.

After a change that is meant: python -m tests.golden.test_golden writes the texts again; look at the diff, commit it.
"""

from pathlib import Path

import pytest
import yaml

from pipeline.config import dump, load, parse, read_yaml, to_yaml
from pipeline.run import RunConfig

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
NO_RUNS = ("cluster", "accelerate", "compare")  # folders of configs/ that hold something other than runs


def runs() -> list[Path]:
    """The files of configs/ that are runs, relative to it."""
    paths = [path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")]
    return sorted(path for path in paths if path.parts[0] not in NO_RUNS)


def golden(path: Path) -> Path:
    """Where the text of configs/<path> is kept."""
    return HERE / path


@pytest.mark.parametrize("path", runs(), ids=str)
def test_a_config_resolves_to_its_golden_text(path: Path) -> None:
    config = load(RunConfig, CONFIGS / path)
    text = to_yaml(config)
    assert golden(path).is_file(), f"{golden(path)} is missing; write it with python -m tests.golden.test_golden"
    assert text == golden(path).read_text(encoding="utf-8"), "if the change is meant: python -m tests.golden.test_golden"
    assert parse(RunConfig, read_yaml(text), "the dump") == config
    assert yaml.safe_load(text) == dump(config)  # any YAML reader sees the same values


def test_there_is_no_golden_text_without_a_config() -> None:
    assert {path.relative_to(HERE) for path in HERE.rglob("*.yaml")} == set(runs())


def write() -> None:
    """Writes all golden texts anew."""
    for old in HERE.rglob("*.yaml"):
        old.unlink()
    for path in runs():
        golden(path).parent.mkdir(parents=True, exist_ok=True)
        golden(path).write_text(to_yaml(load(RunConfig, CONFIGS / path)), encoding="utf-8")
        print(golden(path))


if __name__ == "__main__":
    write()
