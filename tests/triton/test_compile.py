"""Ahead-of-time compilation without a GPU: the gate finds faults, and a few shipped kernels pass it. `make kernels` compiles all."""

import pytest
import torch

from pipeline.kernels.gpu import sums
from pipeline.kernels.gpu.configs import TABLE, Tile, choose
from pipeline.kernels.similarity import Pairs
from tools.compile_kernels import Report, compile_job, jobs


def report(**changes: object) -> Report:
    good = {"arch": 90, "kernel": "sums", "dtype": "bf16", "label": "", "registers": 128, "stack": 0, "shared": 1000, "wgmma": 4}
    return Report(**good | changes)


def test_what_counts_as_a_fault() -> None:
    assert not report().faults
    assert report(stack=8).faults == ["stack 8"] and report(wgmma=0).faults == ["no wgmma"]
    assert report(shared=232449).faults and not report(shared=232448).faults and report(arch=80, shared=170000).faults


def test_every_configuration_of_the_table_is_compiled() -> None:
    work = jobs([80, 90])
    for (arch, number), entries in TABLE.items():
        for dtype in ("bf16", "fp16") if number == "half" else ("fp32",):
            for entry in entries:
                for kernel in ("sums", "write"):
                    tile = getattr(entry.config, kernel)
                    shape = [dict(j.constants)["BM"] for j in work if (j.arch, j.kernel, j.dtype) == (arch, f"{kernel}_kernel", dtype)]
                    assert tile.rows in shape
    assert len(set(work)) == len(work)


@pytest.mark.parametrize("kernel", ["sums_kernel", "write_kernel"])
def test_a_shipped_kernel_has_no_fault(kernel: str) -> None:
    largest = [job for job in jobs([90]) if job.kernel == kernel and job.dtype == "bf16" and dict(job.constants)["BN"] == 256]
    found = compile_job(largest[1])
    assert not found.faults and found.wgmma and 100 < found.registers < 256


def test_a_tile_too_large_for_the_registers_is_found() -> None:
    job = next(job for job in jobs([90]) if job.kernel == "sums_kernel" and job.dtype == "bf16")
    constants = tuple((dict(job.constants) | {"BM": 256, "BN": 256}).items())
    assert "stack" in compile_job(job._replace(constants=constants, options=(("num_warps", 8), ("num_stages", 3)))).faults[0]


def test_the_table_has_an_entry_for_every_size() -> None:
    cpu = torch.device("cpu")  # takes Hopper's
    assert choose(cpu, torch.float32, 1, 10**6, 64).sums.rows == 64
    assert choose(cpu, torch.bfloat16, 20000, 20000, 1024).sums == Tile(128, 256, 64, 8, 4)
    assert choose(cpu, torch.bfloat16, 20000, 20000, 512).sums == Tile(128, 128, 64, 8, 3)
    assert choose(cpu, torch.float16, 100, 10**6, 1024).sums.rows == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rows would be on the device")
def test_rows_on_a_cpu_are_refused_unless_interpreted() -> None:
    with pytest.raises(ValueError, match="expected a CUDA device, or TRITON_INTERPRET=1"):
        sums(Pairs(torch.ones(4, 64), torch.ones(4, 64), torch.tensor(1.0)))
