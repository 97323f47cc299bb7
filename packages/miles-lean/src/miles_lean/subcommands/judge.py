"""Say whether a solution proves what a challenge leaves open.

Exit code 0: accepted. 1: rejected, with the reason. 2: wrong input, or a challenge that cannot be judged against.
3: infrastructure failure, nothing was learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from miles_lean.judge.compare import STANDARD_AXIOMS, Rules
from miles_lean.reading import read_text


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("challenge", type=Path, help="a Lean file with `sorry` where the proof is asked for")
    parser.add_argument("solution", type=Path, help="a Lean file that proves it; both get the default header if they have none")
    parser.add_argument("--theorem", action="append", default=[], metavar="NAME", help="to be proved; default: all with sorry")
    parser.add_argument("--hole", action="append", default=[], metavar="NAME", help="definition the solution chooses")
    parser.add_argument("--axiom", action="append", default=[], metavar="NAME", help="allow one more axiom")
    parser.add_argument("--allow-native", action="store_true", help="accept the library's compiler axioms (old native_decide)")
    parser.add_argument("--backend", default="auto", help="how to run Lean; see `miles-lean doctor`")
    parser.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS", help="for each of compiling and checking")
    parser.add_argument("--no-sandbox", action="store_true", help="run the solution without walls around it")
    parser.add_argument("--fail-closed", action="store_true", help="refuse to run when a sandbox layer is missing")
    parser.add_argument("--json", action="store_true", help="print the whole verdict as JSON")


def run(options: argparse.Namespace) -> int:
    """Judge two files."""
    from miles_lean.judge.outside import judge_for
    from miles_lean.judge.pool import Infra

    rules = Rules(
        targets=tuple(options.theorem),
        holes=tuple(options.hole),
        axioms=(*STANDARD_AXIOMS, *options.axiom),
        allow_native=options.allow_native,
    )
    challenge, solution = (read_text(path) for path in (options.challenge, options.solution))
    try:
        with judge_for(
            options.backend, deadline_s=options.deadline, sandbox=not options.no_sandbox, fail_closed=options.fail_closed
        ) as judge:
            verdict = judge.verify(challenge, solution, rules)
    except (Infra, RuntimeError) as error:
        print(f"infra: {error}", file=sys.stderr)
        return 3
    print(json.dumps(verdict.as_dict(), ensure_ascii=False, indent=1) if options.json else verdict)
    return verdict.exit_code
