"""Run the corpus against a judge: every attack and every twin, several at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from miles_lean.corpus.case import Case
from miles_lean.corpus.files import reading, resources
from miles_lean.corpus.proofs import axioms, compiled_code, left_open, skip_kernel
from miles_lean.corpus.statements import definitions, statements
from miles_lean.judge.core import Judge, Limits
from miles_lean.judge.verdict import Verdict


def all_cases() -> list[Case]:
    """Every case of source text; forged files are in `forgeries`. Names are unique."""
    makers = (skip_kernel, left_open, axioms, compiled_code, statements, definitions, reading, resources)
    cases = [case for make in makers for case in make()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return cases


@dataclass(frozen=True, slots=True)
class Result:
    """A case with its two verdicts. `reader` says what a checker that trusts exit code and messages would have done."""

    case: Case
    attack: Verdict
    twin: Verdict
    reader: bool

    @property
    def problem(self) -> str:
        """What the judge got wrong; "" when nothing."""
        if self.attack.accepted:
            return "FALSE ACCEPT"
        if self.attack.status != "rejected":
            return f"no verdict on the attack: {self.attack.detail}"
        if self.attack.reason not in self.case.reasons:
            return f"rejected for {self.attack.reason} ({self.attack.detail}), not for {' or '.join(self.case.reasons)}"
        if not self.twin.accepted:
            return f"FALSE REJECT of the twin: {self.twin}"
        return ""


@dataclass(frozen=True, slots=True)
class Report:
    """A run over many cases."""

    results: tuple[Result, ...]
    seconds: float

    @property
    def problems(self) -> tuple[Result, ...]:
        """The cases in which the judge was wrong, or right for another reason than expected."""
        return tuple(result for result in self.results if result.problem)

    @property
    def fooled_readers(self) -> tuple[Result, ...]:
        """The attacks that a checker of exit code and messages would have accepted."""
        return tuple(result for result in self.results if result.reader)

    def __str__(self) -> str:
        accepts = sum(result.attack.accepted for result in self.results)
        rejects = sum(not result.twin.accepted for result in self.results)
        return (
            f"{len(self.results)} attacks and twins in {self.seconds:.1f} s: {accepts} false accepts, {rejects} false rejects, "
            f"{len(self.problems)} problems; a checker of messages would have accepted {len(self.fooled_readers)}"
        )


def message_reader(verdict: Verdict) -> bool:
    """What today's checkers do: no error message, no warning about sorry, Lean ended well."""
    if verdict.reason in ("lean_error", "timeout", "memory", "crash"):
        return False
    return not any(
        message.severity == "error" or (message.severity == "warning" and "sorry" in message.text) for message in verdict.messages
    )


def run_case(judge: Judge, case: Case) -> Result:
    """One attack and its twin. A challenge that does not hold up raises ValueError."""
    limits = replace(judge.limits, compile_s=case.deadline_s, check_s=case.deadline_s)
    attack = judge.verify(case.challenge, case.attack, case.rules, limits)
    generous = Limits(compile_s=max(60.0, case.deadline_s), check_s=60.0)
    twin = judge.verify(case.twin_challenge or case.challenge, case.twin, case.rules, generous)
    return Result(case, attack, twin, message_reader(attack))


def run_corpus(judge: Judge, cases: Iterable[Case] | None = None, *, threads: int = 2) -> Report:
    """All cases, `threads` at once."""
    chosen: Sequence[Case] = list(all_cases() if cases is None else cases)
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        results = tuple(pool.map(lambda case: run_case(judge, case), chosen))
    return Report(results, time.monotonic() - started)
