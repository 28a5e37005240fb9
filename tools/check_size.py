"""Keeps files under 300 lines and functions under 60: prints what is over, and fails then."""

import ast
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 300, 60
FOLDERS = ("pipeline", "slurm", "tools", "tests", "benchmarks")


def over(path: Path) -> list[str]:
    """One line for each budget that a file exceeds."""
    text = path.read_text(encoding="utf-8")
    found = [f"{path}: {text.count(chr(10))} lines, at most {FILE_LINES}"] if text.count("\n") > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return found


def main() -> int:
    """Checks the whole tree."""
    found = [line for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py")) for line in over(path)]
    print("\n".join(found) or "every file and function is within its budget")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
