"""Outcomes, caches, retries and the reward function, around a scripted Lean. What the machine does wrong is never a 0."""

from __future__ import annotations

import asyncio
import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
from lean_doubles import ScriptedBackend, scripted_judge

import miles_lean.reward.function as reward_module
from miles_lean.reward import CATEGORIES, Failed, Outcome, VerdictCache, Verifier, lean, verdict_key
from miles_lean.statement import Statement

STATEMENT = "theorem t : 1 = 1 := by sorry"


def verify(*proofs: str, **options: Any) -> tuple[list[Outcome], ScriptedBackend]:
    """Outcomes of proofs, one after another."""

    async def main() -> tuple[list[Outcome], ScriptedBackend]:
        backend = ScriptedBackend()
        async with Verifier(backend, scripted_judge, retry_s=0.001, **options) as verifier:
            return [await verifier.verify(Statement.parse(STATEMENT), proof) for proof in proofs], backend

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("proof", "category"),
    [
        ("rfl", "proved"),
        ("bad", "lean_error"),
        ("cheat", "judge"),
        ("crash", "crash"),
        ("crash once", "proved"),
        ("hang", "timeout"),
        ("infra", "infra"),
        ("raise", "infra"),
        ("broken", "infra"),
        ("", "bad_form"),
        ("rfl\ntheorem u : 1 = 1 := rfl", "bad_form"),
        ("/- rfl", "bad_form"),
    ],
)
def test_every_way_to_end_has_its_category(proof: str, category: str) -> None:
    (outcome,), backend = verify(proof)
    assert outcome.category == category and outcome.status == CATEGORIES[category] and backend.closed
    assert outcome.reason or category == "proved"


def test_the_machines_failures_are_tried_again_and_then_reported() -> None:
    (flaky,), backend = verify("flaky")
    assert flaky.category == "proved" and flaky.attempts == 3 and backend.num_calls == 3
    (lost,), backend = verify("infra", retries=1)
    assert lost.status == "infra_error" and lost.attempts == 2 and backend.num_calls == 2
    (wrong,), backend = verify("bad")
    assert wrong.attempts == 1 and backend.num_calls == 1


def test_lasting_verdicts_are_remembered_and_others_are_not() -> None:
    outcomes, backend = verify("rfl", "rfl", "bad", "bad", "hang", "hang")
    assert [outcome.cached for outcome in outcomes] == [False, True, False, True, False, False]
    assert backend.num_calls == 4


def test_equal_questions_at_one_time_are_asked_once_and_slots_bound_the_rest() -> None:
    async def main() -> tuple[list[Outcome], ScriptedBackend]:
        backend = ScriptedBackend()
        async with Verifier(backend, scripted_judge, workers=2) as verifier:
            same = [verifier.verify(Statement.parse(STATEMENT), "slow") for _ in range(5)]
            others = [verifier.verify(Statement.parse(STATEMENT), f"slow {i}") for i in range(5)]
            return await asyncio.gather(*same, *others), backend

    outcomes, backend = asyncio.run(main())
    assert {outcome.category for outcome in outcomes} == {"proved"} and backend.num_calls == 6 and backend.most_at_once == 2
    assert sum(outcome.cached for outcome in outcomes) == 4


def test_one_who_leaves_does_not_end_what_others_wait_for() -> None:
    async def main() -> Outcome:
        async with Verifier(ScriptedBackend(), scripted_judge) as verifier:
            first = asyncio.ensure_future(verifier.verify(Statement.parse(STATEMENT), "slow"))
            second = asyncio.ensure_future(verifier.verify(Statement.parse(STATEMENT), "slow"))
            await asyncio.sleep(0.05)
            first.cancel()
            return await second

    assert asyncio.run(main()).category == "proved"


def test_without_a_judge_nothing_is_verified() -> None:
    async def main() -> None:
        async with Verifier(ScriptedBackend()) as verifier:
            await verifier.verify(Statement.parse(STATEMENT), "rfl")

    with pytest.raises(ValueError, match="has no judge"):
        asyncio.run(main())


