"""What every benchmark shares: interleaved timing, peak memory in a child process, a description of the machine, one JSON."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

__all__ = ["extra_memory", "installed", "interleave", "machine", "ratio", "save", "saved_bytes", "spread", "summary", "table"]


def interleave(providers: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """CPU seconds of every call (all threads of this process), one call of every provider per round.

    CPU time and turns: what else runs on the machine then slows all of them alike instead of whoever was measured at that moment.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(-warmup, rounds):
        for name, call in providers.items():
            start = time.process_time()
            call()
            if turn >= 0:
                times[name].append(time.process_time() - start)
    return times


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    ordered = sorted(seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return {"p50_ms": statistics.median(ordered) * 1e3, "p20_ms": at[0] * 1e3, "p80_ms": at[1] * 1e3}


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def extra_memory(call: Callable[[], Any]) -> float | None:
    """MiB by which resident memory rises above where it stands, at its highest, while `call` runs; None where Linux's counters are
    missing. To be called once in a fresh process: an allocator that has grown before hides what it needs."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again unseen
    reset.write_text("5")  # the high-water mark starts again from here
    before = _kib(status, "VmRSS")
    call()
    return (_kib(status, "VmHWM") - before) / 1024


def saved_bytes(module: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Bytes that a forward keeps for its backward, weights apart; each piece of memory once."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)  # so that no later tensor gets its address
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(seen.values())


def _kib(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def installed(package: str) -> bool:
    """Whether a peer can be imported; it is never a dependency."""
    return importlib.util.find_spec(package) is not None


def machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The device and the versions that a figure belongs to; the load says how quiet it was."""
    versions = {}
    for name in ("torch", "numpy", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"


def save(path: str | Path | None, result: dict[str, Any]) -> None:
    """Writes one JSON, its folder included; without a path nothing is written."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """One line per method; the columns are what the experiment measures."""
    columns = list(dict.fromkeys(key for values in results[0].values() for key in values))
    columns = [column for column in columns if not isinstance(next(v[column] for v in results[0].values() if column in v), str)]
    width = max(16, *(len(method) + 2 for method in results[0]))
    lines = [" " * width + "".join(f"{column:>18}" for column in columns)]
    for method in results[0]:
        cells = [spread([seed[method][c] for seed in results]) if c in results[0][method] else "" for c in columns]
        lines.append(f"{method:{width}}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
