"""The walls around a process that runs a submission. Each reports whether it stands; what stands depends on the machine.

Three calls, in this order: `isolate` once in the process that will start others, `fork` there for each submission,
`seal` in the new process before anything of the submission is looked at.

Standard library only, and nothing outside this folder: the launcher runs it in a bare interpreter.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from miles_lean.sandbox import landlock, seccomp

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_CLONE, _CAPSET = 56, 126
_PDEATHSIG, _DUMPABLE, _NO_NEW_PRIVS = 1, 4, 38
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_NOSUID_NODEV, _PRIVATE = 2 | 4, (1 << 18) | (1 << 14)


class SandboxError(RuntimeError):
    """A layer is missing and the policy says that then nothing runs."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One wall: does it stand, and if not, why."""

    name: str
    on: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name:<14} {'on' if self.on else 'off'}" + (f"  {self.detail}" if self.detail else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a submission's process may do. The limits are far above what an honest proof needs.

    There is no limit on address space: Lean reserves gigabytes that it never touches, and under a tight limit a right
    proof fails with what looks like an error of its own. Resident memory is watched from outside instead.
    """

    read: tuple[str, ...] = ()
    """Files and folders to read: Lean's library and the compiled modules. Everything else does not exist for it."""
    write: tuple[str, ...] = ()
    """Folders to write in: its own, and nothing in it may be executed."""
    allow_processes: bool = False
    """Whether it may start programs. The embedded Lean needs none; `lake env lean` does."""
    max_file_bytes: int = 1 << 28
    max_open_files: int = 256
    max_tmp_bytes: int = 1 << 28
    """Size of the private in-memory folder, where one can be mounted."""
    cpu_s: int = 0
    """Processor seconds after which the kernel ends it; 0: none. The wall clock is watched from outside anyway."""
    fail_closed: bool = False
    """Refuse to run when a layer is missing, instead of running with the others."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _errno(result: int) -> str:
    return "" if result == 0 else os.strerror(ctypes.get_errno())


def isolate(policy: Policy | None = None) -> list[Layer]:
    """New user, network, mount, IPC and host-name namespaces for this process and what it starts.

    The process must have one thread. Raises SandboxError when one is missing and the policy is fail_closed.
    """
    libc, uid, gid = _libc(), os.getuid(), os.getgid()
    problem = _errno(libc.unshare(_NEWUSER))
    if not problem:
        try:
            for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{file}", "w") as target:
                    target.write(text)
        except OSError as error:
            problem = str(error)
    layers = [Layer("user-namespace", not problem, problem)]
    for name, flag in (("network", _NEWNET), ("mounts", _NEWNS), ("ipc", _NEWIPC | _NEWUTS)):
        problem = _errno(libc.unshare(flag))
        if name == "mounts" and not problem:
            problem = _errno(libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None))
        layers.append(Layer(name, not problem, problem))
    return _checked(layers, policy)


def fork(separate: bool, own_proc: bool = True) -> int:
    """Like os.fork; `separate` is what can_separate said: a new process namespace, in which all die with the first.

    Lean looks itself up in /proc, so the namespace gets a /proc of its own, unless that is not wanted. Call it only from a
    process of one thread.
    """
    pid, problem = _clone(_NEWPID | (_NEWNS if own_proc else 0)) if separate else (os.fork(), "")
    if pid < 0:
        raise OSError(f"no process could be started: {problem}")
    if pid == 0 and separate and own_proc and _mount_proc():
        os._exit(NO_PROC)
    return pid


NO_PROC = 120
"""Exit code of a new process that could not have its own /proc; `can_separate` finds out beforehand."""


def can_separate() -> Layer:
    """Whether `fork` gives process namespaces here; tried once, in a child."""
    pid, problem = _clone(_NEWPID | _NEWNS)
    if pid == 0:
        os._exit(NO_PROC if _mount_proc() else 0)
    if pid > 0 and os.waitpid(pid, 0)[1]:
        problem = "no /proc of its own"
    return Layer("processes", not problem, problem)


def _mount_proc() -> int:
    return int(_libc().mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(_NOSUID_NODEV | 8), None))


def _clone(flags: int) -> tuple[int, str]:
    """Fork with namespaces, Python's own hooks included; (-1, why) when the kernel refuses."""
    libc = _libc()
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = int(libc.syscall(_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0))
    problem = os.strerror(ctypes.get_errno()) if pid < 0 else ""
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid, problem


