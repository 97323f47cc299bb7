"""`miles-lean doctor`: which Lean installations work here, and what to install when none does."""

from __future__ import annotations

import argparse
import json

from miles_lean.doctor import survey


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of lines")


def run(options: argparse.Namespace) -> int:
    """0 when something works, 1 when nothing does."""
    found = survey()
    if options.json:
        print(json.dumps([installation.as_dict() for installation in found], indent=1))
    else:
        print("\n".join(map(str, found)))
        if not any(installation.works for installation in found):
            print("No Lean here. Extraction works without it; checking a proof does not.")
    return 0 if any(installation.works for installation in found) else 1
