"""`miles-lean extract`: print the Lean code of a model's output."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from miles_lean.extract import FORMATS, NoProof, extract
from miles_lean.scan import forbidden
from miles_lean.statement import Statement


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", help='the output, a UTF-8 text file; "-" reads standard input')
    parser.add_argument("--format", default="auto", choices=["auto", "chat", "completion", *FORMATS])
    parser.add_argument("--statement", type=Path, help="a Lean file whose proof is open; print it with the proof in place")
    parser.add_argument("--json", action="store_true", help="print code, kind, closed and forbidden words as JSON")


def run(options: argparse.Namespace) -> int:
    """0 found, 1 no Lean code in the output."""
    text = sys.stdin.read() if options.file == "-" else read(Path(options.file))
    try:
        extraction = extract(text, options.format)
    except NoProof as error:
        print(f"miles-lean: {options.file}: {error}", file=sys.stderr)
        return 1
    code = extraction.code
    if options.statement is not None:
        try:
            statement = Statement.parse(read(options.statement))
        except ValueError as error:
            raise ValueError(f"{options.statement}: {error}") from error
        code = statement.fill(statement.proof_in(code) if extraction.kind == "file" else code)
    findings = forbidden(code)
    if options.json:
        found = asdict(extraction) | {"code": code, "forbidden": [asdict(finding) for finding in findings]}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(code)
    for finding in findings:
        print(f"miles-lean: warning: {finding}", file=sys.stderr)
    if not extraction.closed:
        print("miles-lean: warning: the output ends inside the code; it was probably cut off", file=sys.stderr)
    return 0


def read(path: Path) -> str:
    """The text of a UTF-8 file; ValueError naming it when it is not one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
