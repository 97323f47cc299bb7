"""A warm Lean that forks: `python -I -S zygote.py LIBRARY SOCKET_FD [HOOK.py]`.

Loads and initialises Lean once, then for each request forks a child that runs Lean's command line and dies. A request is
one packet of JSON, {"args": [...], "cwd": "...", "env": {...}, "hook": ...}, with the child's stdout and stderr attached;
answers are {"pid": N} at once and {"status": N} (as of waitpid) at the end. It ends when its socket does.

HOOK.py, when given, defines enter(value), called in the child with the request's "hook" before Lean starts; a sandbox.
Imports nothing of ours: it must start fast, and a child must hold nothing worth reading.
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_REQUEST = 1 << 20
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve one request after the other."""
    library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    library.lean_initialize()
    libc = ctypes.CDLL(None)
    channel = socket.socket(fileno=int(sys.argv[2]))
    enter = load(sys.argv[3]) if len(sys.argv) > 3 else None
    channel.send(json.dumps({"ready": os.getpid()}).encode())
    while True:
        try:
            data, attached, _, _ = channel.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(8))
        except InterruptedError:
            continue
        except OSError:
            break
        if not data:
            break
        files = array.array("i")
        for _, _, part in attached:
            files.frombytes(part[: len(part) - len(part) % files.itemsize])
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            child(library, libc, channel, list(files), request, enter)
        for file in files:
            os.close(file)
        channel.send(json.dumps({"pid": pid}).encode())
        _, status = os.waitpid(pid, 0)
        try:
            os.killpg(pid, signal.SIGKILL)  # what it may have left behind
        except OSError:
            pass
        channel.send(json.dumps({"status": status}).encode())
    os._exit(0)


def child(
    library: ctypes.CDLL,
    libc: ctypes.CDLL,
    channel: socket.socket,
    files: list[int],
    request: dict[str, Any],
    enter: Callable[[Any], None] | None,
) -> None:
    """Become Lean's command line; never returns."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        channel.close()
        null = os.open(os.devnull, os.O_RDONLY)
        for target, file in ((0, null), (1, files[0]), (2, files[1])):
            os.dup2(file, target)
        os.closerange(3, max(64, *files) + 1)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        if enter is not None:
            enter(request.get("hook"))
        arguments = [b"lean", *map(os.fsencode, request["args"])]
    except BaseException as error:
        os.write(2, f"could not prepare the Lean process: {error!r}\n".encode())
        os._exit(75)
    code = library.lean_main(len(arguments), (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None))
    libc.fflush(None)
    os._exit(code & 0xFF)


def load(path: str) -> Callable[[Any], None]:
    """The function `enter` of a Python file."""
    spec = importlib.util.spec_from_file_location("hook", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    enter: Callable[[Any], None] = module.enter
    return enter


if __name__ == "__main__":
    main()
