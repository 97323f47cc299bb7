"""Combine the coverage data of a test run and hold the numeric core to 90 % of its lines.

tools/cover.py      after `pytest --cov`
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = 90.0
GATED = {
    "kernels reference ops": "*/miles_kernels/ops/*",
    "wire": "*/miles_rollout/wire.py",
    "algorithm": "*/miles_core/algorithm/*",
    "data": "*/miles_core/data/*",
}


def report(pattern: str, *arguments: str) -> str:
    """The coverage report of the files that match, as text."""
    command = [sys.executable, "-m", "coverage", "report", f"--include={pattern}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def main() -> None:
    if not (ROOT / ".coverage").exists():
        sys.exit("no .coverage file: run pytest with --cov first")
    low = []
    for name, pattern in GATED.items():
        total = re.search(r"(\d+(?:\.\d+)?)\s*$", report(pattern, "--format=total", "--precision=1"))
        covered = float(total.group(1)) if total else 0.0
        print(f"coverage: {name} {covered:.1f} %")
        if covered < MINIMUM:
            low.append(
                f"{name} is covered to {covered:.1f} %, {MINIMUM:.0f} % is the least:\n" + report(pattern, "--show-missing")
            )
    if low:
        sys.exit("\n".join(low))


if __name__ == "__main__":
    main()
