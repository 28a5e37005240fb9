"""Runs the rest of this folder under Triton's interpreter, in a process of its own; see conftest.py."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the suite runs on it")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton extra: pip install 'dissect-pipeline[triton]'")
@pytest.mark.skipif(
    find_spec("triton") is not None and version("triton") < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 takes arrays of one element for integers, which numpy 2.4 no longer does; use numpy<2.4",
)
def test_the_kernels_under_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(FOLDER)]
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
