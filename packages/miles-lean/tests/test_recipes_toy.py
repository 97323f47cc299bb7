"""lean-toy: its theorems, its judged demonstrations, its reward in miles-core, and a policy that only cheats (real Lean)."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from miles_lean.backends.discover import find_backend
from miles_lean.recipes import toy
from miles_lean.recipes.families import FAMILIES, Draws
from miles_lean.reward.function import lean
from miles_lean.statement import Statement


def children() -> set[int]:
    """Process ids of all our descendants."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parent[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    import os

    found: set[int] = {os.getpid()}
    while grown := {pid for pid, above in parent.items() if above in found} - found:
        found |= grown
    return found - {os.getpid()}


def test_every_family_gives_goals_with_two_right_proofs() -> None:
    """Elaborated together in one file: the judge's part is below. The negative control swaps proofs between goals."""
    backend = find_backend()
    rows = [(name, *family(Draws(7, index))) for index in range(6) for name, family in FAMILIES.items()]
    sources = [
        Statement.parse(toy.statement_of(goal).replace("toy", f"t{number}_{kind}")).fill(proof)
        for number, (_, goal, exact, robust) in enumerate(rows)
        for kind, proof in enumerate((exact, robust))
    ]
    result = backend.elaborate("\n".join(sources), deadline=60)
    assert result.outcome == "ok", result.errors[:3]
    swapped = [Statement.parse(toy.statement_of(rows[0][1])).fill(rows[index][2]) for index in (1, 2, 3, 5)]
    assert all(backend.elaborate(source, deadline=20).outcome == "rejected" for source in swapped)
    backend.close()


def test_splits_are_disjoint_and_the_alphabet_is_exact() -> None:
    train = list(toy.theorems(size=1000, seed=1))
    held_out = list(toy.theorems(size=128, seed=2, split="eval"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert len({row["prompt"] for row in held_out}) == 128 and len(Counter(row["label"] for row in held_out)) == len(FAMILIES)
    shown = list(toy.demonstrations(size=200, judged=False, robust=0.5))
    used = set("".join(row["prompt"] + row.get("completion", "") for row in train + held_out + shown))
    assert used == set(toy.ALPHABET) and toy.ALPHABET in (Path(toy.__file__).parent / "lean-toy-sft.toml").read_text()
    assert train[:5] == list(toy.theorems(size=5, seed=1)) != list(toy.theorems(size=5, seed=3))
    for bad in ({"split": "test"}, {"families": "none"}, {"size": 10**6}):
        with pytest.raises(ValueError, match="lean-toy"):
            list(toy.theorems(**bad))  # type: ignore[arg-type]


def test_a_careless_teachers_wrong_proofs_are_judged_away() -> None:
    shown = list(toy.demonstrations(size=16, seed=5, careless=0.2, judged=False))
    kept = {row["prompt"]: row["completion"] for row in toy.demonstrations(size=16, seed=5, careless=0.2)}
    wrong = [row for row in shown if row["prompt"] not in kept]
    assert len(kept) == 16 and len(wrong) >= 1, "some proposals belong to other theorems, and those must be gone"


def test_recipes_are_found_and_resolve() -> None:
    config = pytest.importorskip("miles_core.config.load")
    from miles_core.recipes.catalog import recipe_command, recipe_for

    assert recipe_for("sft", "lean-toy") == "lean-toy-sft" and recipe_command("lean-toy-sft") == "sft"
    train, warm = config.load_config("lean-toy"), config.load_config("lean-toy-sft")
    assert train.reward.name == warm.reward.name == "lean" and warm.model.alphabet == toy.ALPHABET
    assert train.model.path == f"runs/lean-toy-sft/checkpoints/step_{warm.run.num_steps:06d}/trainer/model"
    assert train.data.eval == warm.data.eval and train.run.name == "lean-toy"


def test_the_reward_runs_in_miles_core_and_leaves_no_process() -> None:
    rewards = pytest.importorskip("miles_core.rollout.rewards")
    from miles_core.rollout.config import RewardConfig

    row = {"statement": toy.statement_of("(h:p∧q):q∧p"), "header": "", "format": "raw"}
    texts = ["exact ⟨h.2,h.1⟩", "simp_all", "exact h", "sorry", "set_option debug.skipKernelTC true in decide +kernel"]
    items = [
        rewards.RewardInput(sample_id=number, prompt_id="toy:1", text=text, metadata=row) for number, text in enumerate(texts)
    ]
    before = children()

    async def scores() -> list[object]:
        with rewards.Scorer(RewardConfig(name="lean", timeout_s=60.0)) as scorer:
            return await scorer.score(items)

    found = asyncio.run(scores())
    assert [score.value for score in found] == [1.0, 1.0, 0.0, 0.0, 0.0], found  # type: ignore[attr-defined]
    end = time.monotonic() + 5
    while children() - before and time.monotonic() < end:
        time.sleep(0.05)
    assert not children() - before


ATTACKS_ASKED = 60
"""As many of the corpus as fit into a few seconds; `miles-lean corpus` and its own test run all of them."""


def test_a_policy_that_emits_the_attacks_earns_nothing() -> None:
    """Every attack as a model would write it, whole file and proof alone; right proofs show that the same road pays."""
    from miles_lean.corpus import all_cases

    cases = [case for case in all_cases() if case.deadline_s >= 20.0 and case.challenge.count("sorry") == 1]
    chosen = cases[:: max(1, len(cases) // ATTACKS_ASKED)]

    inside = [
        "sorry", "exact sorryAx _ true", "native_decide", "set_option debug.skipKernelTC true in decide +kernel", "rfl",
        "set_option warn.sorry false in sorry", "exact c\naxiom c : False", "rfl\n#exit", "/- rfl", "open Classical in decide",
    ]  # fmt: skip

    async def reward(challenge: str, answer: str, format: str = "chat") -> float:
        text = f"Here it is.\n```lean4\n{answer}\n```" if format == "chat" else answer
        metadata = {"statement": challenge, "format": format}
        return float((await lean(text, None, metadata, elaborate_s=5.0, judge_s=10.0))["score"])

    async def main() -> tuple[list[float], list[float], list[float]]:
        whole = await asyncio.gather(*(reward(case.challenge, case.attack) for case in chosen))
        slot = await asyncio.gather(*(reward("theorem t : 2 + 2 = 5 := by sorry", text, "raw") for text in inside))
        right = [
            reward("theorem t : 2 + 2 = 4 := by sorry", text) for text in ("theorem t : 2 + 2 = 4 := by rfl", "rfl", "decide")
        ]
        return list(whole), list(slot), list(await asyncio.gather(*right))

    whole, slot, right = asyncio.run(main())
    assert len(whole) >= 50 and set(whole) == {0.0}, [case.name for case, value in zip(chosen, whole, strict=True) if value]
    assert set(slot) == {0.0} and right == [1.0, 1.0, 1.0]
