"""The process that others are forked from: `python -m miles_lean.judge.zygote FD`, started by `pool`.

A zygote loads Lean once. A *compiling* one has imported the library (`warm`) and forks a sandboxed child for each source; a
*checking* one has replayed the library's declarations and forks a child for each pair of modules. A zygote never looks at
anything of a submission itself, and nothing of one job is left when the next begins.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import shutil
import signal
import socket
import stat
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from miles_lean import sandbox
from miles_lean.judge import check
from miles_lean.judge.channel import Channel, Closed
from miles_lean.judge.warm import WarmLean
from miles_lean.judge.watch import watch

SOURCE, OLEAN = "Submission.lean", "Submission.olean"
MAX_OLEAN = 1 << 27
_SUBREAPER = 36
CHECK_STACK = 256 << 20


class Compiler:
    """Forks children that run Lean's command line on one file, and hands back what they wrote."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup = setup
        self.root = setup["root"]
        base = (str(Path(setup["library"]).parent), *setup["search_path"])
        room = setup["tmp_bytes"]
        self.policy = sandbox.Policy(
            read=base, write=(self.root,), fail_closed=setup["fail_closed"], max_tmp_bytes=room, max_file_bytes=room
        )
        self.layers: list[sandbox.Layer] = []
        self.separate = self.private = False
        if setup["sandbox"]:
            self.layers = sandbox.isolate(self.policy)
            layer = sandbox.can_separate()
            self.separate = layer.on
            private = sandbox.mount_private(self.root, self.policy)
            self.private = private.on
            self.layers += [layer, private]
            if private.on:
                sandbox.unmount(self.root)
            self.layers += sandbox.try_seal(self.policy)
            if self.policy.fail_closed and not (layer.on and private.on):
                raise sandbox.SandboxError(f"missing sandbox layers: {layer}; {private}")
        # After the namespaces, which a process can only enter with one thread.
        self.library = ctypes.CDLL(setup["library"], mode=ctypes.RTLD_GLOBAL)
        self.warm = WarmLean(Path(setup["library"]), (SOURCE.removesuffix(".lean"),))

    def run(self, message: dict[str, Any], blobs: list[bytes], client: int) -> tuple[dict[str, Any], list[bytes]]:
        """Compile one source."""
        work = os.path.join(self.root, "work")
        os.mkdir(work, 0o700)
        layer = sandbox.mount_private(work, self.policy) if self.private else None
        private = layer is not None and layer.on
        try:
            if layer is not None and not private:
                raise OSError(f"no private folder: {layer.detail}")
            with open(os.path.join(work, SOURCE), "wb") as file:
                file.write(blobs[0])
            out, err = os.pipe(), os.pipe()
            started = time.monotonic()
            pid = sandbox.fork(self.separate)
            if pid == 0:
                self._child(work, out[1], err[1], blobs[0] if message["bare"] else None)
            os.close(out[1])
            os.close(err[1])
            try:
                end = started + message["deadline_s"]
                done = watch(pid, (out[0], err[0]), deadline=end, max_rss=message["max_rss"], client=client)
            finally:
                os.close(out[0])
                os.close(err[0])
            olean = _read_plain(os.path.join(work, OLEAN)) if done.rc == 0 else b""
            stdout, stderr = (part.decode("utf-8", "replace") for part in done.output)
            reply = {"ended": done.ended, "rc": done.rc, "seconds": done.seconds, "stdout": stdout, "stderr": stderr}
            return reply | {"dropped": done.dropped}, [olean]
        finally:
            if private:
                sandbox.unmount(work)
            shutil.rmtree(work, ignore_errors=True)

    def _child(self, work: str, out: int, err: int, bare: bytes | None) -> None:
        """Never returns. `bare` is a source without a header; others are Lean's command line's to read."""
        try:
            os.setsid()
            os.chdir(work)
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(out, 1)
            os.dup2(err, 2)
            if self.setup["sandbox"]:
                sandbox.seal(self.policy)
            else:
                sandbox.die_with_parent()
            if bare is not None:
                code = self.warm.compile(bare.decode(), SOURCE, OLEAN)
            else:
                # Not async, as in the warm process: the names of helpers that Lean makes depend on it.
                arguments = [b"lean", b"--json", b"-DElab.async=false", b"-j1", b"-s8192", b"-o", OLEAN.encode(), SOURCE.encode()]
                code = self.library.lean_main(len(arguments), (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None))
            ctypes.CDLL(None).fflush(None)
            os._exit(code & 0xFF)
        except BaseException as error:  # nothing may return into the zygote's loop
            os.write(2, f"miles-lean: cannot allocate memory or sandbox: {error!r}\n".encode())
            os._exit(121)


