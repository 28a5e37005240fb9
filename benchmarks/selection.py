"""Does selection help? The demo's recipe over several seeds: every selector after the same warm-up, with the same number of trained pairs.

    python -m benchmarks.selection --seeds 3 [--selectors dissect,random,...] [--json FILE] [key.path=value ...]

Runs are real training runs in `--out`; started again, finished ones are not repeated. `random+time` is random given as many more visits as
fit into the wall-clock that dissect took in this very comparison: what the scoring pass costs, spent on training instead.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine, save

CONFIG = "configs/pretrain/icons.yaml"
VISITS = 24


def run(name: str, seed: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """Trains and evaluates one run in processes of its own; gives its result.json. Raises RuntimeError with the end of its log."""
    folder = out / f"{name}-seed{seed}"
    commands = (["train", CONFIG, f"out={folder}", f"seed={seed}", *overrides], ["evaluate", str(folder), "--quiet"])
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "pipeline", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The numbers that are compared, shares in percent."""
    selection = result["selection"] or {}
    return {
        "top1": 100 * result["zero_shot"]["top1"],
        "times_chance": result["zero_shot"]["top1"] / result["zero_shot"]["chance"],
        "image_to_text_r1": 100 * result["retrieval"]["image_to_text"]["r1"],
        "text_to_image_r1": 100 * result["retrieval"]["text_to_image"]["r1"],
        "probe": 100 * result["linear_probe"]["top1"],
        "precision": 100 * (selection.get("precision") or float("nan")),
        "precision_first": 100 * (selection.get("precision_first") or float("nan")),
        "precision_last": 100 * (selection.get("precision_last") or float("nan")),
        "auc": selection.get("auc") or float("nan"),
        "trained": result["samples"]["trained"],
        "seconds": result["seconds"]["total"],
    }


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds, one line a selector."""
    keys = ("top1", "text_to_image_r1", "probe", "precision", "precision_first", "precision_last", "auc", "trained", "seconds")
    lines = ["selector        " + "".join(f"{key:>18}" for key in keys)]
    for name, seeds in rows.items():
        cells = []
        for key in keys:
            values = [seed[key] for seed in seeds]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}".rjust(18))
        lines.append(f"{name:<16}" + "".join(cells))
    return "\n".join(lines)


def paired(rows: dict[str, list[dict[str, float]]], key: str, one: str, other: str) -> dict[str, Any]:
    """Differences seed by seed: the initial weights, the noise and the order are the same in both."""
    differences = [a[key] - b[key] for a, b in zip(rows[one], rows[other])]
    return {"mean": statistics.mean(differences), "wins": sum(d > 0 for d in differences), "of": len(differences), "all": differences}


def main() -> None:
    """Prints the table and the paired differences to random."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--selectors", default="dissect,random,random+time,clip_score,small_loss,big_loss,keep_all")
    arguments.add_argument("--out", type=Path, default=Path("runs/benchmarks/selection"))
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = arguments.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for name in args.selectors.split(","):
        rows[name] = []
        for seed in range(args.seeds):
            more = []
            if name == "random+time":
                # the median over seeds: on a shared machine a single run's seconds say as much about the neighbours
                extra = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rows["dissect"], rows["random"]))
                more = [f"visits={VISITS * extra:.1f}"]
            result = run(name, seed, [f"selector.name={name.partition('+')[0]}", *more, *args.overrides], args.out)
            rows[name].append(figures(result))
            print(f"{name} seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in rows[name][-1].items()), flush=True)
    print(table(rows))
    compared = {}
    for name in rows:
        if name != "dissect" and "dissect" in rows:
            compared[name] = {key: paired(rows, key, "dissect", name) for key in ("top1", "text_to_image_r1", "precision", "seconds")}
            print(f"dissect - {name}: " + "; ".join(f"{k} {v['mean']:+.2f} ({v['wins']}/{v['of']})" for k, v in compared[name].items()))
    save(args.json, {"runs": rows, "dissect_minus": compared, "overrides": args.overrides} | machine(["accelerate", "open_clip_torch"]))


if __name__ == "__main__":
    main()