def test_keys_differ_wherever_a_verdict_could() -> None:
    keys = {
        verdict_key(*parts) for parts in [("a", "b", "c", "d"), ("a", "b", "cd", ""), ("ab", "", "c", "d"), ("a", "b", "c", "e")]
    }
    assert len(keys) == 4 and verdict_key("a", "b", "c", "d") in keys


class FullDisk(io.FileIO):
    """A file with room for so many bytes more."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ab")
        self.room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data)[: self.room]) or 0


@pytest.mark.filterwarnings("ignore:.* are no verdicts of this version")
def test_the_cache_file_survives_damage_and_forgets_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    cache = VerdictCache(path=path)
    cache.put("k1", Outcome(category="proved", axioms=("propext",)))
    cache.put("k2", Outcome(category="timeout"))
    cache.close()
    path.write_text(path.read_text() + "no json\n" + json.dumps({"schema": 99}) + "\n")
    with pytest.warns(UserWarning, match="verdicts.jsonl: 2 lines are no verdicts of this version"):
        again = VerdictCache(path=path)
    found = again.get("k1")
    assert found is not None and found.cached and found.axioms == ("propext",) and again.get("k2") is None
    assert again.num_skipped == 2 and again.num_hits == 1
    again.close()
    full = VerdictCache(path=path)
    assert full._file is not None
    full._file.close()
    full._file = FullDisk(path)
    for number, room in enumerate((0, 9, 1 << 20)):  # nothing fits, a part fits, all fits
        full._file.room = room
        full.put(f"n{number}", Outcome(category="judge", reason="no"))
    assert full.num_unwritten == 2 and full.get("n0") is not None and full.get("n1") is not None
    full.close()
    later = VerdictCache(path=path)
    assert later.get("n1") is None and later.get("n2") is not None and later.get("k1") is not None and later.num_skipped == 3
    later.close()
    small = VerdictCache(size=2)
    for key in "abc":
        small.put(key, Outcome(category="proved"))
    assert small.get("a") is None and small.get("c") is not None


def scored(texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **metadata: Any) -> list[Any]:
    """What `lean` gives or raises for each text."""
    backend = ScriptedBackend()
    monkeypatch.setattr(
        reward_module, "connect", lambda name, cache, **options: Verifier(backend, scripted_judge, retry_s=0.001, **options)
    )

    async def main() -> list[Any]:
        calls = [lean(text, None, {"statement": STATEMENT, **metadata}, log=str(tmp_path / "log.jsonl")) for text in texts]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(main())
    assert backend.closed, "the end of the loop must close the backend"
    return found


def test_the_reward_is_1_or_0_or_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = ["```lean4\nrfl\n```", "```lean4\nbad\n```", "```lean4\ncheat\n```", "```lean4\ninfra\n```", "```python\nx\n```"]
    good, bad, cheat, infra, none = scored(texts, monkeypatch, tmp_path)
    assert (good["score"], bad["score"], cheat["score"], none["score"]) == (1.0, 0.0, 0.0, 0.0)
    assert (cheat["category"], none["category"]) == ("judge", "no_code")
    assert isinstance(infra, Failed) and "after 3 attempts" in str(infra)
    logged = [json.loads(line)["category"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(logged) == ["infra", "judge", "lean_error", "no_code", "proved"]


def test_raw_completions_and_bad_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, empty = scored(["rfl", "  "], monkeypatch, tmp_path, format="raw")
    assert good["score"] == 1.0 and empty["category"] == "no_code"
    (wrong,) = scored(["rfl"], monkeypatch, tmp_path, statement=3)
    assert isinstance(wrong, ValueError)


def test_a_missing_lean_is_said_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from miles_lean.cli import main
    from miles_lean.reward.tactic import tactic

    monkeypatch.setenv("MILES_LEAN_BACKEND", "none")
    for function in (lean, tactic):
        with pytest.raises(RuntimeError, match="nothing here may run Lean"):
            function.ready(workers=1)  # type: ignore[attr-defined]
    assert main(["serve", "--port", "0"]) == 3
    assert "nothing here may run Lean" in capsys.readouterr().err
    lean.ready(backend="http://127.0.0.1:1")  # type: ignore[attr-defined]  # a server may start later
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ELAN_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="lean"):
        lean.ready(backend="toolchain")  # type: ignore[attr-defined]
