"""The rules of the house that a machine can check: who imports what, that everything public says what it is for, and that help helps."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("pipeline", "tools", "slurm") for path in (ROOT / folder).rglob("*.py"))
PIPELINE = [path for path in FILES if path.relative_to(ROOT).parts[0] == "pipeline"]
PROCESSES = ("torch.distributed", "torch.multiprocessing", "deepspeed", "accelerate", "submitit")  # what knows of other processes
ALLOWED = ("pipeline/distributed/", "slurm/")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports or reaches by attribute, at any depth: `torch.distributed` in both ways."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_finds_the_imports_it_should() -> None:
    found = {name_of(path): set(imports(path)) for path in PIPELINE}
    assert any(within(name, "torch.distributed") for name in found["pipeline/distributed/comm.py"])
    assert any(within(name, "accelerate") for name in found["pipeline/distributed/engine.py"])
    assert len(found) > 40


def test_only_two_places_know_of_other_processes() -> None:
    for path in FILES:
        if not name_of(path).startswith(ALLOWED):
            for package in PROCESSES:
                assert not [name for name in imports(path) if within(name, package)], f"{name_of(path)} imports {package}"


def test_the_library_does_not_import_what_is_built_on_it() -> None:
    for path in PIPELINE:
        for package in ("tools", "benchmarks", "tests", "slurm"):
            assert not [name for name in imports(path) if within(name, package)], f"{name_of(path)} imports {package}"


def public(tree: ast.Module) -> Iterator[ast.AST]:
    """Public functions and classes of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    yield from (node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.name == "__init__.py" or ast.get_docstring(tree), f"{name_of(path)} does not say what it is for"
    silent = [node.name for node in public(tree) if not ast.get_docstring(node)]
    assert not silent, f"{name_of(path)}: no docstring: {', '.join(silent)}"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_the_commands_and_the_components() -> None:
    said = run("pipeline", "--help")
    for word in ("train", "evaluate", "report", "dissect", "open_clip", "clip"):
        assert word in said


@pytest.mark.parametrize(("command", "word"), [("train", "key.path=value"), ("evaluate", "--classes"), ("report", "--out")])
def test_every_command_has_help(command: str, word: str) -> None:
    assert word in run("pipeline", command, "--help")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from pipeline.__main__ import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
