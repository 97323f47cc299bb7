"""Recipes beyond lean-toy: second turns after Lean's words, single tactics, games against a served model (real Lean)."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from miles_lean.backends.discover import find_backend
from miles_lean.recipes import play, repair, rounds, steps, toy
from miles_lean.reward.tactic import tactic
from miles_lean.statement import Statement

FOLDER = Path(toy.__file__).parent


def test_recipes_resolve_and_start_from_their_warm_up() -> None:
    config = pytest.importorskip("miles_core.config.load")
    for name, alphabet in (("lean-repair", repair.ALPHABET), ("lean-tactic", steps.ALPHABET), ("lean-expert", None)):
        train = config.load_config(name)
        warm = config.load_config("lean-toy-sft" if alphabet is None else f"{name}-sft")
        assert train.model.path == f"runs/{warm.run.name}/checkpoints/step_{warm.run.num_steps:06d}/trainer/model"
        assert train.data.eval == warm.data.eval and train.sampling.max_new_tokens == warm.sampling.max_new_tokens
        assert alphabet is None or warm.model.alphabet == alphabet
    expert = config.load_config("lean-expert")
    assert expert.algorithm.advantage == "none" and expert.algorithm.kl_coef == 0.0


# ---------------------------------------------------------------- second turns


def test_attempts_fail_with_the_words_that_are_shown() -> None:
    backend = find_backend()
    rows = list(repair.attempts(size=24, seed=3))
    held_out = list(repair.attempts(size=16, seed=3, split="eval"))
    assert not {row["metadata"]["statement"] for row in rows} & {row["metadata"]["statement"] for row in held_out}
    assert set("".join(row["prompt"] for row in rows + held_out)) <= set(repair.ALPHABET)
    assert len({row["prompt"].rpartition("(")[2] for row in rows}) >= 4, "Lean says different things"
    for row in rows:
        goal, _, rest = row["prompt"].partition(toy.ASK)
        attempt, _, words = rest.rpartition("(")
        assert row["metadata"]["statement"] == toy.statement_of(goal)
        result = backend.elaborate(Statement.parse(toy.statement_of(goal)).fill(attempt), deadline=20.0)
        assert result.outcome == "rejected", attempt
        assert repair.shown(goal, attempt, result.errors[0].text) == row["prompt"] and words.endswith(")")
    backend.close()


def test_demonstrated_second_attempts_are_proofs() -> None:
    backend = find_backend()
    for row in repair.demonstrations(size=6, seed=4):
        assert row["completion"] not in row["prompt"].partition(toy.ASK)[2].rpartition("(")[0]
        source = Statement.parse(row["metadata"]["statement"]).fill(row["completion"])
        assert backend.elaborate(source, deadline=20.0).outcome == "ok", source
    backend.close()


def test_a_models_own_failures_become_the_same_prompts(tmp_path: Path) -> None:
    (row,) = repair.attempts(size=1, seed=5, families="projection")
    goal, _, rest = row["prompt"].partition(toy.ASK)
    metadata = row["metadata"]
    failed = {"text": rest.rpartition("(")[0], "reward": 0.0, "metadata": metadata, "label": "x"}
    solved = {"text": "simp_all", "reward": 1.0, "metadata": metadata, "label": "x"}
    broken = {"text": "exact h", "reward": None, "reward_status": "error", "metadata": metadata, "label": "x"}
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000001.jsonl").write_text("\n".join(map(json.dumps, (failed, solved, broken))))
    assert [found["prompt"] for found in rounds.repairs(run=str(tmp_path))] == [row["prompt"]]
    assert [(found["prompt"], found["completion"]) for found in rounds.solved(run=str(tmp_path))] == [
        (goal + toy.ASK, "simp_all")
    ]


# ---------------------------------------------------------------- tactics


def test_states_are_leans_and_splits_are_disjoint() -> None:
    train, held_out = steps.proofs(size=200, seed=1, split="train"), steps.proofs(size=64, seed=2, split="eval")
    assert not {goal for goal, _, _ in train} & {goal for goal, _, _ in held_out} and len({f for _, f, _ in held_out}) == 6
    rows = list(steps.states(size=12, seed=1))
    assert set("".join(row["prompt"] + row["label"] for row in rows)) <= set(steps.ALPHABET)
    first = rows[0]
    assert first["prompt"].endswith(">") and "⊢" in first["prompt"] and first["metadata"]["before"] == []
    assert steps.ALPHABET in (FOLDER / "lean-tactic-sft.toml").read_text()
    assert repair.ALPHABET in (FOLDER / "lean-repair-sft.toml").read_text()
    with pytest.raises(ValueError, match="leads to LeanError"):
        steps.walk("(h:p∧q):q∧p", "swap", ("constructor", "exact h.1", "exact h.2"), backend := find_backend())
    backend.close()
    with pytest.raises(ValueError, match="split"):
        steps.proofs(size=1, seed=0, split="test")


def test_a_tactic_is_paid_for_where_it_leads() -> None:
    """What the known proof uses, what does as well, what ends the proof at once; not what fails, leads astray or cheats."""
    metadata = {"statement": toy.statement_of("(f:p→q):p→p∧q"), "before": ["intro k", "constructor"]}
    metadata |= {"after": ["apply f", "exact k"], "later": ["apply f", "exact k"]}
    paid = ["exact k", "assumption", "simp_all", " exact k "]
    unpaid = ["exact f", "apply f", "skip", "sorry", "exact k;apply f", "exact k\n  apply f", "", "intro x",
              "set_option debug.skipKernelTC true in decide +kernel", "all_goals sorry", "stop"]  # fmt: skip

    async def scores() -> list[float]:
        found = await asyncio.gather(*(tactic(text, None, metadata) for text in paid + unpaid))
        return [row["score"] for row in found]

    assert asyncio.run(scores()) == [1.0] * len(paid) + [0.0] * len(unpaid)
    with pytest.raises(ValueError, match='"before"'):
        asyncio.run(tactic("rfl", None, {"statement": metadata["statement"]}))


# ---------------------------------------------------------------- games


def known(prompts: Sequence[str]) -> list[str]:
    """Plays the known proofs' tactics by heart."""
    return [BY_HEART[prompt] for prompt in prompts]


