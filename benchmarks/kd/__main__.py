"""Runs one experiment over paired seeds and prints what every method reached, and every comparison that was promised.

python -m benchmarks.kd {digits,collapse,split,openmoji,tuxpaint,pretrained,compound} --seeds 10 [--first 100] [--json FILE]
python -m benchmarks.kd speed [--rounds 40] [--json FILE]
"""

import argparse
import importlib
import sys
import time
from typing import Any

import torch

from benchmarks.common import machine, save, table
from pipeline.record.compared import paired

EXPERIMENTS = ("digits", "collapse", "split", "openmoji", "tuxpaint", "pretrained", "compound")


def judged(bars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each comparison with its mean and wins, and whether it holds: the margin is passed in the promised share of seeds, where no share
    is promised by the mean; where there is nothing promised at all it is shown and not judged."""
    found = []
    for bar in bars:
        margin, share = bar["margin"], bar["share"]
        _, mean, _, wins = paired(bar["differences"], margin)
        holds = wins >= share * len(bar["differences"]) if share is not None else mean >= margin if margin > 0 else None
        found.append(bar | {"mean": mean, "wins": wins, "holds": holds})
    return found


def main(arguments: list[str]) -> int:
    """Runs and prints; the exit code is 0 whatever comes out, the table says it."""
    parser = argparse.ArgumentParser("benchmarks.kd", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "speed"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=100, help="the first seed; 100 and up were used for no choice of settings")
    parser.add_argument("--rounds", type=int, default=40, help="speed: steps of each method")
    parser.add_argument("--json", help="write all numbers there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.experiment == "speed":
        from benchmarks.kd.speed import report

        return report(options.rounds, options.json)
    experiment, began = importlib.import_module(f"benchmarks.kd.{options.experiment}"), time.perf_counter()
    results = []
    for seed in range(options.first, options.first + options.seeds):
        results.append(experiment.run(seed))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    comparisons = judged(experiment.bars(results))
    print(
        f"{options.experiment}, seeds {options.first} to {options.first + options.seeds - 1}, mean ± standard deviation\n{table(results)}"
    )
    for bar in comparisons:
        over = f" by more than {bar['margin']:g}" if bar["margin"] else ""
        held = {None: "", True: "  holds", False: "  FAILS"}[bar["holds"]]
        print(f"{bar['what'] + over:54} {bar['wins']}/{len(results)}  mean {bar['mean']:+.1f}{held}")
    seeds = [options.first, options.first + options.seeds - 1]
    facts = {"experiment": options.experiment, "seeds": seeds, "machine": machine(["scikit-learn"]), "results": results}
    save(options.json, facts | {"paired": comparisons, "seconds": time.perf_counter() - began})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
