"""Serve requests from a real server while everything around it breaks; count verdicts by truth.

    python packages/miles-lean/tests/service_chaos.py [REQUESTS]

Every third question does harm of its own: it hangs, nests too deep, eats memory, writes 130 MB to an output of its process or
to the server's channel, ends its process, forges. Beside it a process of the server is killed (SIGKILL, SIGSEGV, SIGABRT in
turn) twice a second, and the server's temporary folder, an in-memory one of 2 MiB where the machine lets us mount it, is
filled to the last byte and file name for a second at a time. Exit code 1 when any verdict is wrong, a hang lives longer than
its deadline + 0.3 s, or a process is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

STATEMENT = "theorem t{0} (p q : Prop) (h : p ∧ q) : {0} + 2 = {1} ∧ q := by sorry"
ELABORATE_S = 3.0
_TEXT = (
    '@[extern "x"] opaque String.append : String → String → String\n'
    "def d{0} (s : String) : String := String.append s s\n"
    '@[extern "x"] opaque IO.FS.writeFile : String → String → Nat → Nat\n'
    '@[extern "x"] opaque IO.Process.exit : Nat → Nat → Bool\n'
    '@[extern "x"] opaque dbgTrace : Nat → String → (Nat → Bool) → Bool\n'
    "def big{0} : String := " + "d{0} (" * 17 + '"' + "s" * 1000 + '"' + ")" * 17 + "\n"
)
_GROW = "partial def grow{0} (s : String) : Bool := grow{0} (String.append s s)\n"
_WRITE = "(match IO.FS.writeFile {0} 0 with | .zero => true | .succ _ => true) = true"
_NATIVE = "have : {0} := by native_decide\n  exact ⟨rfl, h.2⟩"
HARM = {
    "hang": ("", "repeat (have k := h)"),
    "deep": ("", "exact " + "(" * 20000 + "h"),
    "forged": ("", "set_option debug.skipKernelTC true in decide +kernel"),
    "open": ("", "set_option warn.sorry false in sorry"),
    "memory": (_TEXT + _GROW, _NATIVE.format("grow{0} big{0} = true")),
    "flood": (_TEXT, _NATIVE.format("dbgTrace 0 big{0} (fun _ => true) = true")),
    "channel": (_TEXT, _NATIVE.format(_WRITE.format('"/proc/self/fd/1" big{0}'))),
    "disk": (_TEXT, _NATIVE.format(_WRITE.format('"filler" (d{0} big{0})'))),
    "exit": (_TEXT, _NATIVE.format("IO.Process.exit 0 0 = true")),
}
"""kind: (what stands before the statement, the proof); {0} becomes the question's number."""
WRAP = """
import ctypes, os, sys
folder, libc, ids = sys.argv[1], ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
def sure(result):
    if result: sys.exit(f"no private folder: {os.strerror(ctypes.get_errno())}")
sure(libc.unshare(0x10000000 | 0x20000))
for file, text in (("setgroups", "deny"), ("uid_map", "0 %d 1" % ids[0]), ("gid_map", "0 %d 1" % ids[1])):
    open("/proc/self/" + file, "w").write(text)
sure(libc.mount(b"none", b"/", None, ctypes.c_ulong(1 << 18 | 1 << 14), None))
sure(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(0), b"size=2m,nr_inodes=200,mode=0700"))
os.execv(sys.argv[2], sys.argv[2:])
"""


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


