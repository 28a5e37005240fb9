"""Does a run that loses its machines end as good as one that does not? 4 ranks, killed, 2 ranks, killed, 1 rank, against other seeds.

    python -m benchmarks.elastic [--seeds 3] [--out DIR] [--json FILE] [key.path=value ...]

configs/pretrain/icons_small.yaml with four selection groups, on the shards of `make data`. Seed 0 twice, elastic and uninterrupted, then
uninterrupted runs of as many other seeds: their spread is what the elastic run may differ by. A kill is SIGKILL to every rank, in the
middle of a step. Real runs in `--out`; started again, finished ones are not repeated.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.common import machine, save
from benchmarks.selection import figures

CONFIG = "configs/pretrain/icons_small.yaml"
OPTIONS = ["data.groups=4", "checkpoint.every=20"]
RANKS = {4: 1 / 3, 2: 2 / 3}  # ranks -> share of the steps after which they are killed; 1 rank goes to the end
COMPARED = ("top1", "i2t_r1", "t2i_r1", "precision")


def last_step(folder: Path) -> int:
    """The newest step that a run has logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def start(rank: int, ranks: int, port: int, command: list[str], log: Path) -> subprocess.Popen:
    """One rank, with the variables that torchrun sets."""
    world = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    with log.open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {key: str(value) for key, value in world.items()})


def train_and_kill(folder: Path, ranks: int, share: float, overrides: list[str]) -> int:
    """Trains until a share of the steps is done and kills every rank. Gives the step."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command, log = [sys.executable, "-m", "pipeline", "train", CONFIG, f"out={folder}", "seed=0", *overrides], folder / "elastic.log"
    children, facts = [start(rank, ranks, port, command, log) for rank in range(ranks)], folder / "facts.json"
    try:
        while all(child.poll() is None for child in children):
            with suppress(OSError, ValueError):  # not written yet
                if (step := last_step(folder)) >= share * json.loads(facts.read_text(encoding="utf-8"))["steps"]:
                    return step
            time.sleep(0.2)
    finally:
        for child in children:
            child.kill()
            child.wait()
    raise RuntimeError(f"{ranks} ranks ended before they were killed: {log}")


def finish(folder: Path, seed: int, overrides: list[str]) -> dict[str, float | None]:
    """Trains to the end on one rank and evaluates, in processes of its own. Raises RuntimeError with the end of the log."""
    for command in (["train", CONFIG, f"out={folder}", f"seed={seed}", *overrides], ["evaluate", str(folder), "--quiet"]):
        done = subprocess.run([sys.executable, "-m", "pipeline", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return figures(json.loads((folder / "result.json").read_text(encoding="utf-8")))


def main() -> None:
    """Prints every run, and the elastic one's distance from the other seeds' mean in their standard deviations."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path("runs/benchmarks/elastic"))
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = arguments.parse_args()
    options = [*OPTIONS, *args.overrides]
    elastic, kills = args.out / "elastic-seed0", {}
    elastic.mkdir(parents=True, exist_ok=True)
    if not (elastic / "result.json").is_file():
        for ranks, share in RANKS.items():
            kills[ranks] = train_and_kill(elastic, ranks, share, options)
            print(f"{ranks} ranks: killed after step {kills[ranks]}", flush=True)
    rows = {"elastic, seed 0": finish(elastic, 0, options)}
    for seed in range(args.seeds + 1):
        rows[f"uninterrupted, seed {seed}"] = finish(args.out / f"whole-seed{seed}", seed, options)
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{key} {row[key]:.2f}" for key in COMPARED), flush=True)
    found = {}
    for key in COMPARED:
        others = [row[key] for name, row in rows.items() if not name.endswith("seed 0")]
        mean, spread = statistics.mean(others), statistics.stdev(others)
        found[key] = {"elastic": rows["elastic, seed 0"][key], "others": others, "mean": mean, "spread": spread}
        print(f"{key}: {rows['elastic, seed 0'][key]:.2f}, other seeds {mean:.2f} ± {spread:.2f}")
    save(args.json, {"killed_after": kills, "runs": rows, "compared": found, "overrides": options} | machine(["accelerate"]))


if __name__ == "__main__":
    main()
