"""Prove and measure the kernels on a GPU host in one go: every subject of `verify` and every GPU test in processes of its own
side by side (most of the time is compilation), then the tables of `bench` alone.

    python tools/gpu_suite.py --out OUT                          everything
    python tools/gpu_suite.py --out OUT --only verify --names moe logprob
    python tools/gpu_suite.py --out OUT --only verify --device cpu --names rope

Each task has a log in OUT and a deadline; what overran is ended and counts as failed. Exit code 1 unless every task passed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "packages/miles-kernels/tests/cuda"
BENCHES = ("gemm", "attention", "moe", "logprob", "sampling", "fp8", "model-0.6b", "model-8b")
KINDS = ("verify", "tests", "bench")


class Task(NamedTuple):
    """One process."""

    name: str
    argv: Sequence[str]


class Result(NamedTuple):
    """How a task ended: its exit code, or None where it overran its deadline."""

    task: Task
    code: int | None
    seconds: float
    last: str
    """the last line it printed"""


def run(task: Task, out: Path, deadline_s: float) -> Result:
    """Run a task, its output into `OUT/NAME.txt`; at the deadline its whole process group is ended."""
    log = out / f"{task.name.replace(' ', '_')}.txt"
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            list(task.argv), cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        code: int | None = None
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Result(task, code, time.monotonic() - began, lines[-1] if lines else "")


def run_all(tasks: Sequence[Task], out: Path, deadline_s: float, workers: int) -> list[Result]:
    """Run tasks, `workers` at a time, and say how each one ended as soon as it has."""

    def one(task: Task) -> Result:
        result = run(task, out, deadline_s)
        how = "passed" if result.code == 0 else "OVERRAN" if result.code is None else f"FAILED ({result.code})"
        print(f"{how:12} {result.seconds:6.1f} s  {task.name}: {result.last}", flush=True)
        return result

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, tasks))


def verify_tasks(device: str, names: Sequence[str], out: Path) -> list[Task]:
    """One task per subject, those that take longest first."""
    from miles_kernels.verify.run import GPU_OPS, MODELS, OPS

    every = sorted((*MODELS, *(GPU_OPS if device == "cuda" else OPS)), key=lambda name: "moe" not in name)
    argv = [sys.executable, "-m", "miles_kernels.verify"]
    return [
        Task(f"verify {name}", [*argv, name, "--device", device, "--rows", "--out", str(out / name.replace(" ", "_"))])
        for name in names or every
    ]


def test_tasks() -> list[Task]:
    """One task per file of GPU tests."""
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    return [Task(f"tests {path.stem}", [*argv, str(path)]) for path in sorted(TESTS.glob("test_*_cuda.py"))]


def bench_tasks(out: Path) -> list[Task]:
    """One task per table, so that one which overruns takes no other with it."""
    argv = [sys.executable, "-m", "miles_kernels.bench"]
    return [Task(f"bench {name}", [*argv, name, "--out", str(out / f"bench-{name}")]) for name in BENCHES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, reports and tables")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--names", nargs="+", default=[], help="subjects to verify (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to verify")
    parser.add_argument("--workers", type=int, default=10, help="processes side by side while nothing is timed")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for each task")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    together = verify_tasks(options.device, options.names, out) if "verify" in options.only else []
    together += test_tasks() if "tests" in options.only else []
    results = run_all(together, out, options.deadline, options.workers)
    if "bench" in options.only:
        results += run_all(bench_tasks(out), out, options.deadline, workers=1)
    failed = [result.task.name for result in results if result.code != 0]
    print(f"{len(results) - len(failed)} of {len(results)} passed" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
