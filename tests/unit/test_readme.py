"""Every command of the README is run, on little data where it names much; what takes long is checked up to the point where it would start."""

import importlib
import io
import re
import shlex
import shutil
from glob import glob
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from accelerate.commands.launch import launch_command_parser

from pipeline.__main__ import parser
from pipeline.config import load
from pipeline.evaluation import guided
from pipeline.run import RunConfig
from tests.runs import DEBUG, ROOT
from tools import compare

SHELL = ("git", "cd", "open", ".")  # not ours
# README -> here; the rest of each command is as it stands there
INSTEAD = {
    "s3://bucket": "bucket",
    "01242": "00003",
    "configs/cluster/h100.yaml": "configs/cluster/cpu.yaml",
    "CONFIG2": "second.yaml",
    "CONFIG": "first.yaml",
    "--format open_clip": "--format safetensors",  # the run here has a linear tower; tests/ranks/test_export.py has the other
}


def commands() -> list[str]:
    """Each command line of the shell blocks; [parts in brackets] are options: without them all, and with each of them."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    found = []
    for line in "".join(blocks).splitlines():
        options = re.findall(r"\[(--[^\]]*)\]", line)
        plain = re.sub(r"\[--[^\]]*\]", "{}", line)
        for chosen in (None, *options):
            found += plain.format(*(option if option == chosen else "" for option in options)).split(" && ") if options else [line]
    return list(dict.fromkeys(command for command in found if shlex.split(command, comments=True)))


@pytest.fixture
def household(trained: Path, icons_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's commands speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shards = tmp_path / "bucket" / "cc12m"
    shards.mkdir(parents=True)
    for number, tar in enumerate(sorted(icons_small.glob("*.tar"))):
        shutil.copyfile(tar, shards / f"{number:05d}.tar")
    for shade in range(3):
        PIL.Image.fromarray(np.full((8, 8, 3), 80 * shade, np.uint8)).save(f"{shade}.png")
    pq.write_table(
        pa.table({"caption": ["black", "grey", "white"], "url": [f"{tmp_path}/{shade}.png" for shade in range(3)]}), "pairs.parquet"
    )
    with wds.TarWriter("labelled.tar") as writer:
        for i in range(12):
            image = io.BytesIO()
            PIL.Image.fromarray(np.full((8, 8, 3), 80 * (i % 3), np.uint8)).save(image, "PNG")
            writer.write({"__key__": f"{i:03d}", "png": image.getvalue(), "txt": f"shade {i % 3}", "cls": str(i % 3)})
    (tmp_path / "names.txt").write_text("black\ngrey\nwhite\n")
    (tmp_path / "prompts.txt").write_text("a {} square\n{}\n")
    assert run("python -m tools.make_shards tars bucket/imagenet-val --shards labelled.tar")
    for name in ("vitb16_cc12m_dissect", "NAME", "openmoji_amid"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    (tmp_path / "bucket" / "runs").symlink_to(tmp_path / "runs")
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(
            DEBUG.read_text().replace("runs/debug", f"runs/{name}").replace("data/debug/train", "bucket/cc12m-index")
        )
    return tmp_path


def run(command: str) -> bool:
    """Runs one command in this process, or as much of it as takes no training; False for a command that is not understood."""
    words = [
        path for word in shlex.split(command, comments=True) for path in (sorted(glob(word)) if "*" in word and "{" not in word else [word])
    ]
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.module and (args.config_file is None or Path(args.config_file).is_file())
        words = ["python", "-m", args.training_script, *args.training_script_args]
    if words[:4] == ["python", "-m", "pipeline", "train"]:
        return bool(load(RunConfig, words[4], words[5:]))
    if words[:4] == ["python", "-m", "pipeline", "guide"]:
        return bool(guided.configs(load(RunConfig, parser().parse_args(words[3:]).config)))
    if words[:3] == ["python", "-m", "tools.compare"]:
        return bool(compare.configs(compare.read_plan(Path(words[3])), Path(), 0))
    if words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2] if words[2] != "pipeline" else "pipeline.__main__")
        dry = ["--dry-run"] if words[2] == "slurm.launch" and "--dry-run" not in words else []
        return module.main([*words[3:], *dry]) == 0
    if words[0] == "python":
        return (ROOT / words[1]).is_file()
    if words[0] == "make":
        return f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    if words[0] == "pip":
        extras = re.search(r"\[(.*)\]", words[-1])[1].split(",")
        return all(f"\n{extra} =" in (ROOT / "setup.cfg").read_text(encoding="utf-8") for extra in extras)
    return words[0] in SHELL


def test_the_commands_of_the_readme_do_what_they_say(household: Path) -> None:
    said = commands()
    assert len(said) > 15
    for command in said:
        here = command
        for word, instead in INSTEAD.items():
            here = here.replace(word, instead)
        assert run(here), command
    assert (household / "bucket" / "pairs" / "index.parquet").is_file() and (household / "runs" / "report.html").is_file()
    assert list((household / "runs" / "vitb16_cc12m_dissect" / "evaluation").iterdir()) and (household / "OUT").is_file()
