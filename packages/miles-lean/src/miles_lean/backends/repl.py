"""The leanprover-community REPL: one JSON command in, one JSON answer out. Headers become environments that are reused.

An answer ends where its JSON value ends, not at a blank line, so nothing that a program prints can shift the answers:
what precedes the value is output, what does not parse until the deadline is a lost process.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from miles_lean.backends.base import Capabilities, CompileResult, Outcome
from miles_lean.backends.http import _from_repl, _infra
from miles_lean.data.header import split_header
from miles_lean.workers.process import kill_group, rss_bytes

MAX_USES = 400
"""Commands after which a process is replaced: its memory only grows."""
MAX_HEADERS = 8
_LOOK_S = 0.05
_MAX_ANSWER = 64 << 20


class Lost(RuntimeError):
    """The REPL process ended, or must be ended; `kind` is an outcome of CompileResult."""

    def __init__(self, kind: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class ReplProcess:
    """One REPL and the environments it holds. Not thread-safe."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], max_rss: int) -> None:
        self._command, self._cwd, self._environment, self._max_rss = list(command), cwd, dict(environment), max_rss
        self._process: subprocess.Popen[bytes] | None = None
        self.headers: OrderedDict[str, int] = OrderedDict()
        self.uses = 0

    def ask(self, command: Mapping[str, Any], end: float) -> dict[str, Any]:
        """The answer to one command until the monotonic time `end`. Raises Lost, and then the process is gone."""
        process = self._started()
        self.uses += 1
        try:
            return self._exchange(process, json.dumps(command).encode() + b"\n\n", end)
        except (Lost, OSError) as error:
            self.stop()
            raise error if isinstance(error, Lost) else Lost("crash", str(error)) from error

    def stop(self) -> None:
        """Kill it with everything it started. Idempotent."""
        process, self._process = self._process, None
        self.headers.clear()
        self.uses = 0
        if process is not None:
            kill_group(process.pid)
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert stream is not None
                    stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and (self._process.poll() is not None or self.uses >= MAX_USES):
            self.stop()
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=self._cwd,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                raise Lost("infra", f"{self._command[0]}: {error}") from error
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, end: float) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        got = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while True:
                if time.monotonic() >= end:
                    raise Lost("timeout", "no answer before the deadline; the process was killed")
                if rss_bytes(process.pid) > self._max_rss:
                    raise Lost("crash", "killed for using more memory than its limit")
                for key, _ in selector.select(_LOOK_S):
                    if key.fileobj is process.stdin:
                        data = data[os.write(process.stdin.fileno(), data[:65536]) :]
                        if not data:
                            selector.unregister(process.stdin)
                        continue
                    part = os.read(process.stdout.fileno(), 1 << 16)
                    if not part:
                        code = process.wait(timeout=5)
                        raise Lost("crash", f"the REPL ended with exit code {code}")
                    got += part
                    if len(got) > _MAX_ANSWER:
                        raise Lost("crash", f"more than {_MAX_ANSWER >> 20} MiB of output without an answer")
                    if not data and (answer := _answer(got)) is not None:
                        return answer


class ReplBackend:
    """A Backend over REPL processes; give the command that starts one, for example ["lake", "env", "repl"].

    At most `size` processes, started when needed. `compile` gives no .olean, so verdicts need another backend.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        size: int = 2,
        version: str = "",
        default_header: str = "",
        max_rss: int = 8 << 30,
    ) -> None:
        self._command, self._cwd = list(command), cwd or Path.cwd()
        self._environment = dict(os.environ if environment is None else environment)
        made = [ReplProcess(command, self._cwd, self._environment, max_rss) for _ in range(size)]
        self._all, self._free = made, list(made)
        self._changed = threading.Condition()
        self._header = default_header
        self.capabilities = Capabilities(
            name="repl",
            version=version,
            githash="",
            identity=f"repl {' '.join(command)} {version}",
            default_header=default_header,
        )

    @property
    def search_path(self) -> tuple[Path, ...]:
        """Not known here."""
        return ()

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        """The REPL's command; it takes no files."""
        return [*self._command, *arguments]

    def environment(self) -> Mapping[str, str]:
        """The environment of its processes."""
        return self._environment

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """The REPL gives no .olean file: outcome infra."""
        return _infra(0.0, "the REPL gives no .olean file; judge with a toolchain backend")

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """See Backend. `sorry` is a warning here as everywhere; a header seen before costs nothing."""
        started = time.monotonic()
        end = started + deadline
        process = self._take(end)
        if process is None:
            return _infra(deadline, f"all {len(self._all)} REPL processes were busy for {deadline:g} s")
        try:
            answer = self._run(process, source, end)
        except Lost as error:
            return CompileResult(
                outcome=error.kind,
                rc=None,
                messages=(),
                seconds=time.monotonic() - started,
                detail=str(error),
            )
        finally:
            with self._changed:
                self._free.append(process)
                self._changed.notify()
        seconds = time.monotonic() - started
        if "message" in answer:
            return _infra(seconds, f"the REPL says: {answer['message']}")
        messages = tuple(_from_repl(message) for message in answer.get("messages") or ())
        bad = any(message.severity == "error" for message in messages)
        return CompileResult(outcome="rejected" if bad else "ok", rc=1 if bad else 0, messages=messages, seconds=seconds)

    def close(self) -> None:
        """See Backend."""
        for process in self._all:
            process.stop()

    def _run(self, process: ReplProcess, source: str, end: float) -> dict[str, Any]:
        header, body = split_header(source)
        header = header or self._header
        if not header:
            return process.ask({"cmd": source}, end)
        shift = source[: source.find(body)].count("\n") if body and body in source else 0
        if header not in process.headers:
            answer = process.ask({"cmd": header}, end)
            if any(message["severity"] == "error" for message in answer.get("messages") or ()) or "env" not in answer:
                return answer
            if len(process.headers) >= MAX_HEADERS:
                process.headers.popitem(last=False)
            process.headers[header] = int(answer["env"])
        answer = process.ask({"cmd": body, "env": process.headers[header]}, end)
        for message in answer.get("messages") or ():
            for place in ("pos", "endPos"):
                if message.get(place):
                    message[place]["line"] += shift
        return answer

    def _take(self, end: float) -> ReplProcess | None:
        with self._changed:
            while not self._free:
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    return None
            return self._free.pop()


def _answer(data: bytearray) -> dict[str, Any] | None:
    """The JSON object that the output ends with; None while it is incomplete. Lines before it are a program's output."""
    text = bytes(data).rstrip()
    if not text.endswith(b"}"):
        return None
    start = 0
    while (start := text.find(b"{", start)) >= 0:
        if start == 0 or text[start - 1 : start] == b"\n":
            try:
                found = json.loads(text[start:])
            except ValueError:
                found = None
            if isinstance(found, dict) and found.keys() & {"env", "message", "proofState", "messages", "sorries"}:
                return found
        start += 1
    return None
