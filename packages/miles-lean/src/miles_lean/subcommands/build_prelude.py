"""`miles-lean build-prelude`: compile the embedded Lean's prelude into the cache now instead of at the first check."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from miles_lean.embedded.cache import BuildFailed, built, cache_root
from miles_lean.embedded.wheel import NoWheel


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--cache", type=Path, help=f"where to (default: MILES_LEAN_CACHE or {cache_root()})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """0 built or already there, 3 not possible."""
    started = time.monotonic()
    try:
        found = built(root=options.cache)
    except (NoWheel, BuildFailed) as error:
        print(f"miles-lean: {error}", file=sys.stderr)
        return 3
    if options.json:
        print(json.dumps(asdict(found) | {"folder": str(found.folder)}))
    else:
        took = time.monotonic() - started
        print(f"Lean {found.version}, prelude {found.identity[:12]}: {found.folder}")
        print(f"{took:.1f} s; the build took {found.seconds:.1f} s")
    return 0
