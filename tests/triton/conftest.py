"""Where the Triton kernels run: on a CUDA device if there is one (marked gpu), else under Triton's interpreter in a process of its own.

TRITON_INTERPRET must be set before triton is imported, by whatever imports it first, so `test_interpreted.py` starts a second pytest that
collects the rest of this folder. `TRITON_INTERPRET=1 pytest tests/triton` does that directly.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = ["test_compile.py", "test_interpreted.py"]  # what needs kernels that are not interpreted
DEVICE = ["test_tiles.py", "test_care.py", "test_score_tail.py", "test_device.py"]

collect_ignore = COMPILED if INTERPRETED else [] if ON_GPU else DEVICE
if find_spec("triton") is None:
    collect_ignore = ["test_compile.py", *DEVICE]  # test_interpreted.py stays: it says what is missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU the suite runs on it."""
    for item in items:
        if ON_GPU and not INTERPRETED and item.path.parent == Path(__file__).parent and item.path.name in DEVICE:
            item.add_marker(pytest.mark.gpu)
