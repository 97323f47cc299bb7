"""Serve requests from a real server while its processes are killed; count verdicts by truth.

    python packages/miles-lean/tests/service_chaos.py 1000

Every tenth question does harm of its own: it hangs, nests too deep, forges or asks for too much. Beside it, a process of
the server is killed (SIGKILL, SIGSEGV, SIGABRT in turn) twice a second. Exit code 1 when any verdict is wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

STATEMENT = "theorem t{0} (p q : Prop) (h : p ∧ q) : {0} + 2 = {1} ∧ q := by sorry"
HARM = (
    "repeat (have k := h)",
    "exact " + "(" * 20000 + "h",
    "set_option debug.skipKernelTC true in decide +kernel",
    "exact ⟨rfl, (List.replicate 1000000000 h).head!.2⟩",
)


def below(root: int) -> list[int]:
    """Process ids of all descendants."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found: set[int] = {root}
    while grown := {pid for pid, above in parent.items() if above in found} - found:
        found |= grown
    return sorted(found - {root})


def question(number: int) -> tuple[str, str, bool | None]:
    """(statement, proof, truth); truth None means that no proof of it can be accepted, whatever else is answered."""
    statement = STATEMENT.format(number, number + 2)
    if number % 10 == 9:
        return statement, HARM[number // 10 % len(HARM)], None
    if number % 3 == 0:
        return statement, "exact ⟨rfl, h.1⟩", False
    return statement, "exact ⟨rfl, h.2⟩", True


async def killer(server: int, stop: asyncio.Event, killed: Counter[str]) -> None:
    """Kill one process below the server, twice a second."""
    kinds = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
    while not stop.is_set():
        await asyncio.sleep(0.5)
        if pids := below(server):
            kind = kinds[sum(killed.values()) % 3]
            try:
                os.kill(random.choice(pids), kind)
                killed[kind.name] += 1
            except ProcessLookupError:
                continue


async def ask(client: httpx.AsyncClient, number: int, slots: asyncio.Semaphore) -> tuple[int, Any]:
    statement, proof, _ = question(number)
    async with slots:
        answer = await client.post("/v1/verify", json={"statement": statement, "proof": proof})
    answer.raise_for_status()
    return number, answer.json()["results"][0]


async def storm(address: str, server: int, count: int) -> dict[str, Any]:
    """Ask everything while killing; the report."""
    stop, killed, slots = asyncio.Event(), Counter[str](), asyncio.Semaphore(16)
    started = time.monotonic()
    hunting = asyncio.create_task(killer(server, stop, killed))
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        rows = await asyncio.gather(*(ask(client, number, slots) for number in range(count)))
    stop.set()
    await hunting
    outcomes: Counter[str] = Counter()
    wrong = []
    for number, row in rows:
        truth = question(number)[2]
        outcomes[f"{ {True: 'right', False: 'false', None: 'harmful'}[truth] }/{row['status']}"] += 1
        if row["status"] == "infra_error":
            continue
        if row["status"] == "accepted" and truth is not True or row["status"] == "rejected" and truth is True:
            wrong.append((number, row["category"], row["reason"][:200]))
    return {
        "requests": count, "seconds": round(time.monotonic() - started, 1), "killed": dict(killed),
        "outcomes": dict(sorted(outcomes.items())), "wrong": wrong,
    }  # fmt: skip


def main(count: int, workers: int = 2) -> dict[str, Any]:
    """Start a server, storm it, stop it; the report with the processes it left behind."""
    command = [sys.executable, "-c", "from miles_lean.cli import main; raise SystemExit(main())", "serve"]
    command += ["--port", "0", "--workers", str(workers), "--max-wait", "300"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line for line in server.stderr if "serving on" in line).split()[-1]
        report = asyncio.run(storm(address, server.pid, count))
        family = below(server.pid)
        server.send_signal(signal.SIGTERM)
        report["exit code"] = server.wait(60)
    end = time.monotonic() + 3
    while (left := [pid for pid in family if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    return report | {"orphans": left}


if __name__ == "__main__":
    found = main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong"] or found["orphans"]))
