"""`miles-lean doctor`: which Lean installations work here, which backends that gives, and what to install."""

from __future__ import annotations

import argparse
import json

from miles_lean.doctor import survey
from miles_lean.sandbox import probe

HELP = {
    "embedded": 'pip install "miles-lean[embedded]" (Linux x86_64, glibc 2.35 or newer; needs nothing else)',
    "toolchain": "install elan, then in a project: lake exe cache get && lake build (needed for Mathlib)",
    "http": "start a server with `miles-lean serve` (extra server), then use its address as backend",
    "replay": "record answers with miles_lean.backends.replay.RecordingBackend, then use replay:FILE as backend",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON array instead of lines")


def run(options: argparse.Namespace) -> int:
    """0 when something works, 1 when nothing does."""
    found = survey()
    if options.json:
        print(json.dumps([installation.as_dict() for installation in found], indent=1))
    else:
        print("\n".join(map(str, found)))
        for name, state in backends():
            print(f"{name + ' backend':<20} {state}")
        for layer in probe():
            print(f"{'sandbox: ' + layer.name:<28} {'on' if layer.on else f'off: {layer.detail}'}")
        if not any(installation.works for installation in found):
            print("No Lean here. Extraction works without it; checking a proof does not.")
    return 0 if any(installation.works for installation in found) else 1


def backends() -> list[tuple[str, str]]:
    """The backends that can run here, each with its state in words: ready, or what is missing and what to do."""
    states = [("embedded", _embedded()), ("toolchain", _toolchain()), ("repl", _repl())]
    return [*states, ("http", f"ready; {HELP['http']}"), ("replay", f"ready; {HELP['replay']}")]


def _repl() -> str:
    from miles_lean.backends.discover import repl_command

    try:
        return f"ready; {' '.join(repl_command(None))}; says what elaborates, proves nothing (no .olean files)"
    except RuntimeError as error:
        return f"no: {error}"


def _embedded() -> str:
    from miles_lean.embedded.cache import cache_root, identity
    from miles_lean.embedded.wheel import NoWheel, find_wheel

    try:
        wheel = find_wheel()
    except NoWheel as error:
        return f"no: {error}"
    folder = cache_root() / identity(wheel)
    if not (folder / "manifest.json").is_file():
        return "ready; the prelude is compiled at the first check, or now: miles-lean build-prelude"
    return f"ready; prelude in {folder}"


def _toolchain() -> str:
    from pathlib import Path

    from miles_lean.backends.toolchain import NoToolchain, ToolchainBackend, toolchain_name

    here = Path.cwd()
    backend = ToolchainBackend(here if toolchain_name(here) else None)
    try:
        record = backend.capabilities
    except NoToolchain as error:
        return f"no: {error}. {HELP['toolchain']}"
    return f"ready; Lean {record.version} at {backend.lean}, " + ("with Mathlib" if record.has_mathlib else "without Mathlib")
