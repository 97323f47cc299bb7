"""Judged verifications per second: with every challenge new to the judge, and with challenges that it has compiled before."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from miles_lean.backends.base import Backend
from miles_lean.honest import honest_proofs
from miles_lean.judge.core import Judge
from miles_lean.judge.verdict import Verdict


def measure(backend: Backend, workers: int, count: int, refused: list[str]) -> dict[str, Any]:
    """`count` verdicts on honest proofs under new names, twice; names of those refused go to `refused`.

    Processor time is that of this process and of all the judge's, and does not depend on what else runs here.
    """
    proofs = honest_proofs()
    rows = []
    for index in range(count):
        proof = proofs[index % len(proofs)]
        old, new = f"theorem {proof.name} ", f"theorem {proof.name}_{index} "
        rows.append((proof.challenge.replace(old, new, 1), proof.source.replace(old, new, 1)))
    report: dict[str, Any] = {}
    with Judge(backend, workers=workers) as judge:
        started = time.monotonic()
        judge.warm()
        report["judge_start_s"] = round(time.monotonic() - started, 2)
        list(_verdicts(judge, rows[:workers], workers)[0])  # every page that all verdicts need is in memory
        judge.forget()
        for name in ("judged_cold", "judged_known"):
            used, started = _cpu_s(judge), time.monotonic()
            verdicts, seconds = _verdicts(judge, rows, workers)
            took, used = time.monotonic() - started, _cpu_s(judge) - used
            refused += [f"{name}: {verdict}" for verdict in verdicts if not verdict.accepted]
            report |= {
                f"{name}_verdicts": count,
                f"{name}_verdicts_per_s": round(count / took, 1),
                f"{name}_cpu_ms_per_verdict": round(1000 * used / count, 1),
                f"{name}_ms_p50": round(1000 * seconds[len(seconds) // 2], 1),
                f"{name}_ms_p95": round(1000 * seconds[int(0.95 * len(seconds))], 1),
            }
    return report


def _verdicts(judge: Judge, rows: list[tuple[str, str]], workers: int) -> tuple[list[Verdict], list[float]]:
    """All verdicts, `workers` at a time, and how long each took, sorted."""
    seconds: list[float] = []
    lock = threading.Lock()

    def one(row: tuple[str, str]) -> Verdict:
        started = time.monotonic()
        verdict = judge.verify(*row)
        with lock:
            seconds.append(time.monotonic() - started)
        return verdict

    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(one, rows))
    return verdicts, sorted(seconds)


def _cpu_s(judge: Judge) -> float:
    """Processor seconds of this process, the judge's processes and their ended children."""
    total = 0
    for pid in (os.getpid(), *judge.pids()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])
    return total / os.sysconf("SC_CLK_TCK")
