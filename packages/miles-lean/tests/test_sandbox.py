"""What a sealed process can no longer do, next to an unsealed one that can."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from miles_lean import sandbox


def _try(actions: dict[str, Callable[[], object]], policy: sandbox.Policy | None) -> dict[str, bool]:
    """Whether each action works in a child process; sealed when there is a policy."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            if policy is not None:
                sandbox.isolate(policy)
                sandbox.seal(policy, keep_fds=(1, 2, write_end))
            for name, action in actions.items():
                try:
                    worked = action() not in (-1, False)
                except (OSError, RuntimeError):
                    worked = False
                os.write(write_end, f"{name} {int(worked)}\n".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as source:
        lines = source.read().split("\n")
    os.waitpid(pid, 0)
    return {name: worked == "1" for name, worked in (line.split() for line in lines if line)}


def _fork() -> bool:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


def _thread() -> bool:
    done: list[int] = []
    thread = threading.Thread(target=done.append, args=(1,))
    thread.start()
    thread.join(10)
    return done == [1]


def test_sealed_process_reaches_nothing_outside(tmp_path: Path) -> None:
    if not {"landlock", "seccomp"} <= {layer.name for layer in sandbox.probe() if layer.on}:
        pytest.fail("this machine has no Landlock or no seccomp; run the degraded tests only where that is known")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("x")
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()
    allowed: dict[str, Callable[[], object]] = {
        "write-inside": lambda: (inside / "a").write_text("x") > 0,
        "thread": _thread,
    }
    forbidden: dict[str, Callable[[], object]] = {
        "write-outside": lambda: (outside / "a").write_text("x") > 0,
        "read-outside": lambda: (outside / "secret").read_text() == "x",
        "fork": _fork,
        "socket": lambda: bool(socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
        "read-parent-memory": lambda: bool(open(f"/proc/{parent}/maps").read(1)),
    }
    free = _try(allowed | forbidden, None)
    assert all(free.values()), free  # the control: without walls all of it works
    sealed = _try(
        allowed
        | forbidden
        | {
            "ptrace": lambda: libc.ptrace(16, parent, None, None),
            "signal-outside": lambda: os.kill(parent, 0) is None,
            "mount": lambda: libc.mount(b"t", os.fsencode(inside), b"tmpfs", 0, None),
        },
        sandbox.Policy(write=(str(inside),)),
    )
    assert all(sealed[name] for name in allowed), sealed
    assert not any(worked for name, worked in sealed.items() if name not in allowed), sealed


def test_every_layer_reports_itself() -> None:
    layers = sandbox.probe()
    names = [layer.name for layer in layers]
    assert names[:4] == ["user-namespace", "network", "mounts", "ipc"] and len(set(names)) == len(names) >= 11
    assert all(layer.on or layer.detail for layer in layers), [str(layer) for layer in layers]


def test_fail_closed_refuses_instead_of_running_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_lean.sandbox import landlock, layers

    monkeypatch.setattr(landlock, "abi", lambda: 0)
    off = {layer.name: layer.on for layer in layers.try_seal(sandbox.Policy())}
    assert off["landlock"] is False and off["no-new-privs"] is True
    with pytest.raises(sandbox.SandboxError, match="landlock"):
        layers.try_seal(sandbox.Policy(fail_closed=True))
