"""The loss against open_clip's ClipLoss on a CPU: time, memory and error side by side. `python -m benchmarks.kernel [--json FILE]`."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import extra_memory, installed, interleave, machine, ratio, save, summary
from pipeline.kernels import clip_loss

BARS = {"bf16 time": 2.5, "fp32 time": 1.6, "bf16 memory": 0.21, "fp32 memory": 0.21, "fp32 error": 1e-6, "bf16 error": 0.65}


def providers() -> dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """Name -> (dtype of the rows, loss(image, text, scale)). A peer that is not installed is not among them."""
    found: dict[str, Any] = {
        "blocked fp32": (torch.float32, lambda i, t, s: clip_loss(i, t, s, impl="blocked").loss),
        "blocked bf16": (torch.bfloat16, lambda i, t, s: clip_loss(i, t, s, impl="blocked").loss),
        "reference fp32": (torch.float32, lambda i, t, s: clip_loss(i, t, s, impl="reference").loss),
    }
    if installed("open_clip"):
        from open_clip.loss import ClipLoss

        peer = ClipLoss()
        found["open_clip fp32"] = (torch.float32, peer)
        found["open_clip amp"] = (torch.bfloat16, lambda i, t, s: _under_autocast(peer, i, t, s))
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        def two_calls(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
            labels, s = torch.arange(i.shape[0]), s.to(i.dtype)
            return (cce(i * s, t, labels, impl="torch_compile") + cce(t * s, i, labels, impl="torch_compile")) / 2

        found["cut-cross-entropy bf16"] = (torch.bfloat16, two_calls)
    return found


def _under_autocast(loss: Callable, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss(image, text, scale)


def step(name: str, image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward of one provider on the rows in its dtype; (loss, image gradient, text gradient)."""
    dtype, loss = providers()[name]
    image, text = (rows.to(dtype, copy=True).requires_grad_() for rows in (image, text))
    value = loss(image, text, torch.tensor(scale, requires_grad=True))
    value.backward()
    return value.detach(), image.grad, text.grad


