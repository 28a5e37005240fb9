"""The contrastive loss against its peers on a CPU: time, memory and error side by side. `python -m benchmarks.kernel [--json FILE] [--plot PNG]`.

Figures for a GPU are benchmarks.gpu's.
"""

import argparse
import itertools
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import extra_memory, interleave, machine, ratio, save, summary
from benchmarks.peers import PACKAGES, Loss, ours, peers, step
from pipeline.kernels import clip_loss

# (ours, peer): how many times faster at s = 14.3, by width; the last line is for s = 100
TIME_BARS = {
    ("blocked bf16", "open_clip amp"): {512: 2.6, 768: 2.3},
    ("blocked bf16", "open_clip fp32"): {512: 5.5},
    ("blocked bf16", "cut-cross-entropy bf16"): {512: 1.45},
    ("blocked fp32", "open_clip fp32"): {512: 1.7, 768: 1.6},
}
BARS = {"bf16 time at s=100": 1.2, "memory": 0.21, "fp32 error": 1e-6, "bf16 error of open_clip amp's at s=100": 0.65}
MEMORY = ("blocked bf16", "blocked fp32", "open_clip amp", "open_clip fp32")
PEER_ROWS = 8192  # the most rows at which a peer that stores the square is asked for its memory


def losses(scale: float) -> dict[str, Loss]:
    """Name -> loss, softmax first."""
    found = ours("cpu") | peers("cpu", scale)
    return dict(sorted(found.items(), key=lambda item: not item[1].exact))


