"""Start the processes of a layout, each with a name and a deadline, and read what they wrote.

A process dies with its parent: it holds the read end of a pipe whose write end only the parent has, and ends when that closes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
from torch import Tensor

from miles_core.trainer.conformance.cases import Case, Layout
from miles_core.trainer.conformance.check import Result

LIFELINE = "MILES_LIFELINE_FD"
"""Environment variable: the file descriptor a child watches; end of file means that the parent is gone."""


class ProcessesFailed(RuntimeError):
    """A process ended badly or outlived its deadline. The message names it and shows the end of what it said."""


def run_processes(commands: Sequence[tuple[str, Sequence[str], dict[str, str]]], directory: Path, *, deadline_s: float) -> None:
    """Run named commands at once and wait for all. `commands` are (name, argv, extra environment).

    Output goes to `directory/NAME.log`. When one fails or the deadline passes, the others are killed and ProcessesFailed says
    which it was. No process is left behind, also when this one dies.
    """
    directory.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, argv, extra in commands:
            environment = {**os.environ, **extra, LIFELINE: str(read_end)}
            with (directory / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    list(argv), stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=(read_end,)
                )
        _wait(running, directory, time.monotonic() + deadline_s, deadline_s)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
        for process in running.values():
            process.wait()
        os.close(write_end)
        os.close(read_end)


def _wait(running: dict[str, subprocess.Popen[bytes]], directory: Path, end: float, deadline_s: float) -> None:
    waiting = dict(running)
    while waiting:
        for name, process in list(waiting.items()):
            code = process.poll()
            if code is None:
                continue
            del waiting[name]
            if code:
                raise ProcessesFailed(f"process {name} ended with code {code}; it said:\n{_tail(directory / f'{name}.log')}")
        if waiting and time.monotonic() > end:
            said = "\n".join(f"{name}: {_tail(directory / f'{name}.log', 600)}" for name in waiting)
            raise ProcessesFailed(f"after {deadline_s:g} s these processes are not done: {', '.join(waiting)}\n{said}")
        time.sleep(0.02)


def _tail(file: Path, size: int = 4000) -> str:
    return file.read_bytes()[-size:].decode(errors="replace").strip()


def run(
    backend: str, plan: Iterable[tuple[Case, Layout]], directory: Path, *, deadline_s: float = 240.0, threads: int = 1
) -> list[Result]:
    """Run every (case, layout) with the factory `backend` ("package.module:function") and read the results, in order.

    Layouts with equally many processes share one launch. Raises ProcessesFailed naming process and log.
    """
    plan = list(plan)
    results: dict[int, Result] = {}
    order = sorted(range(len(plan)), key=lambda i: plan[i][1].num_processes)
    for size, numbers in groupby(order, key=lambda i: plan[i][1].num_processes):
        chosen = list(numbers)
        place = directory / f"{size}-processes"
        place.mkdir(parents=True)
        todo = [{"number": i, "case": msgspec.to_builtins(plan[i][0]), "layout": msgspec.to_builtins(plan[i][1])} for i in chosen]
        (place / "plan.json").write_text(json.dumps({"backend": backend, "todo": todo}))
        port = _free_port()
        commands = [
            (
                f"{backend.split(':')[-1]}-rank{rank}of{size}",
                [sys.executable, "-m", "miles_core.trainer.conformance.worker", str(place)],
                _environment(rank, size, port, threads, deadline_s),
            )
            for rank in range(size)
        ]
        run_processes(commands, place, deadline_s=deadline_s)
        results |= {i: _read(place, i, *plan[i]) for i in chosen}
    return [results[i] for i in range(len(plan))]


def _environment(rank: int, size: int, port: int, threads: int, deadline_s: float) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
        "MILES_DEADLINE_S": str(deadline_s),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(place: Path, number: int, case: Case, layout: Layout) -> Result:
    said = [json.loads((place / f"{number}-{rank}.json").read_text()) for rank in range(layout.num_processes)]
    tensors: dict[str, Tensor] = {}
    if not any(entry["refusal"] for entry in said):
        from safetensors.torch import load_file

        tensors = load_file(place / f"{number}.safetensors")
    return Result(
        case=case,
        layout=layout,
        metrics=said[0]["metrics"],
        logprob=tensors.pop("miles.logprob", Tensor()),
        weights=tensors,
        digests=tuple(entry["digest"] for entry in said),
        refusals=tuple(entry["refusal"] for entry in said),
    )
