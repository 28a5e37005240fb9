"""The claim of each further system, measured over seeds at a size that two cores can train; what came out is in docs/systems.md.

python -m benchmarks.systems {sfa_vivit,cromss,notellm2} --seeds 3 [--json FILE]

`benchmarks/systems_<name>.py` offers `run(seeds)`, {seed: {row: {column: number}}} for a sequence of seeds, and may offer `bars(results)`,
the results of all seeds in order -> [{"what": ..., "holds": bool, ...}]. It is called for one seed at a time and the file is written after
each: a run that was cut off goes on after the seeds that its file holds.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, save, table

SYSTEMS = sorted(path.stem.removeprefix("systems_") for path in Path(__file__).parent.glob("systems_*.py"))


def main(arguments: list[str]) -> int:
    """Runs and prints; the exit code is 0 whatever comes out, the table says it."""
    parser = argparse.ArgumentParser("benchmarks.systems", description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 and on")
    parser.add_argument("--json", help="write all numbers there; seeds that it holds are not run again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    system = importlib.import_module(f"benchmarks.systems_{options.system}")
    facts: dict[str, Any] = {"system": options.system, "machine": machine(), "cpu_seconds": {}, "results": {}} | _begun(options)
    for seed in range(options.seeds):
        if str(seed) not in facts["results"]:
            began = time.process_time()
            facts["results"] |= {str(which): rows for which, rows in system.run([seed]).items()}
            facts["cpu_seconds"][str(seed)] = time.process_time() - began
            save(options.json, facts)
    results = [facts["results"][str(seed)] for seed in range(options.seeds)]
    print(f"{options.system}, seeds 0 to {options.seeds - 1}, mean ± standard deviation\n{table(results)}")
    facts["bars"] = system.bars(results) if hasattr(system, "bars") else []
    for bar in facts["bars"]:
        print(f"{'holds' if bar['holds'] else 'FAILS'}  {bar['what']}")
    save(options.json, facts)
    return 0


def _begun(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run of this system left in the file; its machine too, for its seconds are part of the result."""
    if options.json is None or not Path(options.json).is_file():
        return {}
    found = json.loads(Path(options.json).read_text(encoding="utf-8"))
    if found.get("system") != options.system:
        raise SystemExit(f"--json {options.json}: holds {found.get('system') or 'something else'}, not {options.system}; name another file")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
