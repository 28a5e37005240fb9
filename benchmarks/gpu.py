"""The contrastive loss on one GPU in one go: correct, how far from the hardware's limits, and against every peer that is installed.

`python -m benchmarks.gpu --json FILE [--minutes 9] [--tune]`. Sections run in the order of what matters and stop when the time is over;
what was not reached, and what failed, is in the JSON as such. `benchmarks/gpu_profile.sh` looks into the two hot kernels with ncu.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import machine, save
from benchmarks.peers import PACKAGES, Loss, ours, peers, step
from pipeline.kernels import clip_loss
from pipeline.kernels.similarity import Gradients, Pairs, sums

SIZES = [(16384, 768), (32768, 768), (65536, 768), (32768, 512), (16384, 512), (16384, 1024), (32768, 1024), (65536, 512), (4096, 512)]
BARS = {
    "B=65536 D=768 ms": 45,
    "over siglip-kernel": 1.0,
    "over open_clip amp": 3,
    "over memeff at 512 / 768 and more": [1.3, 2],
    "over inf-cl": 8,
    "scoring outputs": 1.03,
}


class Clock:
    """The minutes that are left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


def rows_of(batch: int, width: int, dtype: torch.dtype = torch.bfloat16, matched: float = 0.25) -> tuple[Tensor, Tensor]:
    """Fresh random unit rows: zeros, or rows that stay in the L2, would flatter."""
    image, noise = (normalize(torch.randn(batch, width, device="cuda")) for _ in range(2))
    return tuple(rows.bfloat16().to(dtype) for rows in (image, normalize(matched * image + noise)))


