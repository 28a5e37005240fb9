"""What only a GPU can show: no wait for the device, and graphs."""

from collections.abc import Callable

import pytest
import torch

from pipeline.kernels.gpu import cosine, gradients, score, sums
from tests.triton.problems import problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def work(rows: int = 1280) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Loss, gradients and one visit of a group, on fixed tensors."""
    pairs, given = problem(rows, rows, 512, 100.0, torch.bfloat16)
    slot = torch.randperm(4 * rows, device="cuda")[:rows]
    history, visits = torch.zeros(4 * rows, device="cuda"), torch.zeros(4 * rows, dtype=torch.uint8, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        found = sums(pairs)
        parts = gradients(pairs, found, given)
        scored = score(cosine(pairs.x, pairs.y), slot=slot, history=history, visits=visits, keep=rows // 5)
        return *found[:4], *parts, scored.rows, scored.differential

    return run


def test_nothing_waits_for_the_device() -> None:
    run = work()
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_can_be_captured_in_a_graph() -> None:
    run = work()
    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected[:7], captured[:7]))


def test_a_hundred_runs_give_the_same_bits() -> None:
    pairs, given = problem(3000, 3000, 512, 14.3, torch.bfloat16)
    first = None
    for _ in range(100):
        found = sums(pairs)
        parts = (*found[:3], *gradients(pairs, found, given))
        first = first or parts
        assert all(torch.equal(a, b) for a, b in zip(first, parts))
