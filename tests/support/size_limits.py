"""Fails when a module or a function grows beyond the limits: 500 lines and 70 lines.

Run as `python -m tests.support.size_limits`; part of `make lint`. Generated code and data are not counted.
"""

import ast
import sys
from pathlib import Path

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
FOLDERS = ("core", "controlplane", "nodeagent", "router", "clients/python", "deploy", "tests")


def _excesses(path: Path) -> list[str]:
    source = path.read_text()
    found = []
    lines = len(source.splitlines())
    if lines > MODULE_LINES_MAX:
        found.append(f"{path}: {lines} lines, at most {MODULE_LINES_MAX}: split the module")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES_MAX}"
                )
    return found


def main() -> None:
    """Prints every excess and exits with 1 where there is one."""
    found = [
        excess
        for folder in FOLDERS
        for path in sorted(Path(folder).rglob("*.py"))
        if "_pb2" not in path.name
        for excess in _excesses(path)
    ]
    sys.stdout.write("".join(f"{line}\n" for line in found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