def question(number: int) -> tuple[str, str, str]:
    """(statement, proof, kind). Kind "right" can be proved so, "false" not; any other is harm and must never be accepted."""
    statement = STATEMENT.format(number, number + 2)
    if number % 3 == 2:
        kind = list(HARM)[number // 3 % len(HARM)]
        before, proof = HARM[kind]
        return before.format(number) + statement, proof.format(number), kind
    if number % 6 == 1:
        return statement, "exact ⟨rfl, h.1⟩", "false"
    return statement, "exact ⟨rfl, h.2⟩", "right"


async def killer(server: int, stop: asyncio.Event, killed: Counter[str], every_s: float) -> None:
    """Kill one process below the server every so many seconds."""
    kinds = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
    while not stop.is_set():
        await asyncio.sleep(every_s)
        if pids := below(server):
            kind = kinds[sum(killed.values()) % 3]
            try:
                os.kill(random.choice(pids), kind)
                killed[kind.name] += 1
            except ProcessLookupError:
                continue


async def filler(folder: Path, stop: asyncio.Event, filled: Counter[str]) -> None:
    """Fill the server's temporary folder, wait a second, make room again, wait two."""
    while not stop.is_set():
        await asyncio.sleep(2.0)
        made: list[Path] = []
        try:
            for number in range(10_000):
                made.append(folder / f"filler-{number}")
                with made[-1].open("wb", buffering=0) as file:
                    while number == 0 and file.write(bytes(4096)):
                        pass
        except OSError:  # room for no file name more
            filled["times full"] += 1
        await asyncio.sleep(1.0)
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()


async def ask(client: httpx.AsyncClient, number: int, slots: asyncio.Semaphore) -> tuple[int, Any]:
    statement, proof, _ = question(number)
    async with slots:
        answer = await client.post("/v1/verify", json={"statement": statement, "proof": proof})
    answer.raise_for_status()
    return number, answer.json()["results"][0]


async def storm(address: str, server: int, count: int, folder: Path | None, kill_s: float) -> dict[str, Any]:
    """Ask everything while things break; the report."""
    stop, killed, filled, slots = asyncio.Event(), Counter[str](), Counter[str](), asyncio.Semaphore(16)
    started = time.monotonic()
    trouble = [asyncio.create_task(killer(server, stop, killed, kill_s))]
    if folder is not None:
        trouble.append(asyncio.create_task(filler(folder, stop, filled)))
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        rows = await asyncio.gather(*(ask(client, number, slots) for number in range(count)))
        stop.set()
        await asyncio.gather(*trouble)
        again = await asyncio.gather(*(ask(client, count + 10 * number, slots) for number in range(4)))
    return report(rows, killed) | {
        "seconds": round(time.monotonic() - started, 1),
        "disk": dict(filled) if folder is not None else "not filled: no private folder could be mounted",
        "afterwards": [row["status"] for _, row in again],
    }


def report(rows: list[tuple[int, Any]], killed: Counter[str]) -> dict[str, Any]:
    """What came out: outcomes by truth, wrong verdicts, the longest life of a hang."""
    outcomes, reasons = Counter[str](), Counter[str]()
    wrong, longest = [], 0.0
    for number, row in rows:
        kind = question(number)[2]
        outcomes[f"{kind}/{row['status']}"] += 1
        if row["status"] == "infra_error":
            reasons[row["reason"][:100]] += 1
        if row["category"] == "timeout":
            longest = max(longest, row["times"].get("elaborate_s", 0.0))
        accepted, rejected = row["status"] == "accepted", row["status"] == "rejected"
        if (accepted and kind != "right") or (rejected and kind == "right"):
            wrong.append((number, kind, row["category"], row["reason"][:200]))
    return {
        "requests": len(rows), "killed": dict(killed), "outcomes": dict(sorted(outcomes.items())), "wrong": wrong,
        "infra": dict(reasons.most_common(8)),
        "longest hang, s past its deadline": round(longest - ELABORATE_S, 3) if longest else None,
    }  # fmt: skip


def main(count: int, workers: int = 2, kill_s: float = 0.5) -> dict[str, Any]:
    """Start a server, storm it, stop it; the report with the processes it left behind."""
    serve = [sys.executable, "-c", "from miles_lean.cli import main; raise SystemExit(main())", "serve"]
    serve += ["--port", "0", "--workers", str(workers), "--max-wait", "300", "--max-rss-mib", "768"]
    serve += ["--elaborate-s", str(ELABORATE_S)]
    with tempfile.TemporaryDirectory(prefix="miles-lean-chaos-") as folder:
        tight = subprocess.run([sys.executable, "-c", WRAP, folder, "/bin/true"], capture_output=True).returncode == 0
        if tight:
            serve = [sys.executable, "-c", WRAP, folder, *serve, "--cache", f"{folder}/verdicts.jsonl"]
        environment = os.environ | {"TMPDIR": folder}
        with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True, env=environment) as server:
            assert server.stderr is not None
            address = next(line for line in server.stderr if "serving on" in line).split()[-1]
            inside = Path("/proc", str(server.pid), "root", folder.lstrip("/")) if tight else None
            found = asyncio.run(storm(address, server.pid, count, inside, kill_s))
            family = below(server.pid)
            server.send_signal(signal.SIGTERM)
            found["exit code"] = server.wait(60)
    end = time.monotonic() + 3
    while (left := [pid for pid in family if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    return found | {"orphans": left, "load": os.getloadavg()[0]}


if __name__ == "__main__":
    end = main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print(json.dumps(end, indent=1, ensure_ascii=False))
    late = (end["longest hang, s past its deadline"] or 0.0) > 0.3
    sys.exit(bool(end["wrong"] or end["orphans"] or late))
