"""The embedded engine as a whole, on a tiny random decoder: results, stop rules, streaming, aborts, updates, failures."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec
import pytest
import torch
from engine_cases import SHAPE, SMALL, TOKENIZER, ask, batch_of, build, by_hand, gather, outcome, run, state, until_idle

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.decoder import PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_rollout.engine import Engine, EngineRefusal
from miles_rollout.engines.embedded import EmbeddedConfig, make_manifest
from miles_rollout.wire import Completion, GenerateChunk, GenerateRequest, WeightSpan


def test_is_an_engine_and_tells_its_limits():
    engine = build(weight_version=4)
    assert isinstance(engine, Engine)
    info = engine.info()
    assert (info.model, info.weight_version, info.vocab_size, info.max_context, info.max_running) == ("tiny", 4, 24, 640, 16)
    assert info.eos_token_ids == (2,) and info.contract_digest.startswith("mk1-")
    run(engine.close())


def test_completions_equal_a_naive_loop_bit_for_bit():
    engine = build()
    requests = batch_of(6, random.randrange(10**9), most_new=12)
    results = run(gather(engine, requests))
    decoder = random_decoder(SHAPE, 0)
    for request in requests:
        for index, completion in enumerate(results[request.request_id][0]):
            tokens, logprobs, sampled = by_hand(decoder, request, index)
            assert list(completion.token_ids) == tokens
            assert list(completion.logprobs) == logprobs
            assert list(completion.sampled_logprobs) == sampled
            assert completion.index == index and completion.sample_id == request.sample_ids[index]
            assert completion.weight_spans == (WeightSpan(version=0, start=0, stop=len(tokens)),)
            assert completion.finish_reason == ("stop" if tokens[-1] == 2 and not request.sampling.ignore_eos else "length")
    run(engine.close())


def test_results_do_not_depend_on_company_order_budget_or_cache():
    seed = random.randrange(10**9)
    # the last one outgrows the small budgets whatever was drawn: five completions of five pages that run together
    long = ask("long", tuple(range(4, 24)) * 2, n=5, sample_ids=(1, 2, 3, 4, 5), max_new_tokens=30, ignore_eos=True, seed=seed)
    requests = [*batch_of(12, seed), long]

    async def alone() -> dict[str, Any]:
        async with build() as engine:
            return {r.request_id: outcome(await engine.generate(r)) for r in requests}

    async def together(config: EmbeddedConfig, order: list[GenerateRequest]) -> tuple[dict[str, Any], dict[str, float]]:
        async with build(config) as engine:
            return await gather(engine, order), engine.metrics()

    expected = run(alone())
    shuffled = random.sample(requests, len(requests))
    retractions = 0.0
    for config in (
        SMALL,
        EmbeddedConfig(num_pages=8, max_running=8, max_batched_tokens=32, prefill_chunk=5),
        EmbeddedConfig(num_pages=7, max_running=16, max_batched_tokens=512, prefix_cache=False),
        EmbeddedConfig(num_pages=500, max_running=3, max_batched_tokens=300, prefill_chunk=1000),
        EmbeddedConfig(num_pages=40, max_running=16, max_batched_tokens=64, page_size=32),
    ):
        found, metrics = run(together(config, shuffled))
        assert found == expected, (seed, config)
        retractions += metrics["num_retractions"]
        assert metrics["num_running"] == metrics["num_queued"] == metrics["kv_used_ratio"] == 0
    assert retractions > 0, "the small budgets were meant to force retractions"


def test_one_prompt_is_computed_once_for_all_completions():
    engine = build(EmbeddedConfig(num_pages=64, max_running=16, max_batched_tokens=64, prefix_cache=False))
    ids = tuple(random.randrange(4, 24) for _ in range(37))
    result = run(engine.generate(ask("a", ids, n=8, max_new_tokens=3)))
    metrics = engine.metrics()
    assert metrics["num_computed_tokens"] == 37 + 8 * 2
    assert metrics["num_generated_tokens"] == 24 and metrics["num_prompt_tokens"] == 37
    assert len({c.token_ids for c in result.completions}) > 1, "each completion has noise of its own"
    run(engine.close())


def test_prefix_cache_is_used_by_later_requests():
    engine = build()
    ids = tuple(random.randrange(4, 24) for _ in range(40))

    async def main() -> None:
        first = await engine.generate(ask("a", ids, max_new_tokens=20))
        again = await engine.generate(ask("b", ids, max_new_tokens=20))
        turn = await engine.generate(ask("c", ids + first.completions[0].token_ids + (9,), max_new_tokens=2))
        assert (first.cached_tokens, again.cached_tokens, turn.cached_tokens) == (0, 32, 48)
        assert outcome(first) == outcome(again)

    run(main())
    assert engine.metrics()["num_cached_tokens"] == 80
    run(engine.close())


@torch.no_grad()
def test_prompt_logprobs_equal_a_packed_forward_whatever_the_chunks():
    decoder = random_decoder(SHAPE, 0)
    ids = tuple(random.randrange(4, 24) for _ in range(50))
    for temperature in (1.0, 0.6, 0.0):
        plan, positions = packed_plan([len(ids)])
        hidden = decoder(torch.tensor(ids), positions, PackedKV(plan))
        expected = decoder.logprob(hidden[:-1], torch.tensor(ids[1:]), temperature or 1.0).logprob.tolist()
        for chunk in (1, 7, 512):
            engine = build(msgspec.structs.replace(SMALL, prefill_chunk=chunk))
            for request_id in "ab":  # the second time with a warm prefix cache
                result = run(engine.generate(ask(request_id, ids, temperature=temperature, return_prompt_logprobs=True, n=2)))
                assert result.prompt_logprobs == (0.0, *expected)
            run(engine.close())


def test_stop_rules():
    engine = build()
    free = run(engine.generate(ask("free", max_new_tokens=30))).completions[0]
    text = TOKENIZER.decode(free.token_ids)
    stop_id = free.token_ids[10]
    first = free.token_ids.index(stop_id)

    def one(request_id: str, **options: Any) -> Completion:
        return run(engine.generate(ask(request_id, max_new_tokens=30, **options))).completions[0]

    by_id = one("id", stop_token_ids=(stop_id,))
    assert by_id.token_ids == free.token_ids[: first + 1] and by_id.matched_stop == stop_id and by_id.finish_reason == "stop"
    assert by_id.text == TOKENIZER.decode(free.token_ids[:first])
    stop_text = text[12:15]
    where = text.index(stop_text)
    by_text = one("text", stop=(stop_text, "never\n"))
    assert by_text.text == text[:where] and by_text.matched_stop == stop_text and by_text.finish_reason == "stop"
    assert (
        by_text.token_ids == free.token_ids[: len(by_text.token_ids)]
        and by_text.logprobs == free.logprobs[: len(by_text.token_ids)]
    )
    longer = one("min-text", stop=(stop_text,), min_new_tokens=30)
    assert longer.token_ids == free.token_ids
    assert free.finish_reason == "length" and free.text == text and free.matched_stop is None
    run(engine.close())


def test_min_new_tokens_keeps_stop_tokens_away_and_the_logprob_unfiltered():
    engine = build()
    every = tuple(range(4, 22))
    early = run(engine.generate(ask("early", stop_token_ids=every, max_new_tokens=20))).completions[0]
    assert len(early.token_ids) < 10
    result = run(
        engine.generate(ask("late", stop_token_ids=every, max_new_tokens=20, min_new_tokens=10, return_prompt_logprobs=True))
    )
    late = result.completions[0]
    assert len(late.token_ids) > 10 and not set(late.token_ids[:10]) & set(every)
    replay = run(engine.generate(ask("replay", (5, 6, 7) + late.token_ids, max_new_tokens=1, return_prompt_logprobs=True)))
    assert replay.prompt_logprobs[3:] == late.logprobs
    assert all(s > u for s, u in zip(late.sampled_logprobs[:10], late.logprobs[:10], strict=True))
    assert late.sampled_logprobs[10:] == late.logprobs[10:]
    run(engine.close())


def test_stream_gives_the_same_tokens_and_text():
    engine = build()
    request = ask("s", n=3, max_new_tokens=25, stop=("ab", "j"), ignore_eos=False)

    async def main() -> None:
        chunks = [chunk async for chunk in engine.stream(request)]
        result = await engine.generate(request)
        for completion in result.completions:
            mine = [c for c in chunks if c.index == completion.index]
            assert tuple(t for c in mine for t in c.token_ids) == completion.token_ids
            assert tuple(x for c in mine for x in c.logprobs) == completion.logprobs
            assert tuple(x for c in mine for x in c.sampled_logprobs) == completion.sampled_logprobs
            assert "".join(c.text for c in mine) == completion.text
            assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
            assert (mine[-1].finish_reason, mine[-1].matched_stop) == (completion.finish_reason, completion.matched_stop)
            assert {c.weight_version for c in mine} == {0} and isinstance(mine[0], GenerateChunk)

    run(main())
    run(engine.close())


def test_leaving_a_stream_early_aborts_it():
    engine = build()

    async def main() -> None:
        stream = engine.stream(ask("s", max_new_tokens=600))
        async for _ in stream:
            break
        await stream.aclose()
        await until_idle(engine)
        assert engine.metrics()["num_generated_tokens"] < 600
        await engine.generate(ask("s"))  # the id is free again

    run(main())
    run(engine.close())


def test_abort_ends_running_and_queued_requests_with_what_they_have():
    engine = build(EmbeddedConfig(num_pages=64, max_running=1, max_batched_tokens=64))

    async def main() -> None:
        stream = engine.stream(ask("running", max_new_tokens=600))
        first = await anext(stream)
        queued = asyncio.create_task(engine.generate(ask("queued", max_new_tokens=600, n=2, return_prompt_logprobs=True)))
        await asyncio.sleep(0)
        assert await engine.abort("queued") and await engine.abort("running")
        assert not await engine.abort("queued") and not await engine.abort("unknown")
        rest = [chunk async for chunk in stream]
        assert rest[-1].finish_reason == "abort" and rest[-1].token_ids == ()
        assert first.finish_reason is None and 1 <= len(rest) < 600
        result = await queued
        assert [(c.finish_reason, c.token_ids) for c in result.completions] == [("abort", ())] * 2
        assert result.prompt_logprobs is None, "nobody computed them"

    run(main())
    run(engine.close())


def test_cancelling_a_call_aborts_its_request():
    engine = build()

    async def main() -> None:
        task = asyncio.create_task(engine.generate(ask("c", max_new_tokens=600)))
        while not engine.metrics()["num_generated_tokens"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)
        assert engine.metrics()["num_generated_tokens"] < 600 and engine.metrics()["kv_used_ratio"] == 0

    run(main())
    run(engine.close())


def test_refusals_queue_nothing():
    engine = build()

    async def main() -> None:
        for bad in (
            ask("a", ()),
            ask("a", (99,)),
            ask("a", (5,) * 640),
            ask("a", temperature=-1.0),
            ask("a", n=2, sample_ids=(1,)),
        ):
            with pytest.raises(EngineRefusal):
                await engine.generate(bad)
        with pytest.raises(EngineRefusal, match="already"):
            await asyncio.gather(engine.generate(ask("a")), engine.generate(ask("a")))

    run(main())
    assert engine.metrics()["num_prompt_tokens"] <= 3
    run(engine.close())


def test_requests_of_one_gather_enter_the_same_step():
    engine = build()
    run(gather(engine, [ask(f"{i}", (5 + i, 6), max_new_tokens=6) for i in range(10)]))
    assert engine.metrics()["num_steps"] <= 7
    run(gather(engine, [ask(f"{i}", (5 + i, 6), max_new_tokens=6) for i in range(10)]))  # another event loop
    assert engine.metrics()["num_steps"] <= 14
    run(engine.close())


def test_config_without_room_is_refused():
    with pytest.raises(ValueError, match="holds no page; one page of 16 tokens takes 16384 bytes|holds no page"):
        build(EmbeddedConfig(kv_memory_bytes=100))
    with pytest.raises(ValueError, match="page_size=5"):
        build(EmbeddedConfig(page_size=5))


# ---------------------------------------------------------------------- weights


def test_weight_update_changes_results_and_drops_the_prefix_cache():
    engine, other = build(seed=0), build(seed=1)
    request = ask("a", tuple(range(4, 24)) * 2, max_new_tokens=20)
    digest = engine.info().contract_digest

    async def main() -> None:
        before = await engine.generate(request)
        new = state(1)
        await engine.update_weights(make_manifest(new, version=5, contract_digest=digest), iter(new))
        after, expected = await engine.generate(request), await other.generate(request)
        assert after.cached_tokens == 0 and engine.info().weight_version == 5
        assert after.completions[0].logprobs == expected.completions[0].logprobs != before.completions[0].logprobs
        assert after.completions[0].weight_spans == (WeightSpan(version=5, start=0, stop=20),)
        with pytest.raises(ValueError, match="version 5 does not grow"):
            await engine.update_weights(make_manifest(new, version=5, contract_digest=digest), iter(new))

    run(main())
    run(engine.close())
    run(other.close())


def test_running_requests_go_on_under_the_new_weights(monkeypatch):
    engine = build(msgspec.structs.replace(SMALL, num_pages=200))
    core = engine._core
    assert core is not None
    step = core.step
    # on a busy machine the engine would otherwise be done before this thread has read five tokens
    monkeypatch.setattr(core, "step", lambda: (time.sleep(0.001), step())[1])
    new = state(1)
    manifest = make_manifest(new, version=1, contract_digest=engine.info().contract_digest)

    async def main() -> None:
        tokens: list[int] = []
        versions: list[int] = []
        logprobs: list[float] = []
        other = asyncio.create_task(engine.generate(ask("g", (8, 9), max_new_tokens=500, n=2)))
        async for chunk in engine.stream(ask("s", max_new_tokens=500)):
            tokens += chunk.token_ids
            logprobs += chunk.logprobs
            versions.append(chunk.weight_version)
            if len(tokens) == 5:
                await engine.update_weights(manifest, iter(new))
        cut = versions.index(1)
        assert versions == [0] * cut + [1] * (500 - cut) and 5 <= cut < 500
        for old_or_new, seed, part in ((0, 0, slice(0, cut)), (1, 1, slice(cut, 500))):
            reference = build(seed=seed)
            replay = await reference.generate(ask("r", (5, 6, 7, *tokens), max_new_tokens=1, return_prompt_logprobs=True))
            assert list(replay.prompt_logprobs[3:])[part] == logprobs[part], old_or_new
            await reference.close()
        for completion in (await other).completions:
            spans = completion.weight_spans
            assert [s.version for s in spans] in ([0, 1], [1]) and spans[-1].stop == 500 and spans[0].start == 0

    run(main())
    assert engine.metrics()["num_retractions"] == 0, "an update is no KV shortage"
    run(engine.close())


def test_refused_updates_leave_the_old_weights_whole():
    engine = build()
    request = ask("a", max_new_tokens=20)
    digest = engine.info().contract_digest
    good = state(1)
    manifest = make_manifest(good, version=1, contract_digest=digest)
    damaged = [(name, tensor.clone()) for name, tensor in good]
    damaged[-1][1].view(-1)[0] += 1

    def broken() -> Any:
        yield good[0]
        raise OSError("the sender went away")

    async def main() -> None:
        before = await engine.generate(request)
        for bad, tensors, error in (
            (manifest, damaged, "hashes to"),
            (manifest, good[:-1], "did not arrive"),
            (manifest, broken(), "sender went away"),
            (make_manifest(good, version=1, contract_digest="mk1-other"), good, "mk1-other"),
            (make_manifest(good[1:], version=1, contract_digest=digest), good[1:], "missing"),
            (make_manifest([(n, t.double()) for n, t in good], version=1, contract_digest=digest), good, "float64"),
        ):
            with pytest.raises((ValueError, OSError), match=error):
                await engine.update_weights(bad, iter(tensors))
        assert engine.info().weight_version == 0
        assert outcome(await engine.generate(request)) == outcome(before)

    run(main())
    run(engine.close())


def test_nan_weights_fail_requests_and_not_the_engine():
    engine = build()
    digest = engine.info().contract_digest
    sick, well = state(0), state(0)
    for name, tensor in sick:
        if "norm" in name:
            tensor.fill_(float("nan"))

    async def main() -> None:
        expected = await engine.generate(ask("a", n=4))
        await engine.update_weights(make_manifest(sick, version=1, contract_digest=digest), sick)
        results = await asyncio.gather(*[engine.generate(ask(f"{i}", n=2)) for i in range(5)], return_exceptions=True)
        assert all(isinstance(r, ArithmeticError) and "weight version 1" in str(r) for r in results)
        await engine.update_weights(make_manifest(well, version=2, contract_digest=digest), well)
        again = await engine.generate(ask("a", n=4))
        assert [c.logprobs for c in again.completions] == [c.logprobs for c in expected.completions]
        assert engine.metrics()["kv_used_ratio"] == 0

    run(main())
    run(engine.close())
