"""Attack the judge: every known trick with its honest twin, forged files, mutated files, honest proofs.

Exit code 0: no false accept, no false reject, every reason as expected. 1: something was wrong. 3: no Lean here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles_lean.judge.core import Judge


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--only", default="", metavar="WORD", help="only cases whose name or family holds this word")
    parser.add_argument("--mutants", type=int, default=500, metavar="N", help="mutated files to try; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the mutants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backend", default="auto", help="one with a kernel to call: embedded")
    parser.add_argument("--fail-closed", action="store_true", help="refuse to run when a sandbox layer is missing")
    parser.add_argument("--list", action="store_true", help="print names, families and expected reasons, run nothing")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the corpus, the forgeries and the mutants."""
    from miles_lean.corpus.runner import all_cases, run_corpus
    from miles_lean.judge.core import Judge
    from miles_lean.judge.outside import judge_for
    from miles_lean.judge.pool import Infra

    cases = [case for case in all_cases() if options.only in case.name or options.only in case.family]
    if options.list:
        for case in cases:
            print(f"{case.name:<28} {case.family:<22} {' or '.join(case.reasons)}")
        return 0
    try:
        judge = judge_for(options.backend, workers=options.workers, fail_closed=options.fail_closed)
        if not isinstance(judge, Judge):
            raise ValueError(f"backend {options.backend!r} has no kernel to call; the corpus is for the embedded one")
        with judge:
            judge.warm()
            report = run_corpus(judge, cases, threads=options.workers)
            for result in report.problems:
                print(f"{result.case.name}: {result.problem}", file=sys.stderr)
            print(report)
            wrong = len(report.problems)
            counts: dict[str, object] = {
                "attacks": len(report.results),
                "false_accepts": sum(result.attack.accepted for result in report.results),
                "false_rejects": sum(not result.twin.accepted for result in report.results),
                "problems": wrong,
                "message_reader_accepts": len(report.fooled_readers),
                "reasons": Counter(result.attack.reason for result in report.results),
                "seconds": round(report.seconds, 1),
            }
            if not options.only:
                wrong += _forged(judge, counts) + (
                    _mutated(judge, options.mutants, options.seed, counts) if options.mutants else 0
                )
    except (Infra, RuntimeError) as error:
        print(f"infra: {error}", file=sys.stderr)
        return 3
    if options.json:
        print(json.dumps(counts, indent=1))
    return 1 if wrong else 0


def _forged(judge: Judge, counts: dict[str, object]) -> int:
    from miles_lean.corpus.forgeries import CHALLENGE, SOLUTION, forgeries

    challenge, solution = judge.compile(CHALLENGE).olean, judge.compile(SOLUTION).olean
    wrong, tried = 0, forgeries(challenge, solution)
    for forgery in tried:
        verdict = judge.judge_modules(challenge, forgery.data)
        if verdict.status != "rejected" or verdict.reason not in forgery.reasons:
            wrong += 1
            print(f"forgery {forgery.name}: {verdict}, not {' or '.join(forgery.reasons)}", file=sys.stderr)
    counts |= {"forgeries": len(tried), "forgeries_wrong": wrong}
    print(f"{len(tried)} forged files: {wrong} problems")
    return wrong


def _mutated(judge: Judge, total: int, seed: int, counts: dict[str, object]) -> int:
    from miles_lean.corpus.mutants import PROOFS, mutants

    started, wrong, reasons, left = time.monotonic(), 0, Counter[str](), total
    for index, source in enumerate(PROOFS):
        original = judge.compile(source)
        if not judge.judge_modules(original.olean, original.olean).accepted:
            wrong += 1
            print(f"mutants: the original {index} is not accepted", file=sys.stderr)
        made = mutants(original.olean, -(-left // (len(PROOFS) - index)), seed + index)
        left -= len(made)
        for mutant in made:
            verdict = judge.judge_modules(original.olean, mutant.data)
            reasons[verdict.reason or verdict.status] += 1
            if verdict.status != "rejected":
                wrong += 1
                print(f"mutant of {mutant.declaration}, {mutant.change}: {verdict}", file=sys.stderr)
    total -= left
    counts |= {"mutants": total, "mutants_wrong": wrong, "mutant_reasons": reasons}
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{total} mutants in {time.monotonic() - started:.1f} s: {wrong} problems ({said})")
    return wrong
