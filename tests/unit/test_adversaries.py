"""An objective that trains against a module of its own: the engine trains it, saves it, and a resumed run ends in the same bits."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import load
from pipeline.distributed.adversaries import FILE
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.run import RunConfig, build
from tests.runs import arguments, assert_same_end, commit_again, last_checkpoint, put_back

AMID = """{clip: {name: clip}, amid: {name: amid, student: image, teacher: teacher.image, auxiliary: auxiliary.text, student_width: 32,
    teacher_width: 32, auxiliary_width: 32, negatives: queue, queue: 64}, teacher: {name: relational_kd, student: image, teacher: teacher.text},
    rest: {name: relational_kd, student: auxiliary.image, teacher: text}, both: {name: relational_kd, student: teacher.text, teacher: auxiliary.image}}"""


@pytest.fixture(autouse=True)
def fresh():
    """What a run sets for its whole process is put back."""
    with put_back():
        yield


def fit(icons: Path, out: Path, *overrides: str):
    """A run of three linear towers and AMID's critic."""
    towers = "{student: {name: linear}, teacher: {name: linear}, auxiliary: {name: linear}}"
    _, config, *given = arguments(icons, out, f"towers={towers}", f"objectives={AMID}", *overrides)
    trainer, trainer.lock = build(load(RunConfig, config, given))
    return trainer, trainer.fit()


def test_the_critic_is_trained_saved_and_resumed_to_the_same_bits(icons_small: Path, tmp_path: Path) -> None:
    trainer, done = fit(icons_small, tmp_path / "whole")
    assert done
    saved = load_file(last_checkpoint(tmp_path / "whole") / FILE)
    critic = trainer.engine.raw.objectives["amid"].adversary()
    assert all(torch.equal(saved[f"weight|amid.{name}"], value) for name, value in critic.named_parameters())
    assert all(saved[f"exp_avg|amid.{name}"].abs().max() > 0 for name, _ in critic.named_parameters())
    # as a kill after the checkpoint before the last leaves it
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(last_checkpoint(tmp_path / "again"))
    trainer, done = fit(icons_small, tmp_path / "again")
    assert done and trainer.facts["world_size"] == 1
    assert_same_end(tmp_path / "again", tmp_path / "whole")
    assert (last_checkpoint(tmp_path / "again") / FILE).read_bytes() == (last_checkpoint(tmp_path / "whole") / FILE).read_bytes()
    kept = load_file(last_checkpoint(tmp_path / "again") / "model.safetensors")
    assert all(kept[f"objectives.amid.contrasts.{side}.left"].abs().max() > 0 for side in ("student", "auxiliary")), "the queues move"
    (last_checkpoint(tmp_path / "again") / FILE).unlink()
    commit_again(last_checkpoint(tmp_path / "again"))
    with pytest.raises(CheckpointError, match=r"holds no adversaries.safetensors, but objectives amid"):
        fit(icons_small, tmp_path / "again")
