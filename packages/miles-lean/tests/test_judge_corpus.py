"""The adversarial corpus, forged and mutated modules, and the honest proofs: no false accept, no false reject."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from judge_fixtures import shared_judge

from miles_lean.corpus.forgeries import CHALLENGE, SOLUTION, Workshop, forgeries
from miles_lean.corpus.mutants import PROOFS, mutants
from miles_lean.corpus.runner import all_cases, run_corpus
from miles_lean.honest import honest_proofs


@pytest.mark.slow
def test_every_attack_is_refused_for_its_reason_and_every_twin_accepted() -> None:
    """Every second case, for time; `miles-lean corpus` runs all of them, and 500 mutants."""
    cases = all_cases()
    assert len(cases) >= 150 and len({case.family for case in cases[::2]}) == len({case.family for case in cases})
    report = run_corpus(shared_judge(), cases[::2])
    assert not report.problems, "\n".join(f"{result.case.name}: {result.problem}" for result in report.problems)
    # What makes the corpus worth having: a checker of exit code and messages falls for most of it.
    assert len(report.fooled_readers) >= 50


def test_forged_files_are_refused() -> None:
    judge = shared_judge()
    challenge, solution = judge.compile(CHALLENGE).olean, judge.compile(SOLUTION).olean
    shop = Workshop(challenge, solution)
    assert judge.judge_modules(judge.compile(SOLUTION).olean, shop.write(shop.u)).accepted  # the writer itself is fine
    made = forgeries(challenge, solution)
    assert len(made) >= 60
    for forgery in made:
        verdict = judge.judge_modules(challenge, forgery.data)
        assert verdict.status == "rejected" and verdict.reason in forgery.reasons, (forgery.name, str(verdict))


def test_mutants_are_refused() -> None:
    judge = shared_judge()
    for index in (0, 3, 7):
        original = judge.compile(PROOFS[index]).olean
        assert judge.judge_modules(original, original).accepted
        for mutant in mutants(original, 20, seed=index):
            verdict = judge.judge_modules(original, mutant.data)
            assert verdict.status == "rejected", (mutant.declaration, mutant.change, str(verdict))


@pytest.mark.slow
def test_honest_proofs_are_accepted_two_at_a_time() -> None:
    proofs = honest_proofs()[::8]
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda proof: shared_judge().verify(proof.challenge, proof.source), proofs))
    assert len(proofs) > 35
    assert not [(proof.name, str(verdict)) for proof, verdict in zip(proofs, verdicts, strict=True) if not verdict.accepted]
