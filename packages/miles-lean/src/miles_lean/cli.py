"""The `miles-lean` command: a table of subcommands. Each lives in its own module and is imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("miles_lean.subcommands.doctor", "report which Lean installations this machine has"),
    "check": ("miles_lean.subcommands.check", "run Lean on files and print what it says"),
    "build-prelude": ("miles_lean.subcommands.build_prelude", "compile the embedded prelude into the cache"),
    "bench": ("miles_lean.subcommands.bench", "measure checks per second, latency, memory and restarts on this machine"),
    "extract": ("miles_lean.subcommands.extract", "print the Lean code of a model's output"),
    "judge": ("miles_lean.subcommands.judge", "say whether a solution proves what a challenge leaves open"),
    "corpus": ("miles_lean.subcommands.corpus", "attack the judge with every trick that is known, and with honest twins"),
    "serve": ("miles_lean.subcommands.serve", "answer checks and verdicts over HTTP; Kimina clients work unchanged"),
}
"""Subcommand: its module (see miles_lean.subcommands) and one line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the subcommand's exit code, 2 for wrong input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        _overview().parse_args(given or ["--help"])
        return 2
    place, line = COMMANDS[given[0]]
    command = import_module(place)
    parser = argparse.ArgumentParser(prog=f"miles-lean {given[0]}", description=(command.__doc__ or line).strip())
    command.arguments(parser)
    options = parser.parse_args(given[1:])
    try:
        return int(command.run(options))
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError) and error.filename
        said = f"{error.filename}: no such file; see miles-lean {given[0]} --help" if missing else error  # type: ignore[union-attr]
        print(f"miles-lean: {said}", file=sys.stderr)
        return 2


def _overview() -> argparse.ArgumentParser:
    from miles_lean import __version__

    parser = argparse.ArgumentParser(
        prog="miles-lean", description="Lean 4 proofs in model output: find them, put them in place, check them."
    )
    parser.add_argument("--version", action="version", version=f"miles-lean {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        commands.add_parser(name, help=line)
    return parser