def inputs(batch: int, width: int, matched: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows on the bfloat16 grid, so that every loss gets the same numbers; `matched` mixes each image into its text."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = (normalize(torch.randn(batch, width, generator=generator)) for _ in range(2))
    return tuple(rows.bfloat16().float() for rows in (image, normalize(matched * image + noise)))


def times(batch: int, width: int, rounds: int, scale: float) -> dict[str, Any]:
    """CPU milliseconds forward and backward, ratios to the peers, and the floor of four products measured beside them."""
    image, text = inputs(batch, width, 0.0)
    found = losses(scale)
    calls: dict[str, Any] = {name: lambda loss=loss: step(loss, image, text, torch.tensor(scale)) for name, loss in found.items()}
    half, square = [rows.bfloat16() for rows in (image, text)], torch.empty(batch, batch)
    half_square = square.bfloat16()
    calls["product fp32"] = lambda: torch.mm(image, text.T, out=square)
    calls["product bf16"] = lambda: torch.mm(half[0], half[1].T, out=half_square)
    seconds = interleave(calls, rounds)
    result: dict[str, Any] = {"batch": batch, "width": width, "scale": scale, "times": {n: summary(t) for n, t in seconds.items()}}
    for name, loss in found.items():
        row = result["times"][name]
        # on the four products that an exact loss without storage needs, whoever does more
        row["GFLOP/s on 4u"] = 8 * batch * batch * width / row["p50_ms"] / 1e6
        product = result["times"]["product bf16" if loss.dtype == torch.bfloat16 else "product fp32"]["p50_ms"]
        row["share of the ceiling"] = 4 * product / row["p50_ms"]
    result["ratios"] = {
        f"{mine} over {peer}": ratio(seconds[peer], seconds[mine])
        for mine in found for peer in found if mine.startswith("blocked") and not peer.startswith("blocked") and found[mine].exact == found[peer].exact
    }  # fmt: skip
    return result


def memory(name: str, batches: list[int], width: int) -> dict[str, float | None]:
    """MiB beyond the inputs (gradients counted) by batch, each in a process of its own."""
    found = {}
    for batch in (batch for batch in batches if name.startswith("blocked") or batch <= PEER_ROWS):
        command = [sys.executable, "-m", "benchmarks.kernel", "--child", name, "--batch", str(batch), "--width", str(width)]
        found[str(batch)] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def child(name: str, batch: int, width: int) -> None:
    """The body of `memory`'s process: libraries warmed on small rows, then one step."""
    torch.set_num_threads(1)
    loss, scale = losses(14.3)[name], torch.tensor(14.3)
    step(loss, *inputs(256, width, 0.0), scale)
    image, text = (rows.to(loss.dtype).requires_grad_() for rows in inputs(batch, width, 0.0))
    print(json.dumps(extra_memory(lambda: loss.call(image, text, scale.requires_grad_()).backward())))


def slopes(found: dict[str, float | None], width: int) -> dict[str, float]:
    """Bytes per row between the batches: constant where memory is O(BD), growing where it is O(B^2)."""
    points = [(int(batch), value) for batch, value in found.items() if value is not None]
    return {f"{b0} to {b1}": (m1 - m0) * 2**20 / (b1 - b0) for (b0, m0), (b1, m1) in itertools.pairwise(points)}


def errors(batch: int, width: int, matched: float, scale: float) -> dict[str, dict[str, float]]:
    """Relative L2 error against float64 on the same rows: gradients, per-sample loss, p_row and p_col."""
    image, text = inputs(batch, width, matched)
    exact = [rows.double().requires_grad_() for rows in (image, text)]
    truth = clip_loss(*exact, scale, impl="reference")
    truth.loss.backward()
    grads = torch.cat([rows.grad for rows in exact])
    result: dict[str, dict[str, float]] = {}
    for name, loss in losses(scale).items():
        if loss.exact:
            found = torch.cat(step(loss, image, text, torch.tensor(scale))[1:])
            result[name] = {"gradients": _error(found, grads)}
    names = ("per_sample", "p_row", "p_col")
    for name in ("blocked bf16", "blocked fp32"):
        rows = [value.to(losses(scale)[name].dtype) for value in (image, text)]
        found = clip_loss(*rows, scale, impl="blocked")
        result[name] |= {key: _error(getattr(found, key), getattr(truth, key)) for key in names}
    if "open_clip amp" in result:
        # what logits in bfloat16 give, as autocast leaves them
        logits = (scale * image.bfloat16() @ text.bfloat16().T).float()
        row, col = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
        theirs = dict(zip(names, (-(row + col) / 2, row.exp(), col.exp())))
        result["open_clip amp"] |= {key: _error(value, getattr(truth, key)) for key, value in theirs.items()}
    return result


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def show(result: dict[str, Any]) -> None:
    """Figures beside their bars."""
    for part in result["time"]:
        print(f"\nB={part['batch']} D={part['width']} s={part['scale']}, forward and backward, CPU ms: median (p20 to p80)")
        for name, row in part["times"].items():
            rate = (
                f"{row['GFLOP/s on 4u']:6.0f} GFLOP/s on 4u, {100 * row['share of the ceiling']:3.0f} %" if "GFLOP/s on 4u" in row else ""
            )
            print(f"  {name:24s} {row['p50_ms']:8.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f}) {rate}")
        for (mine, peer), bars in TIME_BARS.items():
            found = part["ratios"].get(f"{mine} over {peer}")
            bar = bars.get(part["width"]) if part["scale"] < 20 else BARS["bf16 time at s=100"]
            if found and bar:
                print(f"  {mine} {found:.2f} times faster than {peer} (bar: {bar})")
    for name, row in result.get("memory", {}).items():
        print(f"\n{name}: MiB beyond the inputs {row['MiB']}; bytes per row { ({k: round(v) for k, v in row['slope'].items()}) }")
    for name, value in result.get("memory ratios", {}).items():
        print(f"{name} of open_clip's at B={PEER_ROWS}: {value:.3f} (bar: at most {BARS['memory']})")
    for case, row in result["error"].items():
        print(f"\n{case}: relative L2 error against float64")
        for name, found in row.items():
            print(f"  {name:24s} " + ", ".join(f"{key} {value:.2g}" for key, value in found.items()))
        if "open_clip amp" in row:
            against = {key: row["blocked bf16"][key] / value for key, value in row["open_clip amp"].items()}
            print("  blocked bf16 of open_clip amp's: " + ", ".join(f"{key} {value:.2f}" for key, value in against.items()))


def plot(result: dict[str, Any], path: str) -> None:
    """Time and memory over the batch, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = [part for part in result["time"] if part["scale"] < 20 and part["width"] == result["time"][0]["width"]]
    for name in (name for name in parts[0]["times"] if "sigmoid" not in name):
        left.loglog([part["batch"] for part in parts], [part["times"][name]["p50_ms"] for part in parts], marker="o", label=name)
    for name, row in result.get("memory", {}).items():
        right.loglog([int(batch) for batch in row["MiB"]], list(row["MiB"].values()), marker="o", label=name)
    for axes, title in ((left, "CPU ms, forward and backward"), (right, "MiB beyond the inputs")):
        axes.set(title=f"{title}, D={parts[0]['width']}", xlabel="batch")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """See the module's first line; every figure also goes into the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel", description=__doc__)
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--plot", help="draw time and memory over the batch here (PNG)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, nargs="+", default=[512])
    parser.add_argument("--scales", type=float, nargs="+", default=[14.3, 100.0])
    parser.add_argument("--memory-batch", type=int, nargs="*", default=[2048, 8192], help="none leaves memory out")
    parser.add_argument("--error-batch", type=int, default=2048)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.batch[0], args.width[0])
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"benchmark": "kernel", "machine": machine(PACKAGES), "bars": BARS}
    result["time"] = [times(b, d, args.rounds, s) for d in args.width for b in args.batch for s in args.scales]
    if args.memory_batch:
        found = {name: memory(name, args.memory_batch, args.width[0]) for name in MEMORY if name in losses(14.3)}
        result["memory"] = {name: {"MiB": row, "slope": slopes(row, args.width[0])} for name, row in found.items()}
        at = str(PEER_ROWS)
        pairs = [(mine, peer) for mine, peer in zip(MEMORY[:2], MEMORY[2:]) if found.get(peer, {}).get(at)]
        result["memory ratios"] = {mine: found[mine][at] / found[peer][at] for mine, peer in pairs}
    kinds = {"random": 0.0, "matched": 0.25}
    result["error"] = {f"{k}, s={s}": errors(args.error_batch, args.width[0], m, s) for k, m in kinds.items() for s in (14.3, 100.0)}
    show(result)
    save(args.json, result)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
