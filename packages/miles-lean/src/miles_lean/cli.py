"""The `miles-lean` command: doctor, extract."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from miles_lean import __version__
from miles_lean.doctor import survey
from miles_lean.extract import FORMATS, NoProof, extract
from miles_lean.scan import forbidden
from miles_lean.statement import Statement


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 found, 1 nothing found, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="miles-lean", description="Lean 4 proofs in model output: find them, put them in place."
    )
    parser.add_argument("--version", action="version", version=f"miles-lean {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="report which Lean installations this machine has")
    doctor.add_argument("--json", action="store_true", help="print one JSON array instead of lines")
    extraction = commands.add_parser("extract", help="print the Lean code of a model's output")
    extraction.add_argument("file", help='the output, a UTF-8 text file; "-" reads standard input')
    extraction.add_argument("--format", default="auto", choices=["auto", "chat", "completion", *FORMATS])
    extraction.add_argument("--statement", type=Path, help="a Lean file whose proof is open; print it with the proof in place")
    extraction.add_argument("--json", action="store_true", help="print code, kind, closed and forbidden words as JSON")
    options = parser.parse_args(arguments)
    try:
        return _doctor(options.json) if options.command == "doctor" else _extract(options)
    except NoProof as error:
        print(f"miles-lean: {options.file}: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"miles-lean: {error}", file=sys.stderr)
        return 2


def _doctor(as_json: bool) -> int:
    found = survey()
    if as_json:
        print(json.dumps([installation.as_dict() for installation in found], indent=1))
    else:
        print("\n".join(map(str, found)))
        if not any(installation.works for installation in found):
            print("No Lean here. Extraction works without it; checking a proof does not.")
    return 0 if any(installation.works for installation in found) else 1


def _extract(options: argparse.Namespace) -> int:
    text = sys.stdin.read() if options.file == "-" else _read(Path(options.file))
    extraction = extract(text, options.format)
    code = extraction.code
    if options.statement is not None:
        try:
            statement = Statement.parse(_read(options.statement))
        except ValueError as error:
            raise ValueError(f"{options.statement}: {error}") from error
        code = statement.fill(statement.proof_in(code) if extraction.kind == "file" else code)
    findings = forbidden(code)
    if options.json:
        print(
            json.dumps(
                asdict(extraction) | {"code": code, "forbidden": [asdict(finding) for finding in findings]}, ensure_ascii=False
            )
        )
    else:
        print(code)
        for finding in findings:
            print(f"miles-lean: warning: {finding}", file=sys.stderr)
        if not extraction.closed:
            print("miles-lean: warning: the output ends inside the code; it was probably cut off", file=sys.stderr)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