def milliseconds(call: Callable[[], Any]) -> float:
    """One call between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def interleave(calls: dict[str, Callable[[], Any]], seconds: float, rounds: int = 20) -> dict[str, Any]:
    """Median, p20, p80 in ms and peak extra MiB of every call, in turns until the rounds or the seconds are over; a failure is its message."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    result: dict[str, Any] = {}
    end = time.monotonic() + seconds
    for turn in range(-2, rounds):
        for name, call in calls.items():
            if "failed" in result.get(name, {}):
                continue
            try:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                found = milliseconds(call)
            except Exception as error:  # a peer that cannot do this size is a finding
                result[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                torch.cuda.empty_cache()
                continue
            if turn >= 0:
                times[name].append(found)
            else:
                result[name] = {"extra MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}
        if turn >= 2 and time.monotonic() > end:
            break
    for name, values in times.items():
        if values:
            ordered = sorted(values)
            p20, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
            result[name] |= {"p50_ms": statistics.median(ordered), "p20_ms": p20, "p80_ms": p80, "rounds": len(ordered)}
    return result


def ceilings() -> dict[str, Any]:
    """What the device copies and multiplies per second, measured."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = interleave({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}, 5)
    return {"copy GB/s": 2 * 2**30 / found["copy"]["p50_ms"] / 1e6, "bf16 TFLOP/s": 2 * 8192**3 / found["product"]["p50_ms"] / 1e9}


def errors() -> dict[str, Any]:
    """Relative L2 error of gradients and outputs against float64, on odd sizes; the same bits in 100 runs; and no wait for the device."""
    result: dict[str, Any] = {}
    for batch, width in ((1000, 200), (2049, 768)):
        for scale in (1.0, 14.3, 100.0):
            exact = [rows.double().requires_grad_() for rows in rows_of(batch, width)]
            truth = clip_loss(*exact, scale, impl="reference")
            truth.loss.backward()
            grads = torch.cat([rows.grad for rows in exact])
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                rows = [value.detach().to(dtype).requires_grad_() for value in exact]
                s = torch.tensor(scale, device="cuda", requires_grad=True)
                found = clip_loss(*rows, s, impl="triton")
                found.loss.backward()
                row = {"gradients": _error(torch.cat([value.grad for value in rows]), grads)}
                row |= {name: _error(getattr(found, name), getattr(truth, name)) for name in ("per_sample", "p_row", "p_col", "cosine")}
                result[f"B={batch} D={width} s={scale} {str(dtype).removeprefix('torch.')}"] = row
    image, text = rows_of(4096, 768)
    scale = torch.tensor(14.3, device="cuda")
    mine = ours("cuda")["triton bf16"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [step(mine, image, text, scale) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    result["the same bits in 100 runs"] = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    return result


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def times(batch: int, width: int, scale: float, seconds: float, rate: float) -> dict[str, Any]:
    """Every loss at one size; TFLOP/s on the four products that an exact loss needs, and on those that the loss itself does."""
    image, text = rows_of(batch, width)
    s = torch.tensor(scale, device="cuda")
    found: dict[str, Loss] = ours("cuda") | peers("cuda", scale)
    found = {name: loss for name, loss in found.items() if "fp32" not in name or batch <= 16384}
    result = interleave({name: lambda loss=loss: step(loss, image, text, s) for name, loss in found.items()}, seconds)
    unit = 2 * batch * batch * width / 1e9
    for name, row in result.items():
        if "p50_ms" in row:
            own, four = found[name].units * unit / row["p50_ms"], 4 * unit / row["p50_ms"]
            row |= {"TFLOP/s on 4u": four, "TFLOP/s on its own": own, "share of the ceiling on 4u": four / rate}
    mine = result["triton bf16"]
    ratios = {name: row["p50_ms"] / mine["p50_ms"] for name, row in result.items() if "p50_ms" in row and "p50_ms" in mine}
    return {"batch": batch, "width": width, "scale": scale, "losses": result, "times slower than ours": ratios}


def scoring(batch: int, width: int) -> dict[str, Any]:
    """What the per-sample outputs add to the forward sums; and the rate of the forward."""
    image, text = rows_of(batch, width)
    s, history = torch.tensor(14.3, device="cuda"), torch.full((batch,), 30.0, device="cuda")
    with torch.no_grad():
        calls = {
            "sums": lambda: sums(Pairs(image, text, s), "triton", False),
            "loss and scores": lambda: clip_loss(image, text, s, history=history, impl="triton"),
        }
        found = interleave(calls, 10)
    found["with over without"] = found["loss and scores"]["p50_ms"] / found["sums"]["p50_ms"]
    found["TFLOP/s on 1u"] = 2 * batch * batch * width / found["loss and scores"]["p50_ms"] / 1e9
    return found


def largest() -> dict[str, float]:
    """A million pairs: one step."""
    image, text = rows_of(2**20, 512)
    torch.cuda.reset_peak_memory_stats()
    found = milliseconds(lambda: step(ours("cuda")["triton bf16"], image, text, torch.tensor(14.3, device="cuda")))
    return {"seconds": found / 1e3, "peak GiB": torch.cuda.max_memory_allocated() / 2**30, "TFLOP/s on 4u": 8 * 2**40 * 512 / found / 1e9}


def tune(clock: Clock) -> dict[str, Any]:
    """Other tiles and chunks than the table's, for whoever edits it."""
    result: dict[str, Any] = {}
    for batch, width in ((65536, 768), (32768, 512), (32768, 1024), (4096, 512)):
        if clock.left() > 30:
            result[f"B={batch} D={width}"] = tune_at(batch, width, min(25.0, clock.left() / 3))
    return result


def tune_at(batch: int, width: int, seconds: float) -> dict[str, Any]:
    """The candidates at one size, forward sums and gradients apart."""
    from pipeline.kernels.gpu import configs, gradients
    from pipeline.kernels.gpu import sums as tile_sums

    shapes = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3))
    image, text = rows_of(batch, width)
    pairs = Pairs(image, text, torch.tensor(14.3, device="cuda"))
    base, found = configs.choose(image.device, image.dtype, batch, batch, width), tile_sums(pairs)
    ones = torch.full((batch,), 1 / batch, device="cuda", dtype=torch.float64)
    given = Gradients(ones, ones, ones.float())
    calls: dict[str, Callable[[], Any]] = {}
    for tile in (configs.Tile(*shape) for shape in shapes):
        calls[f"sums {tuple(tile)}"] = lambda tile=tile: tile_sums(pairs, config=base._replace(sums=tile))
        calls[f"gradients {tuple(tile)}"] = lambda tile=tile: gradients(pairs, found, given, config=base._replace(write=tile))
    for chunk in ((2048, 4096), (4096, 2048), (8192, 2048), (8192, 8192), (2048, batch), (16384, 16384)):
        calls[f"gradients chunk {chunk}"] = lambda chunk=chunk: gradients(pairs, found, given, config=base._replace(chunk=chunk))
    return interleave(calls, seconds, rounds=7)


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--tune", action="store_true", help="try other tiles and chunks as well")
    parser.add_argument("--step", type=int, nargs=2, metavar=("BATCH", "WIDTH"), help="three steps and nothing else, for a profiler")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: found no CUDA device; on a CPU run `python -m benchmarks.kernel`")
    if args.step:
        image, text = rows_of(*args.step)
        for _ in range(3):
            step(ours("cuda")["triton bf16"], image, text, torch.tensor(14.3, device="cuda"))
        return torch.cuda.synchronize()
    clock = Clock(args.minutes)
    device = {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    result: dict[str, Any] = {"benchmark": "gpu", "machine": machine(PACKAGES) | device, "bars": BARS}
    sections: dict[str, Callable[[], Any]] = {"errors": errors, "ceilings": ceilings}
    sections |= {f"time B={b} D={d}": lambda b=b, d=d: times(b, d, 14.3, 20, result["ceilings"]["bf16 TFLOP/s"]) for b, d in SIZES[:4]}
    sections |= {"scoring": lambda: scoring(65536, 768), "a million pairs": largest}
    if args.tune:
        sections["tune"] = lambda: tune(clock)
    sections |= {f"time B={b} D={d}": lambda b=b, d=d: times(b, d, 14.3, 15, result["ceilings"]["bf16 TFLOP/s"]) for b, d in SIZES[4:]}
    sections["time B=32768 D=768 s=100"] = lambda: times(32768, 768, 100.0, 15, result["ceilings"]["bf16 TFLOP/s"])
    for name, section in sections.items():
        if clock.left() < 10:
            result[name] = "not reached"
            continue
        try:
            result[name] = section()
        except Exception as error:  # the other sections are worth having
            result[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        torch.cuda.empty_cache()
        print(f"{name}: {result[name]}", flush=True)
        save(args.json, result)  # after every section: a run that is cut off leaves what it found
    return None


if __name__ == "__main__":
    main()
