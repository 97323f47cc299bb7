"""Keep files under 600 lines and functions under 100; both limits are hard, and both are about twice what reads well.

tools/sizes.py [--top N]      with --top, list the N largest files and functions as well
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE = 600
MAX_FUNCTION = 100


def python_files() -> list[Path]:
    """Python files git knows or would add, tests and tools included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.split() if (path := ROOT / name).exists()]


def measure(path: Path) -> Iterator[tuple[int, int, str]]:
    """(lines, limit, name) of the file and of each of its functions."""
    text = path.read_text()
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    yield text.count("\n"), MAX_FILE, name
    for node in ast.walk(ast.parse(text, filename=name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, MAX_FUNCTION, f"{name}:{node.lineno} {node.name}()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top", type=int, default=0)
    options = parser.parse_args()
    sizes = [entry for path in python_files() for entry in measure(path)]
    for limit in (MAX_FILE, MAX_FUNCTION):
        for lines, _, name in sorted((entry for entry in sizes if entry[1] == limit), reverse=True)[: options.top]:
            print(f"{lines:5d}  {name}")
    too_long = [
        f"{name}: {lines} lines, at most {limit}: find the two things in it" for lines, limit, name in sizes if lines > limit
    ]
    if too_long:
        sys.exit("\n".join(too_long))
    print(f"sizes: {sum(limit == MAX_FILE for _, limit, _ in sizes)} files, all within bounds")


if __name__ == "__main__":
    main()
