"""`miles-lean bench`: checks per second of each stage, latency, memory over many checks, and how fast a worker comes back."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.backends.discover import find_backend
from miles_lean.honest import HonestProof, honest_proofs
from miles_lean.judge import bench as judge_bench
from miles_lean.workers.lsp import LspWorker
from miles_lean.workers.pool import Pool
from miles_lean.workers.process import rss_bytes

_DEADLINE_S = 30.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--backend", help="embedded or toolchain")
    parser.add_argument("--workers", type=int, help="workers of each stage (default: one per core)")
    parser.add_argument("--checks", type=int, default=1000, help="checks of the fast stage (default 1000)")
    parser.add_argument("--isolated", type=int, default=200, help="checks of the isolated stage (default 200)")
    parser.add_argument("--judged", type=int, default=300, help="judged verifications (default 300)")
    parser.add_argument("--restarts", type=int, default=10, help="worker restarts to time (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """0 measured, 1 a proof that holds was refused, 3 no Lean."""
    counts = (options.checks, options.isolated, options.judged, options.restarts)
    if min(counts) < 0 or (options.workers is not None and options.workers < 1):
        raise ValueError("counts must not be negative, and --workers at least 1")
    try:
        backend = find_backend(options.backend)
        report = asyncio.run(measure(backend, options.workers, *counts))
    except RuntimeError as error:
        print(f"miles-lean: {error}", file=sys.stderr)
        return 3
    print(json.dumps(report) if options.json else "\n".join(f"{key:<28} {value}" for key, value in report.items()))
    return 1 if report["false_rejects"] else 0


async def measure(
    backend: Backend, workers: int | None, checks: int, isolated: int, judged: int, restarts: int
) -> dict[str, Any]:
    """All measurements: fast stage, isolated stage, judge, restarts. Times in seconds or milliseconds as named."""
    cores = len(os.sched_getaffinity(0))
    workers = workers or cores
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {cores} cores, Python {platform.python_version()}",
        "lean": f"{backend.capabilities.version} ({backend.capabilities.name}), identity {backend.capabilities.identity[:12]}",
        "workers": workers,
        "load_before": os.getloadavg()[0],
        "false_rejects": [],
    }
    proofs = honest_proofs()
    if checks and backend.capabilities.can_lsp:
        async with Pool(backend, num_fast=workers, num_isolated=0) as pool:
            report |= await _stage(pool, "fast", checks, workers, proofs, report["false_rejects"], _elaborate)
    if isolated:
        async with Pool(backend, num_fast=0, num_isolated=workers) as pool:
            report |= await _stage(pool, "isolated", isolated, workers, proofs, report["false_rejects"], _compile)
    if judged and backend.capabilities.can_replay:
        report |= await asyncio.to_thread(judge_bench.measure, backend, workers, judged, report["false_rejects"])
    if restarts and backend.capabilities.can_lsp:
        times = sorted(await asyncio.to_thread(_restart_times, backend, restarts))
        report |= {"restart_ms_median": _ms(times[len(times) // 2]), "restart_ms_max": _ms(times[-1])}
    return report | {"load_after": os.getloadavg()[0]}


async def _elaborate(pool: Pool, source: str, folder: Path) -> CompileResult:
    return await pool.elaborate(source, deadline=_DEADLINE_S)


async def _compile(pool: Pool, source: str, folder: Path) -> CompileResult:
    return await pool.compile(source, out=folder / "Submission.olean", deadline=_DEADLINE_S)


async def _stage(
    pool: Pool,
    name: str,
    num_checks: int,
    lanes: int,
    proofs: tuple[HonestProof, ...],
    refused: list[str],
    call: Callable[[Pool, str, Path], Awaitable[CompileResult]],
) -> dict[str, Any]:
    """Run checks in as many lanes as there are workers. Every source differs from all before it, as samples do."""
    left: Iterator[int] = iter(range(num_checks))
    seconds: list[float] = []
    memory = [_memory(pool)]

    async def lane(folder: Path) -> None:
        folder.mkdir()
        for index in left:
            proof = proofs[index % len(proofs)]
            source = proof.source.replace(f"theorem {proof.name} ", f"theorem {proof.name}_{index} ", 1)
            started = time.monotonic()
            result = await call(pool, source, folder)
            seconds.append(time.monotonic() - started)
            if result.outcome != "ok":
                refused.append(f"{name}: {proof.name}: {result.outcome} {result.detail}")
            if index % 100 == 99:
                memory.append(_memory(pool))

    with tempfile.TemporaryDirectory(prefix="miles-lean-bench-") as folder:
        # One uncounted round, so that every page that all checks need is in memory.
        await asyncio.gather(*(call(pool, "example : 2 + 2 = 4 := rfl", Path(folder)) for _ in range(lanes)))
        started, used = time.monotonic(), _cpu_s(pool)
        await asyncio.gather(*(lane(Path(folder) / str(number)) for number in range(lanes)))
        took, used = time.monotonic() - started, _cpu_s(pool) - used
    seconds.sort()
    return {
        f"{name}_checks": num_checks,
        f"{name}_checks_per_s": round(num_checks / took, 1),
        f"{name}_cpu_ms_per_check": _ms(used / num_checks),
        f"{name}_ms_p50": _ms(seconds[len(seconds) // 2]),
        f"{name}_ms_p95": _ms(seconds[int(0.95 * len(seconds))]),
        f"{name}_ms_max": _ms(seconds[-1]),
        f"{name}_rss_mib_per_worker": {"start": memory[0], "highest": max(memory), "end": _memory(pool)},
    }


def _memory(pool: Pool) -> int:
    """Resident memory of the largest worker now, in MiB."""
    return max((rss_bytes(pid) >> 20 for pid in pool.pids()), default=0)


def _cpu_s(pool: Pool) -> float:
    """Processor seconds that the workers and their ended children have used; does not depend on what else runs here."""
    total = 0
    for pid in pool.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])
    return total / os.sysconf("SC_CLK_TCK")


def _restart_times(backend: Backend, times: int) -> list[float]:
    """Seconds from the death of a worker to its next finished check, worker start included."""
    worker = LspWorker(backend)
    found = []
    try:
        for index in range(times):
            worker.start(_DEADLINE_S)
            worker.kill()
            started = time.monotonic()
            worker.close()
            worker.start(_DEADLINE_S)
            found.append(time.monotonic() - started)
            if worker.check(f"example : {index} + 2 = 2 + {index} := rfl", _DEADLINE_S).outcome != "ok":
                raise RuntimeError("a restarted worker does not accept a proof that holds")
    finally:
        worker.close()
    return found


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
