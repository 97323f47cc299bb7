"""A Lean server worker that elaborates one file again and again; what it imported stays loaded between checks.

The worker is `lean --worker`: one open document, whole-text changes, and the request textDocument/waitForDiagnostics, whose
answer comes after the last diagnostic of that version. Frames are counted by Content-Length, never by blank lines.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from typing import Any, Literal

from miles_lean.backends.base import Backend, CompileResult, Message, Outcome
from miles_lean.lexer import code_tokens
from miles_lean.workers.process import kill_group, rss_bytes

_URI = "file:///Check.lean"
_SEVERITY: dict[int, Literal["error", "warning", "information"]] = {1: "error", 2: "warning", 3: "information", 4: "information"}
_LOOK_S = 0.05
_MAX_FRAME = 64 << 20


class WorkerLost(RuntimeError):
    """The worker process ended or broke the protocol while something was asked of it."""


class Garbled(WorkerLost):
    """The worker wrote something on its channel that Lean's server does not write: native code of the source did."""


class Late(TimeoutError):
    """The deadline passed before the answer came."""


class TooLarge(RuntimeError):
    """The worker used more memory than its limit and was killed."""


class LspWorker:
    """One worker process. Not for several threads at once, except kill().

    `max_uses` and `soft_rss` say when it wants to be replaced (`worn`); `max_rss` is where it is killed in mid-check.
    """

    def __init__(
        self, backend: Backend, *, header: str = "", max_uses: int = 5000, soft_rss: int = 400 << 20, max_rss: int = 2 << 30
    ) -> None:
        self.header, self.max_uses, self.soft_rss, self.max_rss = header, max_uses, soft_rss, max_rss
        self.num_uses = 0
        self._backend = backend
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._version, self._id = 1, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._diagnostics: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process, while one runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def worn(self) -> bool:
        """Whether to replace this worker before its next check."""
        return self.pid is None or self.num_uses >= self.max_uses or rss_bytes(self.pid) > self.soft_rss

    def start(self, deadline: float = 30.0) -> None:
        """Start the process and load the header. Raises WorkerLost, Late or OSError."""
        self.close()
        end = time.monotonic() + deadline
        self._folder = tempfile.TemporaryDirectory(prefix="miles-lean-lsp-")
        self._process = subprocess.Popen(
            self._backend.command(["--worker", "-Dserver.reportDelayMs=0", f"-s{8192}", _URI]),
            cwd=self._folder.name,
            env=dict(self._backend.environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stdin is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        os.set_blocking(self._process.stdin.fileno(), False)
        self._buffer.clear()
        self._version, self.num_uses = 1, 0
        options = {"editDelay": 0, "hasWidgets": False}
        self._send(
            "initialize", {"processId": None, "rootUri": None, "capabilities": {}, "initializationOptions": options}, end, 0
        )
        document = {"uri": _URI, "languageId": "lean", "version": 1, "text": self.header}
        self._send("textDocument/didOpen", {"textDocument": document, "dependencyBuildMode": "never"}, end)
        self._wait(end)

    def check(self, source: str, deadline: float) -> CompileResult:
        """Elaborate a source; starts the process when none runs. Never raises for what Lean or the machine does."""
        started, ready = time.monotonic(), False
        try:
            header = header_of(source)
            if self.pid is None or header != self.header:
                self.header = header
                self.start(deadline)
            ready = True
            messages = self.run(source, deadline - (time.monotonic() - started))
        except Late:
            self.close()
            return self._failed("timeout", started, f"killed after {time.monotonic() - started:.2f} s")
        except TooLarge:
            self.close()
            return self._failed("crash", started, f"killed for using more than {self.max_rss >> 20} MiB")
        except (WorkerLost, OSError) as error:
            code = self._process.poll() if self._process is not None else None
            self.close()
            # A warm server neither ends nor writes nonsense by itself; SIGKILL is how the machine ends it.
            crashed = ready and (isinstance(error, Garbled) or code not in (None, -9))
            return self._failed("crash" if crashed else "infra", started, f"{error} (exit code {code})", code)
        outcome: Outcome = "rejected" if any(message.severity == "error" for message in messages) else "ok"
        seconds = time.monotonic() - started
        return CompileResult(outcome=outcome, rc=None, messages=messages, seconds=seconds)

    def run(self, source: str, deadline: float) -> tuple[Message, ...]:
        """Elaborate a source and return Lean's messages. Raises Late, TooLarge, WorkerLost or OSError."""
        end = time.monotonic() + deadline
        self._version += 1
        self.num_uses += 1
        self._diagnostics = []
        changed = {"textDocument": {"uri": _URI, "version": self._version}, "contentChanges": [{"text": source}]}
        self._send("textDocument/didChange", changed, end)
        self._wait(end)
        lines = source.split("\n")
        return tuple(_message(entry, lines) for entry in self._diagnostics if not entry.get("isSilent"))

    def request(self, method: str, parameters: dict[str, Any], deadline: float) -> Any:
        """Ask the worker about the current document, as $/lean/plainGoal; the answer. `textDocument` is filled in.

        Raises Late, TooLarge or WorkerLost; ValueError with Lean's words when it answers with an error.
        """
        end = time.monotonic() + deadline
        self._id += 1
        self._send(method, {"textDocument": {"uri": _URI}, **parameters}, end, self._id)
        return self._answer(self._id, end)

    def kill(self) -> None:
        """End the process group at once, from any thread; a check in progress then reports infra."""
        with self._lock:
            if self._process is not None and self._process.returncode is None:
                kill_group(self._process.pid)

    def close(self) -> None:
        """End the process and remove its folder; harmless when there is none."""
        process, folder = self._process, self._folder
        self._process = self._folder = None
        if process is not None:
            with self._lock:
                kill_group(process.pid)
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
        if folder is not None:
            folder.cleanup()

    def _failed(self, outcome: Outcome, started: float, detail: str, rc: int | None = None) -> CompileResult:
        return CompileResult(outcome=outcome, rc=rc, messages=(), seconds=time.monotonic() - started, detail=detail)

    def _wait(self, end: float) -> None:
        self._id += 1
        self._send("textDocument/waitForDiagnostics", {"uri": _URI, "version": self._version}, end, self._id)
        self._answer(self._id, end)

    def _send(self, method: str, parameters: dict[str, Any], end: float, number: int | None = None) -> None:
        body: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": parameters}
        if number is not None:
            body["id"] = number
        data = json.dumps(body).encode()
        rest = memoryview(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert self._process is not None and self._process.stdin is not None
        fd = self._process.stdin.fileno()
        while rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                self._pause(end, writing=True)
            except BrokenPipeError:
                raise WorkerLost("the Lean server worker is gone") from None

    def _answer(self, number: int, end: float) -> Any:
        """Read frames until this request's answer; keep the newest diagnostics of the current version."""
        while True:
            frame = self._frame(end)
            if frame.get("id") == number and "method" not in frame:
                if "error" in frame:
                    text = str(frame["error"].get("message", frame["error"]))
                    if number == self._id and "waitForDiagnostics" in text:
                        raise WorkerLost(text)
                    raise ValueError(text)
                return frame.get("result")
            if frame.get("method") == "textDocument/publishDiagnostics":
                parameters = frame["params"]
                if parameters.get("version") == self._version:
                    fresh = parameters["diagnostics"]
                    self._diagnostics = [*self._diagnostics, *fresh] if parameters.get("isIncremental") else fresh

    def _frame(self, end: float) -> dict[str, Any]:
        while True:
            head = self._buffer.find(b"\r\n\r\n")
            if head >= 0:
                size = _content_length(bytes(self._buffer[:head]))
                if len(self._buffer) >= head + 4 + size:
                    body = bytes(self._buffer[head + 4 : head + 4 + size])
                    del self._buffer[: head + 4 + size]
                    try:
                        frame = json.loads(body)
                    except ValueError as error:
                        raise Garbled(f"the Lean server worker sent no JSON: {error}") from None
                    return frame
            elif len(self._buffer) > 4096:
                raise Garbled("the Lean server worker wrote something that is no frame")
            self._read(end)

    def _read(self, end: float) -> None:
        assert self._process is not None and self._process.stdout is not None
        while True:
            try:
                data = os.read(self._process.stdout.fileno(), 1 << 18)
            except BlockingIOError:
                self._pause(end)
                continue
            if not data:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.2)
                raise WorkerLost("the Lean server worker ended")
            self._buffer += data
            if len(self._buffer) > _MAX_FRAME:
                raise Garbled(f"the Lean server worker wrote more than {_MAX_FRAME >> 20} MiB at once")
            return

    def _pause(self, end: float, writing: bool = False) -> None:
        """Wait until the pipe is ready; in between look at the clock and at the worker's memory."""
        assert self._process is not None and self._process.stdout is not None and self._process.stdin is not None
        poll = select.poll()
        if writing:
            poll.register(self._process.stdin.fileno(), select.POLLOUT)
        else:
            poll.register(self._process.stdout.fileno(), select.POLLIN)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise Late
            if poll.poll(max(1, int(min(left, _LOOK_S) * 1000))):
                return
            if rss_bytes(self._process.pid) > self.max_rss:
                raise TooLarge


def header_of(source: str) -> str:
    """The part of a source that says what to import, with what stands before it; "" when it says nothing."""
    if not any(word in source for word in ("import", "prelude", "module")):
        return ""
    end = 0
    tokens = code_tokens(source)
    for index, token in enumerate(tokens):
        if token.text in ("import", "prelude", "module", "public", "meta", "all"):
            end = token.stop
        elif index and tokens[index - 1].text in ("import", "all"):
            end = token.stop
        elif not (token.text == "." or source[end : token.start] == "" and index and end == tokens[index - 1].stop):
            break
        else:
            end = token.stop
    return source[:end] + "\n" if end else ""


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-length" and value.strip().isdigit():
            size = int(value)
            if size > _MAX_FRAME:
                break
            return size
    raise Garbled(f"the Lean server worker sent a wrong header: {head[:100]!r}")


def _message(entry: dict[str, Any], lines: list[str]) -> Message:
    """An LSP diagnostic as a message: lines from 1, columns in code points instead of UTF-16 units."""
    place = entry.get("fullRange") or entry["range"]
    start, end = place["start"], place["end"]
    return Message(
        severity=_SEVERITY.get(entry.get("severity", 1), "error"),
        text=str(entry["message"]),
        line=start["line"] + 1,
        column=_column(lines, start),
        end_line=end["line"] + 1,
        end_column=_column(lines, end),
    )


def _column(lines: list[str], place: dict[str, int]) -> int:
    line = lines[place["line"]] if place["line"] < len(lines) else ""
    units = place["character"]
    if line.isascii():
        return units
    return len(line.encode("utf-16-le", "surrogatepass")[: 2 * units].decode("utf-16-le", "ignore"))