def mount_private(folder: str, policy: Policy) -> Layer:
    """An in-memory folder of bounded size over `folder`; for a process that `isolate` was called in."""
    options = f"size={policy.max_tmp_bytes},nr_inodes=4096,mode=0700".encode()
    problem = _errno(_libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(_NOSUID_NODEV), options))
    return Layer("private-tmp", not problem, problem)


def unmount(folder: str) -> None:
    """Take the in-memory folder away; what is in it is gone."""
    _libc().umount2(os.fsencode(folder), 2)


def harden() -> None:
    """For the checker's own processes: others of the same user may neither trace them nor read their memory."""
    _libc().prctl(_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL when the process that started this one ends."""
    _libc().prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def seal(policy: Policy, keep_fds: tuple[int, ...] = (0, 1, 2)) -> list[Layer]:
    """Give up, for ever: other file descriptors, capabilities, new privileges, files outside the policy, system calls.

    Raises SandboxError when a layer is missing and the policy is fail_closed.
    """
    die_with_parent()
    _close_others(keep_fds)
    layers = [_step("rlimits", lambda: _limits(policy)), _step("capabilities", _drop_capabilities)]
    layers.append(_step("no-new-privs", lambda: _errno(_libc().prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))))
    layers.append(_step("landlock", lambda: landlock.restrict((*policy.read, *_DEVICES), policy.write)))
    layers.append(_step("seccomp", lambda: seccomp.install(policy.allow_processes)))
    return _checked(layers, policy)


def _step(name: str, action: Callable[[], str]) -> Layer:
    try:
        problem = action()
    except (OSError, ValueError) as error:
        problem = str(error)
    return Layer(name, not problem, problem)


def _checked(layers: list[Layer], policy: Policy | None) -> list[Layer]:
    if policy is not None and policy.fail_closed and (missing := [layer for layer in layers if not layer.on]):
        raise SandboxError("missing sandbox layers: " + "; ".join(f"{layer.name} ({layer.detail})" for layer in missing))
    return layers


def _close_others(keep: tuple[int, ...]) -> None:
    previous = -1
    for fd in [*sorted(keep), 1 << 20]:
        if fd > previous + 1:
            os.closerange(previous + 1, min(fd, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        previous = fd


def _limits(policy: Policy) -> str:
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: policy.max_file_bytes,
        resource.RLIMIT_NOFILE: policy.max_open_files,
        resource.RLIMIT_MEMLOCK: 1 << 16,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if policy.cpu_s:
        wanted[resource.RLIMIT_CPU] = policy.cpu_s
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    with suppress(ValueError):  # over the limit, a write fails instead of killing the process without a word
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return ""


def _drop_capabilities() -> str:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    return _errno(_libc().syscall(_CAPSET, header, (ctypes.c_uint32 * 6)()))


def try_seal(policy: Policy) -> list[Layer]:
    """What `seal` will give in each child, found by sealing one. Raises SandboxError as seal does."""

    def attempt(write_end: int) -> list[Layer]:
        return seal(Policy(read=policy.read, write=policy.write, allow_processes=policy.allow_processes), (write_end,))

    return _checked(_in_child(attempt), policy)


def probe() -> list[Layer]:
    """Which layers this machine gives, found by trying them in a child process."""

    def attempt(write_end: int) -> list[Layer]:
        layers = isolate()
        layers += [can_separate(), mount_private("/tmp", Policy())]
        return [*layers, *seal(Policy(), (write_end,))]

    return _in_child(attempt)


def _in_child(attempt: Callable[[int], list[Layer]]) -> list[Layer]:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            text = "\n".join(f"{layer.name}\t{int(layer.on)}\t{layer.detail}" for layer in attempt(write_end))
            os.write(write_end, text.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as source:
        rows = [line.rstrip("\n").split("\t") for line in source]
    os.waitpid(pid, 0)
    return [Layer(name, on == "1", detail) for name, on, detail in rows]
