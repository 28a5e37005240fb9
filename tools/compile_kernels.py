"""Compiles every shipped kernel configuration for GPUs that are not here: python -m tools.compile_kernels [--arch 80 90] [--json FILE].

Needs the `triton` extra and no GPU. Prints registers, stack and shared memory of each kernel as the wheel's own cuobjdump reads them from
the machine code. Exit status 1 when any of them spills registers (stack above 0), asks for more shared memory than the architecture has,
or, in bfloat16 for sm_90, multiplies without wgmma.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.kernels.gpu import launch, tiles, vectors
from pipeline.kernels.gpu.configs import TABLE, Tile

score_tail = import_module("pipeline.kernels.gpu.score")  # the attribute of that name is the function
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may ask for
TYPES = {"half": ("bf16", "fp16"), "float": ("fp32",)}
_KINDS = ("softmax", "rows", "sigmoid")
Variants = tuple[tuple[int, bool, bool], ...]  # kind, EDGES, EVEN_K
_SOFTMAX: Variants = ((0, False, True), (0, True, True), (0, True, False), (1, True, True))
_SIGMOID: Variants = ((2, True, True),)
# what the launcher passes by the name of an argument: pointers in capitals, most of them to float32; "row" is the dtype of the rows
_NAMES = {
    "*row": ("X", "Y", "P", "SELF", "OTHER", "IMAGE", "TEXT"),
    "*fp64": ("LOG", "GRAD"),
    "*i64": ("SLOT",),
    "*u8": ("USED_X", "USED_Y", "USED", "VISITS", "VALID", "COUNT", "COUNTABLE"),
    "i32": ("D", "OFFSET", "STRIDE"),
    "fp32": ("FAINT", "momentum", "rest"),
}
_TYPE_OF = {name: kind for kind, names in _NAMES.items() for name in names}
_DIVISIBLE = ("D", "STRIDE")  # by 16: widths of towers are; the launcher specialises on it


class Job(NamedTuple):
    """One kernel to compile: what is constant in it, and what it is called in the table that is printed."""

    arch: int
    kernel: str
    dtype: str
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, object], ...]  # of the launch: num_warps and the like
    types: tuple[tuple[str, str], ...] = ()  # of arguments that are not what their name says

    @property
    def label(self) -> str:
        """Kind of matrix, tile and variant in a few letters."""
        given, options = dict(self.constants), dict(self.options)
        if "BM" not in given:
            return " ".join(f"{name.lower()}={value}" for name, value in self.constants if value is not None)
        shape = f"{given['BM']}x{given['BN']}x{given['BK']}/{options['num_warps']}/{options['num_stages']}"
        marks = " ".join(name for name, on in (("edges", given["EDGES"]), ("ragged-D", not given["EVEN_K"])) if on)
        return f"{_KINDS[given['KIND']]} {shape} {marks}".strip()


class Report(NamedTuple):
    """What became of a job."""

    arch: int
    kernel: str
    dtype: str
    label: str
    registers: int
    stack: int  # bytes per thread: spilled registers
    shared: int  # bytes per program
    wgmma: int | None  # instructions; None where none are expected

    @property
    def faults(self) -> list[str]:
        """Why this kernel must not ship."""
        found = [f"stack {self.stack}"] if self.stack else []
        found += [f"shared over {SHARED_LIMIT[self.arch]}"] if self.shared > SHARED_LIMIT[self.arch] else []
        return found + (["no wgmma"] if self.wgmma == 0 else [])


def jobs(archs: Sequence[int]) -> list[Job]:
    """Every distinct kernel that the table of configurations can launch on rows whose width is a multiple of 16."""
    found: dict[Job, None] = {}
    for (arch, number), entries in TABLE.items():
        for dtype, entry in product(TYPES[number], entries if arch in archs else ()):
            config = entry.config
            roles = (("", config.sums, config.write, _SOFTMAX), ("", config.sigmoid, config.sigmoid, _SIGMOID))
            for prefix, sums, write, variants in (*roles, ("careful_", config.careful, config.careful, _SOFTMAX)):
                found |= dict.fromkeys(_tile_jobs(arch, f"{prefix}sums_kernel", dtype, sums, variants))
                found |= dict.fromkeys(_tile_jobs(arch, f"{prefix}write_kernel", dtype, write, variants))
    for arch in archs:
        found |= dict.fromkeys(_vector_jobs(arch))
    return list(found)


def _tile_jobs(arch: int, kernel: str, dtype: str, tile: Tile, variants: Variants) -> Iterator[Job]:
    shape = {"BM": tile.rows, "BN": tile.cols, "BK": tile.depth, "WIDEN": False}
    for kind, edges, even in variants:
        constants: dict[str, object] = shape | {"KIND": kind, "EDGES": edges, "EVEN_K": even}
        absent = ["BIAS"] if kind != 2 else []
        absent += [] if edges else ["USED_X", "USED_Y"]
        absent += ["BETA"] if kind and kernel == "write_kernel" else []
        absent += ["BETA", "COL"] if kind and kernel == "careful_write_kernel" else []
        constants |= dict.fromkeys(absent)
        yield Job(arch, kernel, dtype, tuple(constants.items()), (("num_warps", tile.warps), ("num_stages", tile.stages)))


def _vector_jobs(arch: int) -> Iterator[Job]:
    """The kernels around the tiles; they do not depend on the table."""
    sums = (("OUT", "*fp64"),)
    for log in (True, False):
        yield Job(arch, "reduce_kernel", "fp32", *_split({"LOG": log, **launch.REDUCE}), sums)
    yield Job(arch, "careful_reduce_kernel", "fp32", *_split(launch.REDUCE), sums)
    yield Job(arch, "coefficients_kernel", "fp32", *_split({"EXP": True, "WIDTH": launch.WIDTH}))
    for dtype in ("bf16", "fp16", "fp32"):
        yield Job(arch, "finish_kernel", dtype, *_split({"BY_SELF": True, **launch.FINISH}), (("OUT", f"*{dtype}"),))
        yield Job(arch, "cosine_kernel", dtype, *_split(score_tail.COSINE))
    yield Job(arch, "look_kernel", "fp32", *_split(score_tail.LOOK))
    yield Job(arch, "record_kernel", "fp32", *_split({"MEAN": False, "MOMENTUM": True, **score_tail.RECORD}))


def _split(given: dict[str, object]) -> tuple[tuple[tuple[str, object], ...], ...]:
    """Constants of the kernel, in capitals, and options of the launch."""
    return tuple(tuple((name, value) for name, value in given.items() if name.isupper() == constant) for constant in (True, False))


def compile_job(job: Job) -> Report:
    """Compiles one kernel and reads what it costs from its machine code."""
    kernel = next(getattr(module, job.kernel) for module in (tiles, vectors, score_tail) if hasattr(module, job.kernel))
    constants, types = dict(job.constants), dict(job.types)
    signature = {name: _type_of(name, job.dtype, constants, types) for name in kernel.arg_names}
    places = enumerate(signature.items())
    attrs = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in places if kind.startswith("*") or name in _DIVISIBLE}
    source = ASTSource(kernel, signature, constants, attrs)
    built = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    usage = _cuobjdump("--dump-resource-usage", built.asm["cubin"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    expected = job.arch == 90 and job.dtype == "bf16" and "BM" in constants
    wgmma = _cuobjdump("-sass", built.asm["cubin"]).count("HGMMA") if expected else None
    return Report(job.arch, job.kernel.removesuffix("_kernel"), job.dtype, job.label, registers, stack, built.metadata.shared, wgmma)


def _type_of(name: str, dtype: str, constants: dict[str, object], types: dict[str, str]) -> str:
    if name in constants:
        return "constexpr"
    if name in types:
        return types[name]
    return _TYPE_OF.get(name, "*fp32" if name.isupper() else "i32").replace("row", dtype)


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints, judges."""
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration ahead of time and check what it costs.")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--json", metavar="FILE", help="write the table there as well")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    work = jobs(args.arch)
    print(
        f"triton {triton.__version__}: {len(work)} kernels\n{'arch':5}{'kernel':18}{'dtype':6}{'variant':42}{'regs':>5}{'stack':>6}{'shared':>8}{'wgmma':>6}"
    )
    reports: list[Report] = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for report in pool.map(compile_job, work):
            reports.append(report)
            row = f"sm_{report.arch:<3}{report.kernel:18}{report.dtype:6}{report.label:42}{report.registers:5}{report.stack:6}{report.shared:8}"
            print(f"{row}{'-' if report.wgmma is None else report.wgmma:>6}  {', '.join(report.faults)}".rstrip(), flush=True)
    bad = sum(bool(report.faults) for report in reports)
    print(f"{len(reports)} kernels, {bad} of them faulty")
    if args.json:
        table = {"triton": triton.__version__, "kernels": [{**report._asdict(), "faults": report.faults} for report in reports]}
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