def _read_plain(path: str) -> bytes:
    """A regular file's bytes; b"" for anything else, or one that is too big."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        return file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_OLEAN else b""


class Checker:
    """Forks children that compare two modules and let the kernel check the solution's declarations."""

    def __init__(self, setup: dict[str, Any]) -> None:
        with suppress(ValueError, OSError):
            hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
            wanted = CHECK_STACK if hard == resource.RLIM_INFINITY else min(CHECK_STACK, hard)
            resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        self.setup = setup
        self.layers: list[sandbox.Layer] = []
        self.separate = False
        if setup["sandbox"]:
            self.layers = sandbox.isolate(None)
            self.separate = sandbox.can_separate().on
        self.library = check.Library(Path(setup["library"]), [Path(text) for text in setup["search_path"]])

    def run(self, message: dict[str, Any], blobs: list[bytes], client: int) -> tuple[dict[str, Any], list[bytes]]:
        """Judge one solution."""
        out = os.pipe()
        started = time.monotonic()
        pid = sandbox.fork(self.separate, own_proc=False)
        if pid == 0:
            try:
                os.setsid()
                os.dup2(out[1], 1)
                if self.setup["sandbox"]:
                    sandbox.seal(sandbox.Policy(), keep_fds=(1, 2))
                else:
                    sandbox.die_with_parent()
                data = check.run(self.library, message, blobs)
                while data:
                    data = data[os.write(1, data) :]
                os._exit(0)
            except BaseException as error:  # nothing may return into the zygote's loop
                os.write(2, f"miles-lean: the checking process failed: {error!r}\n".encode())
                os._exit(121)
        os.close(out[1])
        try:
            end = started + message["deadline_s"]
            done = watch(pid, (out[0],), deadline=end, max_rss=message["max_rss"], client=client)
        finally:
            os.close(out[0])
        return {"ended": done.ended, "rc": done.rc, "seconds": done.seconds}, [done.output[0] if done.rc == 0 else b""]


def multiply(channel: Channel) -> Channel:
    """Start a copy of this process for each socket that arrives; returns in the copies, with their channel.

    So the library is replayed once, however many processes check at once, and a lost one is replaced within milliseconds.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Python 3.12 warns of Lean's own threads. They are idle here, and a copy replays on its one thread.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    while True:
        _, files, _, _ = socket.recv_fds(channel.sock, 1, 1)
        if not files:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            channel.sock.close()
            _stay_guarded()
            sandbox.die_with_parent()
            return Channel(socket.socket(fileno=files[0]))
        os.close(files[0])
        channel.send({"pid": pid})


def _stay_guarded() -> None:
    # Not "die with the parent": the kernel means the parent's thread, and pools of threads come and go. The end of the
    # channel is what ends a zygote, also in the middle of a job.
    sandbox.harden()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def main() -> None:
    """Serve jobs until the other side closes the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stay_guarded()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    setup, _ = channel.receive()
    try:
        worker: Compiler | Checker = Compiler(setup) if setup["role"] == "compile" else Checker(setup)
    except Exception as error:
        channel.send({"failed": f"{type(error).__name__}: {error}"})
        return
    # A collection in a child would touch, and so copy, every page that holds an object.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        layers = [[layer.name, layer.on, layer.detail] for layer in worker.layers]
        channel.send({"ready": True, "layers": layers})
        if setup["role"] == "check":
            channel = multiply(channel)
        while True:
            message, blobs = channel.receive()
            try:
                reply, answer = worker.run(message, blobs, channel.sock.fileno())
            except OSError as error:
                reply, answer = {"ended": "failed", "rc": None, "seconds": 0.0, "problem": str(error)}, []
            channel.send(reply, answer)
    except Closed:
        return


if __name__ == "__main__":
    main()
