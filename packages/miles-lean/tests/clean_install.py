"""From nothing to a verdict, timed: `python packages/miles-lean/tests/clean_install.py [WHEEL]`.

A new virtual environment, `pip install WHEEL[embedded]` without pip's cache, the first check with an empty cache of our own
(it compiles the prelude), a refused check, ten more. Prints JSON: wall seconds, processor seconds of each part, load.
Without WHEEL one is built first, uncounted. Exit code 1 when a verdict is wrong.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
HOLDS, FAILS = "example : 2 + 2 = 4 := rfl\n", "example : 2 + 2 = 5 := rfl\n"


def timed(command: list[str], env: dict[str, str]) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Run a command; its wall and processor seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(time.monotonic() - started, 2), "cpu_s": round(cpu, 2)}, done


def measure(wheel: Path, folder: Path) -> dict[str, Any]:
    """All steps, in an empty folder. Raises RuntimeError when one fails."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "MILES"))}
    env |= {"MILES_LEAN_CACHE": str(folder / "cache")}
    report: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    steps = {
        "venv": [sys.executable, "-m", "venv", str(folder / "env")],
        "install": [str(folder / "env/bin/pip"), "install", "-q", "--no-cache-dir", f"{wheel}[embedded]"],
    }
    for name, command in steps.items():
        report[name], done = timed(command, env)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    (folder / "holds.lean").write_text(HOLDS)
    (folder / "fails.lean").write_text(FAILS)
    check = [str(folder / "env/bin/miles-lean"), "check"]
    report["first_check"], done = timed([*check, str(folder / "holds.lean")], env)
    right = done.returncode == 0 and "accepted" in done.stdout
    report["refused_check"], done = timed([*check, str(folder / "fails.lean")], env)
    right = right and done.returncode == 1 and "2 + 2 = 5" in done.stdout + done.stderr
    later = [timed([*check, str(folder / "holds.lean")], env)[0] for _ in range(10)]
    report["later_checks"] = {key: sorted(row[key] for row in later)[5] for key in ("wall_s", "cpu_s")}
    parts = [report[name] for name in ("venv", "install", "first_check", "refused_check")]
    report["in_all"] = {key: round(sum(part[key] for part in parts), 2) for key in ("wall_s", "cpu_s")}
    return report | {"right": right, "load_after": os.getloadavg()[0]}


def main() -> int:
    """0 when both verdicts were right."""
    with tempfile.TemporaryDirectory(prefix="miles-lean-clean-") as folder:
        if len(sys.argv) > 1:
            wheel = Path(sys.argv[1]).resolve()
        else:
            build = [str(Path(sys.executable).with_name("uv")), "build", "-q", "--wheel", "--out-dir", folder, str(PACKAGE)]
            subprocess.run(build, check=True, timeout=300)
            wheel = next(Path(folder).glob("*.whl"))
        empty = Path(folder, "new")
        empty.mkdir()
        report = measure(wheel, empty)
    print(json.dumps(report, indent=1))
    return int(not report["right"])


if __name__ == "__main__":
    sys.exit(main())
