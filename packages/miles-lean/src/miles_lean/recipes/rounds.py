"""Data sources made from what an earlier run recorded: its solved problems, and its failures with Lean's own words.

Expert iteration is `miles rollout`, then `miles sft` on `solved`, and again. Error feedback is `miles train` on `repairs`: the
second turn of a conversation whose first turn the earlier run recorded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles_lean.data.prompts import FORMATS, render, repair
from miles_lean.data.record import Problem
from miles_lean.reading import lines_of, read_text
from miles_lean.recipes.repair import shown
from miles_lean.recipes.toy import ASK, statement_of
from miles_lean.reward.connect import connect
from miles_lean.reward.function import proof_of
from miles_lean.reward.function import statement_of as open_statement
from miles_lean.reward.outcome import Outcome
from miles_lean.reward.verifier import run as run_async

_TOY_BEFORE, _TOY_AFTER = statement_of("\0").split("\0")


def solved(*, run: str, prompt: str = "toy") -> Iterator[dict[str, Any]]:
    """Rows {prompt, completion, label, metadata} of completions with reward 1, each different one once: imitate these.

    `run` is a run's folder; `prompt` is "toy" or a prompt format. Raises ValueError when the run solved nothing.
    """
    seen: set[tuple[str, str]] = set()
    for sample in _samples(run):
        key = (str(sample["metadata"].get("statement")), str(sample["text"]))
        if sample.get("reward_status", "ok") == "ok" and (sample.get("reward") or 0.0) >= 1.0 and key not in seen:
            seen.add(key)
            yield _row(sample["metadata"], prompt, sample.get("label")) | {"completion": sample["text"]}
    if not seen:
        raise ValueError(f"{run}: no recorded completion has reward 1; roll out more, or start from a better model")


def repairs(
    *, run: str, prompt: str = "toy", most: int = 1000, backend: str = "auto", workers: int = 2
) -> Iterator[dict[str, Any]]:
    """Rows {prompt, label, metadata} that show a failed attempt and what Lean said to it: reward the second attempt.

    Attempts that timed out, crashed or could not be judged say nothing worth reading and are left out.
    """
    failed: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in _samples(run):
        if sample.get("reward_status", "ok") == "ok" and sample.get("reward") == 0.0:
            failed.setdefault((str(sample["metadata"]["statement"]), str(sample["text"])), sample)
    chosen = list(failed.values())[:most]

    async def outcomes() -> list[Outcome]:
        async with connect(backend, workers=workers) as verifier:
            return await asyncio.gather(*(_outcome(verifier, sample) for sample in chosen))

    for sample, outcome in zip(chosen, run_async(outcomes()), strict=True):
        if outcome.category not in ("lean_error", "judge", "bad_form"):
            continue
        row = _row(sample["metadata"], prompt, sample.get("label"))
        if prompt == "toy":
            row["prompt"] = shown(row["prompt"].removesuffix(ASK), sample["text"], outcome.reason)
        else:
            turn = {"role": "user", "content": repair(_problem(sample["metadata"]), sample["text"], outcome.reason)}
            row["prompt"] = [*row["prompt"], {"role": "assistant", "content": sample["text"]}, turn]
        yield row


async def _outcome(verifier: Any, sample: dict[str, Any]) -> Outcome:
    metadata = sample["metadata"]
    statement = open_statement(metadata)
    try:
        proof = proof_of(sample["text"], str(metadata.get("format") or "auto"), statement)
    except ValueError as error:
        return Outcome(category="bad_form", reason=str(error))
    found: Outcome = await verifier.verify(statement, proof, header=str(metadata.get("header") or ""))
    return found


def _samples(run: str) -> Iterator[dict[str, Any]]:
    files = sorted((Path(run) / "samples").glob("step_*.jsonl"))
    if not files:
        raise ValueError(f"{run}: no recorded samples (samples/step_*.jsonl); make some with miles rollout or miles train")
    for file in files:
        for number, line in lines_of(read_text(file)):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: no recorded sample: {error}") from error


def _row(metadata: dict[str, Any], prompt: str, label: Any) -> dict[str, Any]:
    if prompt == "toy":
        goal = str(metadata["statement"]).removeprefix(_TOY_BEFORE).removesuffix(_TOY_AFTER)
        return {"prompt": goal + ASK, "label": label, "metadata": metadata}
    if isinstance(shown := render(_problem(metadata), prompt), str):
        raise ValueError(
            f"prompt = {prompt!r} is no conversation; use one of {', '.join(f for f in FORMATS if 'seek-v1' not in f)}"
        )
    return {"prompt": shown, "label": label, "metadata": metadata}


def _problem(metadata: dict[str, Any]) -> Problem:
    return Problem(
        problem_id=str(metadata.get("name") or ""), statement=str(metadata["statement"]), header=str(metadata.get("header") or "")
    )
