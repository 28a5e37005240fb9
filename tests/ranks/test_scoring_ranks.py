"""The options of the scoring pass over ranks: the choices and losses of one process, with DDP and under ZeRO stage 3."""

from pathlib import Path

import pytest

from tests.ranks.test_zero import assert_same_training, run_cells
from tests.runs import Launcher

# lanes are scored in turns that do not fit two ranks: at some steps one of them embeds nothing of its own
SHORT = ["steps=12", "scoring.every=3", "objectives.clip.negatives=all"]
VIEWS = [*SHORT, "scoring.image_size=16", "scoring.patches=0.5", "scoring.micro_batch=5"]
REUSE = [*SHORT, "scoring.reuse=true"]
AHEAD = ["steps=12", "scoring.every=3", "scoring.ahead=true"]
ZERO = ["engine.zero={stage: 3, persist_below: 100}"]
STAGE2 = ["engine.zero={stage: 2}"]


def compare(launcher: Launcher, data: Path, out: Path, cells: dict[str, list[str]]) -> None:
    """Every cell on two ranks against one process without DeepSpeed."""
    alone = {name: [word for word in given if word not in ZERO + STAGE2] for name, given in cells.items()}
    run_cells(launcher, 1, out / "one", data, alone)
    run_cells(launcher, 2, out / "two", data, cells)
    for name in cells:
        assert_same_training(out / "two" / name, out / "one" / name)


def test_two_ranks_choose_and_train_like_one_process_in_stage_3_and_ahead(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    compare(launcher, icons_small, tmp_path, {"views": VIEWS + ZERO, "ahead": AHEAD})


@pytest.mark.slow
def test_every_option_on_two_ranks(launcher: Launcher, icons_small: Path, tmp_path: Path) -> None:
    whole = [*AHEAD, "selector.scope=global"]
    cells = {"views": VIEWS, "reuse": REUSE, "reuse, stage 3": REUSE + ZERO, "ahead, global": whole, "ahead, stage 2": AHEAD + STAGE2}
    compare(launcher, icons_small, tmp_path, cells)
