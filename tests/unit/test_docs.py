"""What the documents say is there, and their code runs."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_the_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    scopes: list[dict] = [{} for _ in blocks]
    for block, scope in zip(blocks, scopes):
        exec(compile(block, "README.md", "exec"), scope)
    assert len(scopes[0]["rows"]) == 32 and scopes[1]["out"].delta.shape == scopes[1]["out"].p_row.shape == (2000,)


def test_every_make_target_the_documents_name_exists() -> None:
    named = {t for path in DOCUMENTS for t in re.findall(r"`make ([a-z-]+)`", path.read_text(encoding="utf-8"))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("command", ["benchmarks.selection", "benchmarks.loader", "benchmarks.end_to_end", "pipeline.__main__ curate"])
def test_the_help_of_a_command_explains_every_option_and_has_an_example(command: str, monkeypatch, capsys) -> None:
    module, *words = command.split()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    said = capsys.readouterr().out
    assert said.count(f"python -m {' '.join([module.removesuffix('.__main__'), *words])}") >= 2  # the usage, and at least one example
    assert re.findall(r"^  --", said, re.MULTILINE)
    assert not re.findall(r"^  (--\S+(?: \S+)*)\n(?!\s{20})", said, re.MULTILINE)