def inputs(batch: int, width: int, matched: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows on the bfloat16 grid, so that every provider gets the same numbers; `matched` mixes each image into its text."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = (normalize(torch.randn(batch, width, generator=generator)) for _ in range(2))
    return tuple(rows.bfloat16().float() for rows in (image, normalize(matched * image + noise)))


def times(batch: int, width: int, rounds: int, scale: float) -> dict[str, Any]:
    """CPU milliseconds, and the ratios to the peers."""
    image, text = inputs(batch, width, 0.0)
    calls = {name: lambda name=name: step(name, image, text, scale) for name in providers()}
    half = [rows.bfloat16() for rows in (image, text)]
    square = torch.empty(batch, batch)
    half_square = square.bfloat16()
    calls["product fp32"] = lambda: torch.mm(image, text.T, out=square)
    calls["product bf16"] = lambda: torch.mm(half[0], half[1].T, out=half_square)
    seconds = interleave(calls, rounds)
    result: dict[str, Any] = {"scale": scale, "times": {name: summary(values) for name, values in seconds.items()}}
    if "open_clip fp32" in seconds:
        result["ratios"] = {
            "bf16 time": ratio(seconds["open_clip amp"], seconds["blocked bf16"]),
            "fp32 time": ratio(seconds["open_clip fp32"], seconds["blocked fp32"]),
        }
    for dtype in ("fp32", "bf16"):
        floor = 4 * result["times"][f"product {dtype}"]["p50_ms"]
        result[f"floor 4u {dtype}"] = {"ms": floor, "of blocked": floor / result["times"][f"blocked {dtype}"]["p50_ms"]}
        result[f"floor 4u {dtype}"]["GFLOP/s"] = 8 * batch * batch * width / floor / 1e6
    return result


def memory(batch: int, width: int) -> dict[str, Any]:
    """MiB beyond the inputs (gradients counted), each provider in a process of its own."""
    result: dict[str, Any] = {}
    for name in (name for name in providers() if name != "reference fp32" and not name.startswith("cut")):
        command = [sys.executable, "-m", "benchmarks.kernel", "--child", name, "--memory-batch", str(batch), "--width", str(width)]
        result[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if "open_clip fp32" in result and result["open_clip fp32"] is not None:
        pairs = (("bf16 memory", "blocked bf16", "open_clip amp"), ("fp32 memory", "blocked fp32", "open_clip fp32"))
        return {"MiB": result, "ratios": {bar: result[ours] / result[peer] for bar, ours, peer in pairs}}
    return {"MiB": result}


def child(name: str, batch: int, width: int) -> None:
    """The body of `memory`'s process: libraries warmed on small rows, then one step."""
    torch.set_num_threads(1)
    step(name, *inputs(256, width, 0.0), 14.3)
    image, text = inputs(batch, width, 0.0)
    dtype, loss = providers()[name]
    image, text, scale = image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), torch.tensor(14.3, requires_grad=True)
    print(json.dumps(extra_memory(lambda: loss(image, text, scale).backward())))


def errors(batch: int, width: int) -> dict[str, Any]:
    """Relative L2 error of the gradients against float64 on the same rows, by scale and kind of data."""
    result: dict[str, Any] = {}
    for kind, matched in (("random", 0.0), ("matched", 0.25)):
        image, text = inputs(batch, width, matched)
        for scale in (14.3, 100.0):
            exact = [rows.double().requires_grad_() for rows in (image, text)]
            clip_loss(*exact, scale, impl="reference").loss.backward()
            truth = torch.cat([rows.grad for rows in exact])
            names = [name for name in providers() if not name.startswith("cut")]
            found = {name: torch.cat(step(name, image, text, scale)[1:]).double() for name in names}
            errors = {name: float((value - truth).norm() / truth.norm()) for name, value in found.items()}
            result[f"{kind}, s={scale}"] = errors
            if "open_clip amp" in errors:
                errors["bf16 ratio"] = errors["blocked bf16"] / errors["open_clip amp"]
    return result


def show(result: dict[str, Any]) -> None:
    """Figures beside their bars."""
    for scale, part in result["time"].items():
        print(f"\nB={result['batch']} D={result['width']} s={scale}, forward and backward, CPU ms: median (p20 to p80)")
        for name, row in part["times"].items():
            print(f"  {name:24s} {row['p50_ms']:8.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})")
        for dtype in ("fp32", "bf16"):
            floor = part[f"floor 4u {dtype}"]
            share = f"{100 * floor['of blocked']:.0f} % of blocked, which keeps part of the first u"
            print(f"  floor 4u {dtype:15s} {floor['ms']:8.1f} at {floor['GFLOP/s']:.0f} GFLOP/s ({share})")
        for name, value in part.get("ratios", {}).items():
            print(f"  {name:24s} {value:8.2f} times faster than open_clip (bar: at least {BARS[name]})")
    if "memory" in result:
        print(f"\nB={result['memory batch']}: MiB beyond the inputs")
        for name, value in result["memory"]["MiB"].items():
            print(f"  {name:24s} {'not measured' if value is None else f'{value:8.0f}'}")
        for name, value in result["memory"].get("ratios", {}).items():
            print(f"  {name:24s} {value:8.3f} of open_clip (bar: at most {BARS[name]})")
    print(f"\nB={result['error batch']}: relative L2 error of the gradients against float64")
    print(f"  bars: fp32 at most {BARS['fp32 error']:.0e}; bf16 at s=100 at most {BARS['bf16 error']} of open_clip amp")
    for case, row in result["error"].items():
        print(f"  {case:18s} " + ", ".join(f"{name} {value:.2g}" for name, value in row.items()))
    if not installed("cut_cross_entropy"):
        print("\ncut-cross-entropy: not installed. memeff, inf-cl, siglip-kernel: GPU only.")


def main() -> None:
    """See the module's first line; every figure also goes into the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel", description=__doc__)
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scales", type=float, nargs="+", default=[14.3, 100.0])
    parser.add_argument("--memory-batch", type=int, default=8192, help="0 leaves memory out")
    parser.add_argument("--error-batch", type=int, default=2048)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.memory_batch, args.width)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"benchmark": "kernel", "machine": machine(["open_clip_torch"]), "bars": BARS}
    result |= {"batch": args.batch, "width": args.width, "memory batch": args.memory_batch, "error batch": args.error_batch}
    result["time"] = {str(scale): times(args.batch, args.width, args.rounds, scale) for scale in args.scales}
    if args.memory_batch:
        result["memory"] = memory(args.memory_batch, args.width)
    result["error"] = errors(args.error_batch, args.width)
    show(result)
    save(args.json, result)


if __name__ == "__main__":
    main()
