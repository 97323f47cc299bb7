"""How the embedded engine fails and ends: nobody waits for ever, and one request's fault stays its own."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec
import pytest
from engine_cases import SHAPE, SMALL, TOKENIZER, ask, build, by_hand, gather, run, state, until_idle

from miles_kernels.nn.checkpoint import random_decoder
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine, EngineFailure, load_engine, make_manifest
from miles_rollout.launch import warm_up
from miles_rollout.text import CharTokenizer
from miles_rollout.waits import WaitExpired


def test_an_engine_that_warms_up_has_served_and_keeps_nothing(monkeypatch):
    """Prompts no longer than the context; the control is an engine that does not answer."""
    engine = build()
    run(warm_up(engine))
    figures = engine.metrics()
    assert figures["num_generated_tokens"] == 1 + 8 * 32 + 1 and figures["kv_used_ratio"] == 0
    run(engine.close())
    narrow = build(msgspec.structs.replace(SMALL, max_context=12))
    run(warm_up(narrow))
    assert narrow.metrics()["num_generated_tokens"] == 1 + 3 + 2 + 1 * 6 + 1
    run(narrow.close())
    small = build(msgspec.structs.replace(SMALL, num_pages=4))
    run(warm_up(small))
    assert small.metrics()["num_generated_tokens"] == 1 + (7 + 6 + 5 + 4) + 1, "four rows in a page each"
    run(small.close())
    greedy = build(msgspec.structs.replace(SMALL, draft="ngram", verification="greedy"))
    run(warm_up(greedy))
    assert greedy.metrics()["num_generated_tokens"] == 1 + 8 * 32 + 1
    run(greedy.close())
    monkeypatch.setattr("miles_rollout.launch.WARM_S", 0.05)
    stuck = build()
    monkeypatch.setattr(stuck, "_run", lambda: time.sleep(0.5))
    with pytest.raises(WaitExpired, match="the engine to serve its first requests"):
        run(warm_up(stuck))


def test_a_round_that_is_refused_is_left_out(caplog):
    engine = build(msgspec.structs.replace(SMALL, max_context=1))
    run(warm_up(engine))
    assert engine.metrics()["num_generated_tokens"] == 0 and "of round 2: request 'warm-2-0'" in caplog.text
    run(engine.close())


def test_all_rounds_and_the_flush_share_one_deadline(monkeypatch):
    monkeypatch.setattr("miles_rollout.launch.WARM_S", 0.5)

    async def never() -> None:
        await asyncio.sleep(30)

    engine = build()
    monkeypatch.setattr(engine, "flush_cache", never)
    monkeypatch.setattr(engine, "generate", lambda request: asyncio.sleep(0))
    with pytest.raises(WaitExpired, match=r"waited 0\.5 s for the engine to serve its first requests"):
        run(warm_up(engine))
    run(engine.close())


def test_sequences_longer_than_the_first_tables():
    engine = build(msgspec.structs.replace(SMALL, num_pages=100, prefill_chunk=100, max_batched_tokens=200))
    short, long = (
        ask("short", (4, 5), max_new_tokens=40),
        ask("long", tuple(random.randrange(4, 24) for _ in range(500)), max_new_tokens=12),
    )
    results = run(gather(engine, [short, long]))
    decoder = random_decoder(SHAPE, 0)
    for request in (short, long):
        tokens, logprobs, _ = by_hand(decoder, request, 0)
        assert list(results[request.request_id][0][0].logprobs) == logprobs
        assert list(results[request.request_id][0][0].token_ids) == tokens
    run(engine.close())


def test_siblings_wait_for_a_row_without_computing_their_prompt_again():
    config = EmbeddedConfig(num_pages=64, max_running=2, max_batched_tokens=64, prefix_cache=False)
    requests = [ask("a", tuple(range(4, 24)), n=7, max_new_tokens=4)]
    narrow, wide = build(config), build()
    assert run(gather(narrow, requests)) == run(gather(wide, requests))
    assert narrow.metrics()["num_computed_tokens"] == 20 + 7 * 3
    run(narrow.close())
    run(wide.close())


def test_a_closed_event_loop_does_not_disturb_the_others():
    engine = build()
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.generate(ask("a", max_new_tokens=600)))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert len(run(engine.generate(ask("b"))).completions[0].token_ids) == 8
    task.get_coro().close()
    run(until_idle(engine))
    run(engine.close())
    del task


def test_a_vanished_engine_thread_is_noticed(monkeypatch):
    monkeypatch.setattr("miles_rollout.engines.embedded.engine._LIVENESS_S", 0.05)
    engine = build()
    monkeypatch.setattr(engine, "_run", lambda: None)

    async def main() -> None:
        with pytest.raises(EngineFailure, match="without a word"):
            await engine.generate(ask("a"))
        with pytest.raises(EngineFailure, match="ended"):
            await engine.abort("a")
            engine._replies["b"] = None
            await engine.abort("b")

    run(main())


def test_a_failing_step_tells_everybody_why(monkeypatch):
    engine = build()
    core = engine._core
    assert core is not None
    step, count = core.step, 0

    def failing() -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise MemoryError("no memory for the step")
        return step()

    monkeypatch.setattr(core, "step", failing)

    async def main() -> None:
        calls = [engine.generate(ask(f"{i}", max_new_tokens=100)) for i in range(4)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, EngineFailure) and isinstance(result.__cause__, MemoryError)
            assert "no memory for the step" in str(result)
        with pytest.raises(EngineFailure, match="no memory"):
            await engine.generate(ask("later"))
        with pytest.raises(EngineFailure, match="no memory"):
            new = state(1)
            await engine.update_weights(make_manifest(new, version=1, contract_digest=engine.info().contract_digest), new)
        await engine.close()

    run(main())


def test_a_tokenizer_that_fails_fails_one_request():
    class Picky(CharTokenizer):
        def decode(self, ids: Any, **options: Any) -> str:
            if len(ids) == 3:
                raise ValueError("three tokens are too much")
            return super().decode(ids, **options)

    engine = EmbeddedEngine(random_decoder(SHAPE, 0), Picky(TOKENIZER.alphabet), SMALL)

    async def main() -> None:
        bad, good = await asyncio.gather(
            engine.generate(ask("bad", max_new_tokens=3)), engine.generate(ask("good", max_new_tokens=9)), return_exceptions=True
        )
        assert isinstance(bad, ValueError) and "three tokens" in str(bad)
        assert len(good.completions[0].token_ids) == 9
        await engine.close()

    run(main())


def test_close_aborts_what_runs_and_is_idempotent():
    engine = build()

    async def main() -> None:
        tasks = [asyncio.create_task(engine.generate(ask(f"{i}", max_new_tokens=600))) for i in range(3)]
        await asyncio.sleep(0)
        await engine.close()
        for task in tasks:
            assert (await task).completions[0].finish_reason == "abort"
        await engine.close()
        with pytest.raises(EngineFailure, match="closed"):
            await engine.generate(ask("late"))

    run(main())
    assert engine.metrics()["num_running"] == 0 and engine.info().vocab_size == 24
    idle = build()
    run(idle.close())
    run(idle.close())


def test_load_engine_from_a_directory(tmp_path):
    from miles_kernels.nn.checkpoint import save_decoder

    save_decoder(random_decoder(SHAPE, 0), tmp_path)
    TOKENIZER.save(tmp_path)
    engine, direct = load_engine(tmp_path, SMALL, weight_version=2), build()
    a, b = run(engine.generate(ask("a"))), run(direct.generate(ask("a")))
    assert a.completions[0].logprobs == b.completions[0].logprobs
    assert engine.info().model == str(tmp_path) and engine.info().weight_version == 2
    run(engine.close())
    run(direct.close())
    with pytest.raises(ValueError, match="not a directory"):
        load_engine(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        load_engine(tmp_path, dtype="float16")
