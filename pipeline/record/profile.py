"""What a step costs: model FLOP by torch's counter, the machine's matrix rate as the ceiling, and traces on demand."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.types import Batch


def forward_flops(engine: Any, batch: Batch) -> float:
    """FLOP of one sample's forward through all towers, counted on a real batch; a backward is taken as two forwards."""
    with FlopCounterMode(display=False) as counter, _attention_in_parts():
        engine.features(batch)
    return counter.get_total_flops() / len(batch)


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """In eval mode and float32 nn.MultiheadAttention is one fused operation, of which torch's counter sees nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product, the best of five: the ceiling that utilisation is a share of. About 0.2 s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


class Trace:
    """torch.profiler over the steps `first:last` (last excluded); writes a Chrome trace into the run folder."""

    def __init__(self, steps: str | None, folder: Path) -> None:
        self.first, self.last = (int(part) for part in steps.split(":")) if steps else (-1, -1)
        self.path = folder / f"trace-{self.first}-{self.last}.json"
        self._profiler: Any = nullcontext()

    def at(self, step: int) -> None:
        """Called before each step; starts and ends the trace."""
        if step == self.first:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.__enter__()
        elif step == self.last and not isinstance(self._profiler, nullcontext):
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = nullcontext()