BY_HEART: dict[str, str] = {}


def test_whole_theorems_are_proved_tactic_by_tactic() -> None:
    backend = find_backend()
    chosen = steps.proofs(size=6, seed=2, split="eval")
    for goal, family, tactics in chosen:
        BY_HEART.update({row["prompt"]: row["label"] for row in steps.walk(goal, family, tactics, backend)})
    statements = [toy.statement_of(goal) for goal, _, _ in chosen]
    found = play.by_tactics(statements, known, backend)
    assert found == ["\n".join(tactics) for _, _, tactics in chosen]
    forged = ("theorem t : 2 + 2 = 5 := by sorry", "set_option debug.skipKernelTC true in decide +kernel")
    assert play.judged([*statements, forged[0], forged[0]], [*found, forged[1], None]) == 6 / 8
    assert play.by_tactics(statements, known, backend, most=1) == [None] * 6
    for wrong in ("exact h.7", "sorry", "skip", ""):
        assert play.by_tactics(statements, lambda prompts, text=wrong: [text] * len(prompts), backend) == [None] * 6  # type: ignore[misc]
    backend.close()


def test_the_second_turn_sees_what_lean_said() -> None:
    rows = list(toy.theorems(size=8, seed=2, split="eval", families="projection"))
    wrong = "exact h.9"  # after other words the second turn fails, too
    seen: list[str] = []

    def second(prompts: Sequence[str]) -> list[str]:
        seen.extend(prompts)
        return ["simp_all" if "unknown identifier" in prompt else "exact h" for prompt in prompts]

    result = play.by_turns(rows, lambda prompts: ["exact x"] * 6 + [wrong, "simp_all"], second)
    assert result == {"theorems": 8, "first_turn": 1 / 8, "two_turns": 7 / 8} and len(seen) == 7
    assert all(prompt.endswith("exact x(unknown identifier x)") for prompt in seen[:6])


@pytest.fixture
def sglang() -> Iterator[str]:
    """A server with the shape of SGLang's /generate that answers with its prompt reversed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            good = self.path == "/generate" and body["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 5}
            data = json.dumps([{"text": text[::-1]} for text in body["text"]]).encode()
            self.send_response(200 if good else 422)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_a_served_model_is_asked_greedily(sglang: str) -> None:
    assert play.served(sglang, 5)(["abc", "de"]) == ["cba", "ed"] and play.served(sglang, 5)([]) == []
    with pytest.raises(OSError, match="422"):
        play.served(sglang, 6)(["abc"])
