"""`miles-lean check FILE...`: does Lean accept these files? Says what Lean says; only `judge` says that something is proved.

Exit code 0: every file was accepted. 1: one was rejected, crashed or ran out of time. 3: something else than the files failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.backends.discover import KNOWN, find_backend
from miles_lean.reading import read_text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help='a Lean file; "-" reads standard input')
    parser.add_argument("--backend", help=f"{KNOWN}; default: MILES_LEAN_BACKEND, a project's toolchain, embedded")
    parser.add_argument("--project", type=Path, help="a folder with a lakefile or lean-toolchain: use its Lean")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds for each file (default 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each file")


def run(options: argparse.Namespace) -> int:
    """See the module."""
    if options.deadline <= 0:
        raise ValueError(f"--deadline {options.deadline:g}: it must be more than 0 seconds")
    sources = [sys.stdin.read() if name == "-" else _read(name) for name in options.files]
    try:
        backend = find_backend(options.backend, project=options.project)
        identity = backend.capabilities.identity
    except RuntimeError as error:
        print(f"miles-lean: {error}", file=sys.stderr)
        return 3
    worst = 0
    try:
        for name, source in zip(options.files, sources, strict=True):
            result = _elaborate(backend, source, options.deadline, shared=len(sources) > 1)
            _report(name, result, identity, options.json)
            worst = max(worst, {"ok": 0, "infra": 3}.get(result.outcome, 1))
    finally:
        backend.close()
    return worst


def _elaborate(backend: Backend, source: str, deadline: float, *, shared: bool) -> CompileResult:
    """One file: a process of its own, which starts faster than a server. Several: one warm server."""
    if shared and backend.capabilities.can_lsp:
        return backend.elaborate(source, deadline=deadline)
    from miles_lean.workers.cli import elaborate_text

    return elaborate_text(backend, source, deadline=deadline)


def _report(name: str, result: CompileResult, identity: str, as_json: bool) -> None:
    if as_json:
        entry = asdict(result) | {"file": name, "identity": identity, "olean": None}
        print(json.dumps(entry, ensure_ascii=False))
        return
    for message in result.messages:
        print(f"{name}:{message}")
    word = {"ok": "accepted"}.get(result.outcome, result.outcome)
    print(f"{name}: {word}" + (f": {result.detail}" if result.detail else ""))


def _read(name: str) -> str:
    return read_text(Path(name))
