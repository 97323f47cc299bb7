"""Let a served model prove whole held-out theorems: tactic by tactic in the dojo, or in two turns with Lean's words between.

    miles-rollout serve runs/lean-tactic/checkpoints/step_000050/trainer/model --port 8001
    python -m miles_lean.recipes.play tactics http://127.0.0.1:8001
    python -m miles_lean.recipes.play turns http://127.0.0.1:8001 [http://ADDRESS-OF-THE-SECOND-TURN]

Any server with SGLang's /generate will do. Only the judge says what is proved. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from miles_lean.backends.base import Backend
from miles_lean.backends.discover import find_backend
from miles_lean.dojo import Dojo, ProofFinished, TacticState
from miles_lean.recipes import repair, steps, toy
from miles_lean.reward.connect import connect
from miles_lean.reward.verifier import run as run_async
from miles_lean.statement import Statement

Policy = Callable[[Sequence[str]], list[str]]
"""Prompts in, one completion each."""
_TIMEOUT_S = 300.0


def served(address: str, max_new_tokens: int) -> Policy:
    """Greedy completions from an SGLang-compatible server. The policy raises OSError when it does not answer."""

    def policy(prompts: Sequence[str]) -> list[str]:
        if not prompts:
            return []
        body = {"text": list(prompts), "sampling_params": {"temperature": 0.0, "max_new_tokens": max_new_tokens}}
        request = urllib.request.Request(
            f"{address.rstrip('/')}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return [str(row["text"]) for row in json.load(answer)]
        except urllib.error.HTTPError as error:
            raise OSError(f"{address}: {error.code}: {error.read().decode(errors='replace')[:500]}") from error

    return policy


def by_tactics(statements: Sequence[str], policy: Policy, backend: Backend, *, most: int = 8) -> list[str | None]:
    """For each statement the tactics that end the proof, or None: one tactic of the policy at a time, `most` at most.

    A tactic that Lean refuses ends the attempt. Whether what ends the proof proves it is the judge's to say.
    """
    dojos = [Dojo(statement, backend, goals="messages") for statement in statements]
    states: list[TacticState | None] = [dojo.init() for dojo in dojos]
    found: list[str | None] = [None] * len(dojos)
    for _ in range(most):
        open_ = [index for index, state in enumerate(states) if state is not None]
        written = policy([steps.prompt_of(state) for state in states if state is not None])
        for index, tactic in zip(open_, written, strict=True):
            state, states[index] = states[index], None
            assert state is not None
            result = dojos[index].run_tac(state, tactic) if tactic.strip() and "\n" not in tactic else None
            if isinstance(result, TacticState):
                states[index] = result
            elif isinstance(result, ProofFinished):
                found[index] = result.proof
    return found


def by_turns(rows: Sequence[dict[str, Any]], first: Policy, second: Policy) -> dict[str, float]:
    """Share of theorems proved in the first turn, and after a second one that was shown what Lean said to the first."""

    async def play() -> dict[str, float]:
        async with connect() as verifier:
            statements = [Statement.parse(row["metadata"]["statement"]) for row in rows]

            async def verdicts(indices: Sequence[int], proofs: Sequence[str]) -> list[Any]:
                return await asyncio.gather(
                    *(verifier.verify(statements[i], text) for i, text in zip(indices, proofs, strict=True))
                )

            everything = range(len(rows))
            attempts = await asyncio.to_thread(first, [row["prompt"] for row in rows])
            outcomes = await verdicts(everything, attempts)
            failed = [i for i in everything if outcomes[i].status == "rejected"]
            shown = [repair.shown(rows[i]["prompt"].removesuffix(toy.ASK), attempts[i], outcomes[i].reason) for i in failed]
            again = await verdicts(failed, await asyncio.to_thread(second, shown))
        solved = sum(outcome.status == "accepted" for outcome in outcomes)
        return {
            "theorems": len(rows),
            "first_turn": solved / len(rows),
            "two_turns": (solved + sum(outcome.status == "accepted" for outcome in again)) / len(rows),
        }

    return run_async(play())


def judged(statements: Sequence[str], proofs: Sequence[str | None]) -> float:
    """Share of statements whose proof the judge accepts."""

    async def everything() -> int:
        async with connect() as verifier:
            asked = [(Statement.parse(text), proof) for text, proof in zip(statements, proofs, strict=True) if proof is not None]
            outcomes = await asyncio.gather(*(verifier.verify(statement, proof) for statement, proof in asked))
            return sum(outcome.status == "accepted" for outcome in outcomes)

    return run_async(everything()) / len(statements)


def main() -> int:
    """0 when everything was asked and judged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("game", choices=("tactics", "turns"))
    parser.add_argument("address", nargs="+", help="server of the model; for turns, optionally another one for the second turn")
    parser.add_argument("--size", type=int, default=64, help="held-out theorems (default 64)")
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    if options.game == "turns":
        rows = list(toy.theorems(size=options.size, seed=options.seed, split="eval"))
        first, second = served(options.address[0], 32), served(options.address[-1], 32)
        print(json.dumps(by_turns(rows, first, second)))
        return 0
    backend = find_backend()
    try:
        statements = [toy.statement_of(goal) for goal, _, _ in steps.proofs(size=options.size, seed=options.seed, split="eval")]
        found = by_tactics(statements, served(options.address[0], 20), backend)
        finished = sum(proof is not None for proof in found) / len(found)
        print(json.dumps({"theorems": len(found), "finished": finished, "proved": judged(statements, found)}))
    finally:
        backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
