"""Makes a run folder complete before its job is submitted: enough to start it again, and to repeat it elsewhere."""

import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, to_yaml
from pipeline.distributed import checkpoint
from pipeline.run import RunConfig
from slurm.notes import write_launch

ROOT = Path(__file__).parent.parent
CODE = ("pipeline", "slurm", "tools")


def git(*arguments: str) -> str | None:
    """What git says about the code that runs here; None where it is no checkout."""
    if not (ROOT / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def snapshot(target: Path) -> None:
    """Copies the code as it is now, so that a job that starts in a week, or again, runs what was submitted.

    Tracked and new files of the checkout, or the installed packages. submitit's RsyncSnapshot would clone the repository and needs rsync.
    """
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE)
    names = listed.split("\0") if listed else [str(path.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("*.*")]
    for name in filter(None, names):
        if (ROOT / name).is_file() and "__pycache__" not in name:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, partial / name)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def check_free(config: RunConfig) -> None:
    """Raises ConfigError when the folder holds a checkpoint of another configuration: its record would be overwritten."""
    folder = Path(config.out)
    commits = sorted(folder.glob("checkpoints/*/COMMIT"))
    if commits and (commits[-1].parent / "run.json").is_file():
        found = json.loads((commits[-1].parent / "run.json").read_text(encoding="utf-8"))
        try:
            checkpoint.agree(folder, found | {"config": config.binding()})
        except checkpoint.CheckpointError as error:
            raise ConfigError(str(error)) from None


def prepare(folder: Path, configs: dict[Path, RunConfig], crashes: int, facts: dict[str, Any]) -> Path:
    """Makes `folder` complete: code and its origin, packages, and for each run its resolved.yaml. Gives the folder of submissions.

    `configs`: run folder -> its configuration; for a sweep these lie inside of `folder`.
    """
    submissions = folder / "launch"
    submissions.mkdir(parents=True, exist_ok=True)
    snapshot(folder / "code")
    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", *CODE)
    (submissions / "changes.diff").write_text(changes or "", encoding="utf-8")
    packages = sorted({f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()}, key=str.lower)
    (submissions / "packages.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    facts = {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", "-m", "slurm.launch", *sys.argv[1:]]),
        "commit": commit and commit.strip(),
        "changed": bool(changes),
        "python": sys.version.split()[0],
        "logs": str(submissions),
    } | facts
    (submissions / "runs.json").write_text(json.dumps({"runs": [str(run) for run in configs], "crashes": crashes}), encoding="utf-8")
    for run, config in configs.items():
        run.mkdir(parents=True, exist_ok=True)
        (run / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
        write_launch(run, facts)
    return submissions
