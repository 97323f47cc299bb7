"""Supervised examples from proofs that the judge has accepted, and from nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from miles_lean.data.prompts import render
from miles_lean.data.record import Problem
from miles_lean.reward.connect import connect
from miles_lean.reward.function import proof_of, statement_of
from miles_lean.reward.outcome import Outcome
from miles_lean.reward.verifier import Verifier, run


def verified(rows: Sequence[Mapping[str, Any]], *, backend: str = "auto", workers: int = 2) -> list[dict[str, Any]]:
    """The rows {completion, metadata, ...} whose completion proves their statement, in order.

    Raises RuntimeError when the machine failed on any of them: a row that nobody could judge is not silently left out.
    """

    async def everything() -> list[Outcome]:
        async with connect(backend, workers=workers) as verifier:
            return await asyncio.gather(*(_judged(verifier, row) for row in rows))

    outcomes = run(everything())
    failed = [outcome.reason for outcome in outcomes if outcome.status == "infra_error"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} proofs could not be judged; first: {failed[0]}")
    return [dict(row) for row, outcome in zip(rows, outcomes, strict=True) if outcome.status == "accepted"]


def sft_rows(problems: Iterable[Problem], *, prompt: str = "deepseek-v2") -> Iterator[dict[str, Any]]:
    """Rows of the problems that came with a proof, unjudged: give them to `verified`. The answer is one lean4 block."""
    for problem in problems:
        if problem.proof is None:
            continue
        slot = problem.slot
        chat = not isinstance(rendered := render(problem, prompt), str)
        filled = slot.fill(problem.proof)
        answer = f"```lean4\n{filled.rstrip()}\n```" if chat else filled[len(slot.before) :].lstrip("\n").rstrip() + "\n```"
        row = problem.row(rendered, completion=answer)
        row["metadata"]["format"] = prompt if chat else "completion"
        yield row


async def _judged(verifier: Verifier, row: Mapping[str, Any]) -> Outcome:
    metadata = row["metadata"]
    statement = statement_of(metadata)
    try:
        proof = proof_of(str(row["completion"]), str(metadata.get("format") or "auto"), statement)
    except ValueError as error:
        return Outcome(category="bad_form", reason=str(error))
    return await verifier.verify(statement, proof, header=str(metadata.get("header") or ""))
