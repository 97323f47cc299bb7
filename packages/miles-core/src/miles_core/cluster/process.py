"""A worker in a process of its own: `python -m miles_core.cluster.process SOCKET_FD LIFELINE_FD`.

Calls and replies are msgpack records behind an eight-byte length, on a socket that only the driver has the other end of. The
process ends when the driver does: the kernel kills it with its parent on Linux, and elsewhere the lifeline pipe says so.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from typing import Any

import msgspec


class Call(msgspec.Struct, frozen=True, array_like=True):
    """From the driver."""

    method: str
    payload: bytes


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """From the worker: an answer, or the name and words of an error."""

    payload: bytes = b""
    error: str = ""
    message: str = ""


def send(sock: socket.socket, record: Any) -> None:
    """Write one record."""
    data = msgspec.msgpack.encode(record)
    sock.sendall(struct.pack("<Q", len(data)) + data)


def receive(sock: socket.socket) -> bytes | None:
    """One record's bytes; None when the other end has closed."""
    head = _exactly(sock, 8)
    return None if head is None else _exactly(sock, struct.unpack("<Q", head)[0])


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(1 << 20, size - len(parts)))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main(socket_fd: int, lifeline_fd: int) -> None:
    """Serve calls until the driver closes the socket."""
    _die_with_parent(lifeline_fd)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the driver, which ends us in good order
    worker: Any = None
    with socket.socket(fileno=socket_fd) as sock:
        try:
            while (data := receive(sock)) is not None:
                call = msgspec.msgpack.decode(data, type=Call)
                try:
                    if call.method == "build":
                        from miles_core.cluster.worker import Build, make_worker

                        worker = make_worker(msgspec.msgpack.decode(call.payload, type=Build))
                        reply = Reply()
                    elif worker is None:
                        raise ValueError("nothing was built in this worker yet")
                    else:
                        reply = Reply(worker.call(call.method, call.payload))
                except Exception as error:  # told to the driver, which decides; the log has the rest
                    traceback.print_exc()
                    reply = Reply(error=type(error).__name__, message=str(error))
                send(sock, reply)
        finally:
            if worker is not None:
                try:
                    worker.close()
                except Exception:  # the driver is gone; the log has it
                    traceback.print_exc()


def _die_with_parent(lifeline_fd: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        os.read(lifeline_fd, 1)  # returns when the last write end has closed
        os._exit(3)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
