"""A small system-call filter: no new processes, no sockets, no looking into other processes, no mounts.

Denied calls fail with EPERM and the program goes on. x86-64 only; elsewhere the layer reports itself off.
"""

from __future__ import annotations

import ctypes
import platform
import struct

_DENIED = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438, "kcmp": 312, "mount": 165,
    "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272, "bpf": 321, "perf_event_open": 298,
    "keyctl": 250, "add_key": 248, "request_key": 249, "kexec_load": 246, "init_module": 175, "finit_module": 313,
    "delete_module": 176, "userfaultfd": 323, "io_uring_setup": 425, "socket": 41, "socketpair": 53, "open_by_handle_at": 304,
    "mount_setattr": 442, "move_mount": 429, "open_tree": 428, "fsopen": 430, "reboot": 169, "swapon": 167,
}  # fmt: skip
_EXEC = {"execve": 59, "execveat": 322}
_FORK, _VFORK, _CLONE, _CLONE3 = 57, 58, 56, 435
_THREAD = 0x10000
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _GREATER, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def _program(allow_processes: bool) -> bytes:
    """Arch check, then one comparison a call; the kernel runs the list for every system call."""

    def op(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
        return struct.pack("<HBBI", code, jump_true, jump_false, value)

    def deny(number: int, error: int) -> bytes:
        return op(_EQUAL, 0, 1, number) + op(_RETURN, 0, 0, _ERRNO | error)

    code = op(_LOAD, 0, 0, 4) + op(_EQUAL, 1, 0, 0xC000003E) + op(_RETURN, 0, 0, _KILL)
    code += op(_LOAD, 0, 0, 0) + op(_GREATER, 0, 1, 0x40000000) + op(_RETURN, 0, 0, _KILL)
    for number in _DENIED.values():
        code += deny(number, _EPERM)
    if not allow_processes:
        for number in (*_EXEC.values(), _FORK, _VFORK):
            code += deny(number, _EPERM)
        # clone3 hides its flags in memory; without it the C library starts threads by clone, whose flags can be seen.
        code += deny(_CLONE3, _ENOSYS)
        code += op(_EQUAL, 0, 3, _CLONE) + op(_LOAD, 0, 0, 16) + op(_BITS, 1, 0, _THREAD)
        code += op(_RETURN, 0, 0, _ERRNO | _EPERM)
    return code + op(_RETURN, 0, 0, _ALLOW)


def install(allow_processes: bool) -> str:
    """Put the filter on this thread and all it starts; "" or why not. no_new_privs must be set."""
    if platform.machine() != "x86_64":
        return f"not written for {platform.machine()}"
    code = _program(allow_processes)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        return f"errno {ctypes.get_errno()}"
    return ""
