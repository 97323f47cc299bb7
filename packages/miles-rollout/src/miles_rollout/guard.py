"""Run a command that must not outlive whoever started it: `python -m miles_rollout.guard GRACE_S COMMAND...`.

The parent starts this in a new session and holds its standard input open. When that input ends, because the parent closed it
or died in whatever way, the command gets SIGTERM and, GRACE_S later, its whole process group SIGKILL, which a stopped process
does not survive either. Standard output carries `pid N` and at last `exit CODE`; the command itself writes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main(arguments: list[str]) -> None:
    """Never returns: the process group ends with the command."""
    grace_s, command = float(arguments[0]), arguments[1:]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, restore_signals=True, preexec_fn=_default_signals)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        _say("exit 127")
        os._exit(127)
    _say(f"pid {child.pid}")
    threading.Thread(target=_follow, args=(child,), daemon=True).start()
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace_s)
    _end(child.poll())


def _default_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _follow(child: subprocess.Popen[bytes]) -> None:
    _end(child.wait())


def _end(code: int | None) -> None:
    _say(f"exit {-9 if code is None else code}")
    os.killpg(0, signal.SIGKILL)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
