"""Lean behind HTTP: our own server (elaboration and verdicts), or a Kimina-compatible one (elaboration only)."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from miles_lean.backends.base import Capabilities, CompileResult, Message

ATTEMPTS = 4
"""Tries when the server is busy (429, 503) or the connection breaks, within the deadline."""


class HttpBackend:
    """A Backend whose `elaborate` runs on a server. It has no local files: `compile` says so, `judge` asks our server.

    `kimina=None` finds out by itself: our server answers /health with the Lean it runs. Safe from many threads.
    """

    def __init__(self, address: str, *, api_key: str = "", kimina: bool | None = None, grace_s: float = 30.0) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{address!r} is no server address; write http://HOST:PORT")
        self._parts, self._kimina, self._grace_s = parts, kimina, grace_s
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the server says about itself. Raises OSError when it does not answer."""
        status, body = self._request("GET", "/health", None, 10.0)
        lean = body.get("lean") if status == 200 and isinstance(body, dict) else None
        if not isinstance(lean, dict):
            if status != 200:
                raise OSError(f"{self._parts.geturl()}: /health answered {status}")
            return Capabilities(name="http", version="", githash="", identity=f"kimina {self._parts.geturl()}")
        version, githash, identity = (str(lean[name]) for name in ("version", "githash", "identity"))
        has_mathlib = bool(lean.get("has_mathlib"))
        return Capabilities(name="http", version=version, githash=githash, identity=identity, has_mathlib=has_mathlib)

    @property
    def is_kimina(self) -> bool:
        """Whether the server is only Kimina-compatible."""
        return self.capabilities.identity.startswith("kimina ") if self._kimina is None else self._kimina

    @property
    def search_path(self) -> tuple[Path, ...]:
        """Nothing here: the files are the server's."""
        return ()

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        """There is no command line. Raises ValueError."""
        raise ValueError("a server has no command line; use an embedded or toolchain backend")

    def environment(self) -> Mapping[str, str]:
        """See `command`."""
        return {}

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """A server gives no .olean file: outcome infra."""
        return _infra(0.0, "a server gives no .olean file; judge there, by /v1/verify")

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """See Backend."""
        started = time.monotonic()
        try:
            if self.is_kimina:
                return self._by_kimina(source, deadline, started)
            body = self._ask("/v1/check", {"source": source, "timeout": deadline}, deadline)
            messages = tuple(Message(**message) for message in body["messages"])
            seconds = float(body["times"]["elaborate_s"])
            return CompileResult(
                outcome=body["outcome"], rc=body["rc"], messages=messages, seconds=seconds, detail=str(body["detail"])
            )
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            return _infra(time.monotonic() - started, f"{type(error).__name__}: {error}")

    def judge(self, challenge: str, source: str, name: str, deadline: float) -> Any:
        """The verdict of our server, as a JudgeFunction. The server wants the statement and the proof apart."""
        from miles_lean.reward.verifier import Judged
        from miles_lean.statement import Statement

        try:
            if self.is_kimina:
                return Judged(accepted=False, infra=True, reason="a Kimina server gives no verdicts; it only reads messages")
            statement = Statement.parse(challenge)
            after = statement.after
            if not source.startswith(statement.before) or not source.rstrip().endswith(after.strip()):
                return Judged(accepted=False, reason="the source is not the statement with its slot filled")
            proof = source[len(statement.before) : len(source.rstrip()) - len(after.strip()) if after.strip() else None]
            row = self._ask("/v1/verify", {"statement": challenge, "proof": proof}, deadline)["results"][0]
            accepted, infra = row["status"] == "accepted", row["status"] == "infra_error"
            category = row["category"] if not accepted and not infra else "judge"
            return Judged(
                accepted=accepted, infra=infra, reason=str(row["reason"]), axioms=tuple(row["axioms"]), category=category
            )
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            return Judged(accepted=False, infra=True, reason=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Connections live for one request: nothing to end."""

    def _by_kimina(self, source: str, deadline: float, started: float) -> CompileResult:
        snippet = {"id": "0", "code": source}
        row = self._ask("/api/check", {"snippets": [snippet], "timeout": max(1, round(deadline))}, deadline)["results"][0]
        seconds = float(row.get("time") or time.monotonic() - started)
        error = row.get("error")
        if error is not None:
            outcome = "timeout" if "timed out" in error else "crash" if error.startswith("crash") else "infra"
            return CompileResult(outcome=outcome, rc=None, messages=(), seconds=seconds, detail=str(error))  # type: ignore[arg-type]
        response = row["response"]
        if "message" in response:
            return _infra(seconds, str(response["message"]))
        messages = tuple(_from_repl(message) for message in response.get("messages") or ())
        bad = any(message.severity == "error" for message in messages)
        return CompileResult(outcome="rejected" if bad else "ok", rc=1 if bad else 0, messages=messages, seconds=seconds)

    def _ask(self, path: str, body: Any, deadline: float) -> dict[str, Any]:
        """The answer to a POST, tried again while the server is busy. Raises OSError when there is none."""
        end = time.monotonic() + deadline + self._grace_s
        problem = ""
        for attempt in range(ATTEMPTS):
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                status, answer = self._request("POST", path, body, left)
            except (ConnectionError, http.client.HTTPException) as error:
                problem, wait = f"{type(error).__name__}: {error}", 0.2 * 2**attempt
            else:
                if status == 200:
                    return dict(answer)
                problem = f"{path} answered {status}: {answer.get('detail', '') if isinstance(answer, dict) else ''}"
                if status not in (429, 503):
                    break
                wait = float(answer.get("retry_after_s") or 0.5 * 2**attempt)
            time.sleep(min(wait, max(0.0, end - time.monotonic())))
        raise OSError(f"{self._parts.geturl()}: {problem}")

    def _request(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[int, Any]:
        secure = self._parts.scheme == "https"
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = make(self._parts.hostname or "", self._parts.port, timeout=timeout_s)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self._parts.path.rstrip("/") + path, data, self._headers)
            answer = connection.getresponse()
            raw = answer.read()
            try:
                found = json.loads(raw)
            except ValueError:
                found = {"detail": raw[:200].decode("utf-8", "replace")}
            if isinstance(found, dict) and (wait := answer.getheader("Retry-After")):
                found["retry_after_s"] = float(wait) if wait.isdigit() else None
            return answer.status, found
        finally:
            connection.close()


def _infra(seconds: float, detail: str) -> CompileResult:
    return CompileResult(outcome="infra", rc=None, messages=(), seconds=seconds, detail=detail)


def _from_repl(entry: Mapping[str, Any]) -> Message:
    """A message as the REPL and Kimina write it."""
    severity = {"error": "error", "warning": "warning"}.get(str(entry["severity"]), "information")
    end = entry.get("endPos") or {}
    return Message(
        severity=severity,  # type: ignore[arg-type]
        text=str(entry["data"]),
        line=int(entry["pos"]["line"]),
        column=int(entry["pos"]["column"]),
        end_line=end.get("line"),
        end_column=end.get("column"),
    )
