"""The claim AMID is built on, on a task whose truth is known (benchmarks/kd/collapse.py, smaller)."""

import pytest

from benchmarks.kd import collapse


def test_a_teacher_that_only_agrees_with_the_student_forgets_what_the_student_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A-P3: probes of what only the auxiliary modality shows plainly; chance is 25 %."""
    monkeypatch.setattr(collapse, "EPOCHS", 30)
    monkeypatch.setattr(collapse, "METHODS", {name: collapse.METHODS[name] for name in ("mi", "amid")})
    found = collapse.run(seed=7)
    assert found["amid"]["teacher v"] - found["mi"]["teacher v"] >= 20
    assert found["amid"]["student v"] > found["mi"]["student v"] + 5
