"""Recorded answers: run once with a real backend, repeat anywhere. An unknown question is an infra failure, never a guess."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles_lean.backends.base import Backend, Capabilities, CompileResult, Message
from miles_lean.reading import lines_of, read_text


class RecordingBackend:
    """Passes everything on to another backend and writes questions and answers to a file of JSON lines."""

    def __init__(self, backend: Backend, path: Path) -> None:
        self._backend, self._lock = backend, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", encoding="utf-8")
        self._write({"capabilities": asdict(backend.capabilities)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """See Backend; infra failures are not recorded."""
        result = self._backend.elaborate(source, deadline=deadline)
        if result.outcome != "infra":
            entry = {"key": _key(source), **asdict(result), "olean": None}
            self._write(entry)
        return result

    def close(self) -> None:
        """Close the file and the backend."""
        self._file.close()
        self._backend.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()


class ReplayBackend:
    """A Backend that answers from a recording. Raises ValueError when the file is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, CompileResult] = {}
        lines = [line for _, line in lines_of(read_text(path))]
        try:
            first = json.loads(lines[0])["capabilities"]
            recorded = {**first, "name": "replay", "can_olean": False, "can_lsp": False, "can_replay": False}
            self.capabilities = Capabilities(**recorded)
            for line in lines[1:]:
                entry = json.loads(line)
                messages = tuple(Message(**message) for message in entry.pop("messages"))
                key = entry.pop("key")
                self._results[key] = CompileResult(messages=messages, **entry)
        except (IndexError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no recording of Lean's answers: {type(error).__name__}: {error}") from error

    @property
    def search_path(self) -> tuple[Path, ...]:
        """Nothing here."""
        return ()

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        """There is no Lean here. Raises ValueError."""
        raise ValueError(f"{self._path}: a recording has no command line")

    def environment(self) -> Mapping[str, str]:
        """Nothing here."""
        return {}

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """A recording holds no .olean files: outcome infra."""
        return CompileResult(outcome="infra", rc=None, messages=(), seconds=0.0, detail="a recording holds no .olean files")

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """The recorded answer; infra when this source was never asked."""
        found = self._results.get(_key(source))
        if found is None:
            detail = f"{self._path} holds no answer for this source ({len(self._results)} others); record it first"
            return CompileResult(outcome="infra", rc=None, messages=(), seconds=0.0, detail=detail)
        return found

    def close(self) -> None:
        """Nothing to end."""


def _key(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
