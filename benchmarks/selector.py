"""The bookkeeping of one selector: CPU of score, top-k and table update. `python -m benchmarks.selector --name dissect [--json FILE]`."""

import argparse
import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleave, machine, save, summary
from pipeline import kernels
from pipeline.config import names_in
from pipeline.selection.base import Candidates, Selector

BAR_MS = 0.3
GROUPS = 16  # different groups in turn: one group over and over would teach the branch predictor its order


class PlainLoop:
    """The published bookkeeping restated from its description: Python dictionaries by string id, one sample at a time."""

    def __init__(self, keys: list[str], history: Tensor) -> None:
        self.history = dict(zip(keys, history.tolist()))
        self.chosen: dict[str, bool] = {}

    def select(self, keys: list[str], cosine: Tensor, keep: int) -> Tensor:
        """Differential by look-up, top-k, and per sample a look whether it was chosen. The history is frozen."""
        current = torch.clamp(100 * cosine, min=0)
        history = torch.tensor([self.history[key] for key in keys], device=cosine.device)
        rows = torch.topk(history - current, keep).indices
        for i, key in enumerate(keys):
            self.chosen[key] = i in rows
        return rows


def build(name: str, size: int) -> Selector:
    """A selector past its warm-up, its table full."""
    selector = importlib.import_module(f"pipeline.selection.{name}").Config(rate=0.2).build(num_samples=size)
    selector.scores.visits.fill_(1)
    selector.scores.score.uniform_(20, 60, generator=torch.Generator().manual_seed(0))
    return selector


def groups(size: int, batch: int, width: int) -> list[tuple[Candidates, Tensor, Tensor]]:
    """Groups with their image and text features."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for step in range(GROUPS):
        slot = torch.randperm(size, generator=generator)[:batch]
        image, text = torch.nn.functional.normalize(torch.randn(2, batch, width, generator=generator), dim=2)
        fields: dict[str, Any] = {"loss": torch.rand(batch, generator=generator), "valid": torch.ones(batch, dtype=torch.bool)}
        made.append((Candidates(slot, kernels.cosine(image, text), batch // 5, sample=slot, step=step, **fields), image, text))
    return made


def run(name: str, batch: int, size: int, width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU per group, the plain loop beside them, and whether both chose the same rows."""
    selector, made = build(name, size), groups(size, batch, width)
    keys = [f"{i:09}" for i in range(size)]
    peer = PlainLoop(keys, selector.scores.score)
    named = [[keys[i] for i in group.slot.tolist()] for group, _, _ in made]
    same = all(
        set(selector.select(group).rows.tolist()) == set(peer.select(ids, group.cosine, group.keep).tolist())
        for (group, _, _), ids in zip(made, named)
    )
    turn = iter(range(10**9))
    calls = {
        "cosine of features": lambda: kernels.cosine(*made[next(turn) % GROUPS][1:]),
        f"{name}, after it": lambda: selector.select(made[next(turn) % GROUPS][0]),  # which has emptied the caches, as in a run
    }
    seconds = interleave(calls, rounds, warmup=GROUPS)
    seconds |= interleave({name: lambda: selector.select(made[next(turn) % GROUPS][0])}, rounds, warmup=GROUPS)
    seconds |= interleave({"plain loop": lambda: _turn(peer, named, made, next(turn) % GROUPS)}, rounds // 10)
    result: dict[str, Any] = {"benchmark": "selector", "name": name, "machine": machine(), "batch": batch, "samples": size}
    result["times"] = {key: summary(values) for key, values in seconds.items()}
    faster = result["times"]["plain loop"]["p50_ms"] / result["times"][name]["p50_ms"]
    return result | {"bar_ms": BAR_MS, "faster than the loop": faster, "same rows as the loop": same}


def _turn(peer: PlainLoop, named: list[list[str]], made: list[tuple[Candidates, Tensor, Tensor]], i: int) -> None:
    peer.select(named[i], made[i][0].cosine, made[i][0].keep)


def main() -> None:
    """See the module's first line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selector", description=__doc__)
    parser.add_argument("--name", default="dissect", choices=names_in("pipeline.selection"))
    parser.add_argument("--batch", type=int, default=1280)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args.name, args.batch, args.samples, args.width, args.rounds)
    print(f"{args.batch} candidates, CPU ms per group: median (p20 to p80)")
    for name, row in result["times"].items():
        print(f"  {name:20s} {row['p50_ms']:8.3f} ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})")
    same = "the same rows" if result["same rows as the loop"] else "other rows"
    print(f"  bar for {args.name}: at most {BAR_MS}; {result['faster than the loop']:.0f} times faster than the loop, which chose {same}")
    save(args.json, result)


if __name__ == "__main__":
    main()
