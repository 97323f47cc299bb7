"""One step ahead of the host: the same results as step by step, whatever happens while tokens are on their way.

On a GPU the tokens of a step arrive while the next one runs. Here the same code runs with the CPU as the device: what is drawn is
looked at one step late.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_cases import SHAPE, SMALL, TOKENIZER, ask, batch_of, build, gather, outcome, run, staged, state
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_rollout.engine import EngineRefusal
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine, make_manifest
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Job
from miles_rollout.engines.embedded.tail import Tail
from miles_rollout.wire import GenerateRequest

AHEAD = msgspec.structs.replace(SMALL, overlap=True)
MOE = DecoderConfig(
    family="qwen3_moe",
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=640,
    initializer_range=0.3,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    mlp_only_layers=(1,),
)


def core_of(config: EmbeddedConfig = AHEAD, seed: int = 0, num_pages: int = 64, shape: DecoderConfig = SHAPE) -> EngineCore:
    return EngineCore(random_decoder(shape, seed), TOKENIZER, config, num_pages=num_pages)


def finish(core: EngineCore, most: int = 3000) -> list[Any]:
    """Step until nothing is left; everything must have been given back."""
    items: list[Any] = []
    for _ in range(most):
        if not core.has_work:
            break
        items += [delivery.item for delivery in core.step()]
    assert not core.has_work, "it does not come to an end"
    metrics = core.metrics()
    assert metrics["kv_used_ratio"] == 0 and metrics["num_running"] == 0 and metrics["num_queued"] == 0
    return items


def serve(requests: list[GenerateRequest], config: EmbeddedConfig) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with build(config) as engine:
            return await gather(engine, requests)

    found: dict[str, Any] = run(main())
    return found


def add(core: EngineCore, *requests: GenerateRequest, stream: bool = False) -> None:
    for i, request in enumerate(requests):
        core.add(Job(request, i, frozenset((2,)), stream))


@pytest.mark.parametrize("seed", range(3))
def test_results_are_those_of_the_engine_that_waits(seed: int):
    requests = batch_of(20, seed)
    expected = serve(requests, SMALL)
    for config in (
        AHEAD,
        msgspec.structs.replace(AHEAD, num_pages=12, max_running=5),
        msgspec.structs.replace(AHEAD, max_running=3, max_batched_tokens=8, prefill_chunk=5, prefix_cache=False),
    ):
        assert serve(requests, config) == expected


def test_a_token_drawn_for_a_finished_sequence_is_dropped(monkeypatch: pytest.MonkeyPatch):
    """And would be noticed if it were not: rows are handed on at once, so it would go to somebody else."""
    requests = [ask(f"r{i}", (5 + i, 6), max_new_tokens=30, ignore_eos=False, stop_token_ids=(7, 9, 11)) for i in range(12)]
    tight = msgspec.structs.replace(AHEAD, max_running=3)
    expected = serve(requests, SMALL)
    assert serve(requests, tight) == expected
    monkeypatch.setattr(Tail, "close", _close_without_a_trace(Tail.close))
    monkeypatch.setattr(Tail, "open", _open_as_before(Tail.open))
    assert serve(requests, tight) != expected


def _close_without_a_trace(close: Any) -> Any:
    def closing(tail: Tail, seq: Any) -> None:
        row = seq.row
        kept = int(tail.serial[row])
        close(tail, seq)
        tail.serial[row] = kept

    return closing


def _open_as_before(open_: Any) -> Any:
    def opening(tail: Tail, seq: Any) -> None:
        before = int(tail.serial[seq.row])
        open_(tail, seq)
        tail.serial[seq.row] = before or 1

    return opening


def test_the_last_token_by_length_is_not_computed_beyond():
    for overlap in (False, True):
        core = core_of(msgspec.structs.replace(SMALL, overlap=overlap))
        with torch.inference_mode():
            add(core, ask("a", (5, 6, 7), max_new_tokens=9))
            finish(core)
        assert core.metrics()["num_computed_tokens"] == 3 + 8


@pytest.mark.parametrize("when", [1, 2, 3, 7])
@torch.inference_mode()
def test_abort_with_a_token_on_its_way(when: int):
    whole = core_of()
    add(whole, ask("a", max_new_tokens=40), ask("b", (9, 8), max_new_tokens=40))
    tokens = {item.request_id: item.completions[0].token_ids for item in finish(whole)}
    core = core_of()
    add(core, ask("a", max_new_tokens=40), ask("b", (9, 8), max_new_tokens=40))
    for _ in range(when):
        assert not core.step()
    (ended,) = core.abort("a")
    completion = ended.item.completions[0]
    assert completion.finish_reason == "abort" and completion.token_ids == tokens["a"][: len(completion.token_ids)]
    assert len(completion.token_ids) == when, "the token on its way belongs to it"
    (other,) = finish(core)
    assert other.completions[0].token_ids == tokens["b"]


@torch.inference_mode()
def test_weights_swapped_with_a_token_on_its_way():
    request = ask("a", max_new_tokens=40)
    old, new = core_of(), core_of(seed=9)
    add(old, request)
    (before,) = finish(old)
    core = core_of()
    add(core, request)
    for _ in range(10):
        core.step()
    core.swap_weights(staged(random_decoder(SHAPE, 9).hf_state()), 1)
    (found,) = finish(core)
    completion = found.completions[0]
    first, second = completion.weight_spans
    assert (first.version, first.start, first.stop, second.version, second.stop) == (0, 0, 10, 1, 40)
    assert completion.token_ids[:10] == before.completions[0].token_ids[:10]
    assert completion.logprobs[:10] == before.completions[0].logprobs[:10]
    add(new, ask("a", request.input_ids + completion.token_ids[:10], max_new_tokens=30))
    (after,) = finish(new)
    assert completion.token_ids[10:] == after.completions[0].token_ids
    assert completion.logprobs[10:] == after.completions[0].logprobs


@torch.inference_mode()
def test_a_request_that_ends_during_a_swap_is_delivered():
    core = core_of()
    add(core, ask("a", max_new_tokens=3))
    for _ in range(3):
        assert not core.step()
    (ready,) = core.swap_weights(staged(random_decoder(SHAPE, 9).hf_state()), 1)
    assert ready.item.completions[0].weight_spans[0].version == 0 and not core.has_work


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_pause_modes(mode: Any, overlap: bool):
    request = ask("a", max_new_tokens=500)
    expected = serve([request], SMALL)

    async def main() -> None:
        engine = build(msgspec.structs.replace(SMALL, overlap=overlap))
        task = asyncio.ensure_future(engine.generate(request))
        while engine.metrics()["num_generated_tokens"] < 20:
            await asyncio.sleep(0.001)
        held = await engine.pause(mode)
        before = engine.metrics()
        late = asyncio.ensure_future(engine.generate(ask("late")))
        await asyncio.sleep(0.02)
        after = engine.metrics()
        assert after["num_generated_tokens"] == before["num_generated_tokens"] and not late.done()
        assert held == (0 if mode == "abort" else 1)
        assert (after["kv_used_ratio"] > 0) == (mode == "in_place")
        if mode == "abort":
            assert (await task).completions[0].finish_reason == "abort"
        await engine.resume()
        assert (await late).completions[0].finish_reason == "length"
        if mode != "abort":
            assert outcome(await task) == expected["a"]
        with pytest.raises(ValueError, match="must be one of abort, retract, in_place"):
            await engine.pause("now")  # type: ignore[arg-type]
        await engine.close()

    run(main())


def test_a_paused_engine_takes_weights_and_aborts_and_closes():
    async def main() -> None:
        engine = build(AHEAD)
        await engine.pause("retract")
        task, other = (asyncio.ensure_future(engine.generate(ask(name))) for name in ("a", "b"))
        await asyncio.sleep(0.01)
        new = state(3)
        await engine.update_weights(make_manifest(new, version=5, contract_digest=engine.info().contract_digest), new)
        assert await engine.abort("b") and (await other).completions[0].token_ids == ()
        await engine.resume()
        assert (await task).completions[0].weight_spans[0].version == 5
        await engine.pause("in_place")
        held = asyncio.ensure_future(engine.generate(ask("c")))
        await asyncio.sleep(0.01)
        await engine.close()
        assert (await held).completions[0].finish_reason == "abort"

    run(main())


@pytest.mark.parametrize("text", [True, False])
@torch.inference_mode()
def test_streams_and_stop_strings_see_every_token_once(text: bool):
    core = core_of()
    request = ask("a", max_new_tokens=60)
    add(core, request)
    (whole,) = finish(core)
    stop = whole.completions[0].text[20:23] if text else whole.completions[0].text[0]
    sampling = msgspec.structs.replace(request.sampling, stop=(stop,))
    results = []
    for config in (SMALL, AHEAD):
        core = core_of(config)
        add(core, msgspec.structs.replace(request, sampling=sampling), ask("b", (6, 9), max_new_tokens=20), stream=True)
        items = finish(core)
        tokens = {
            name: [t for item in items[:] if item.request_id == name and hasattr(item, "index") for t in item.token_ids]
            for name in "ab"
        }
        results.append((tokens, sorted(str(item) for item in items)))
    assert results[0] == results[1]
    assert tuple(results[0][0]["a"]) == whole.completions[0].token_ids[: len(results[0][0]["a"])]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_memory_for_keys_is_never_a_deadlock(seed: int):
    """Any load on a cache that just holds the longest request: everything ends, with the tokens of a roomy engine."""
    rng = random.Random(seed)
    requests = batch_of(rng.randint(1, 8), seed, most_prompt=60, most_new=50)
    most = max(len(r.input_ids) + r.sampling.max_new_tokens for r in requests)
    config = EmbeddedConfig(
        num_pages=-(-most // 16) + rng.randint(0, 4),
        max_running=rng.randint(1, 9),
        max_batched_tokens=rng.randint(9, 80),
        prefill_chunk=rng.randint(1, 70),
        prefix_cache=rng.random() < 0.7,
        overlap=rng.random() < 0.8,
    )
    with torch.inference_mode():
        roomy, tight = core_of(SMALL), core_of(config, num_pages=config.num_pages or 0)
        for core in (roomy, tight):
            add(core, *requests)
        expected = {item.request_id: outcome(item) for item in finish(roomy)}
        assert {item.request_id: outcome(item) for item in finish(tight)} == expected


@torch.inference_mode()
def test_retraction_waits_for_what_is_on_its_way():
    config = msgspec.structs.replace(AHEAD, num_pages=7, prefix_cache=False)
    requests = [ask(f"r{i}", (5, 6 + i), max_new_tokens=60) for i in range(4)]
    core = core_of(config, num_pages=7)
    add(core, *requests)
    found = {item.request_id: outcome(item) for item in finish(core)}
    assert core.metrics()["num_retractions"] > 0
    roomy = core_of(SMALL)
    add(roomy, *requests)
    assert found == {item.request_id: outcome(item) for item in finish(roomy)}


def test_memory_is_given_back_and_taken_again():
    async def main() -> None:
        engine = build(AHEAD)
        request = ask("a", tuple(range(4, 24)))
        before = await engine.generate(request)
        with pytest.raises(ValueError, match=r"unknown tag 'disk', known: weights, kv_cache, cuda_graph"):
            await engine.release_memory(("disk",))
        with pytest.raises(ValueError, match="'weights' has not been released"):
            await engine.resume_memory(("weights",))
        running = asyncio.ensure_future(engine.generate(ask("long", max_new_tokens=600)))
        while engine.metrics()["num_running"] == 0:
            await asyncio.sleep(0.001)
        with pytest.raises(ValueError, match="1 sequences hold keys and values; pause with mode retract or abort first"):
            await engine.release_memory(("kv_cache",))
        await engine.pause("retract")
        await engine.release_memory(("weights", "kv_cache", "cuda_graph"))
        core = engine._core
        assert core is not None
        pools = [part for pair in core._kv.pools for part in pair]
        assert all(part.untyped_storage().nbytes() == 0 for part in [*pools, *core._decoder.parameters()])
        with pytest.raises(ValueError, match="'kv_cache' has been released already"):
            await engine.release_memory(("kv_cache",))
        await engine.resume()
        await engine.resume_memory(("kv_cache", "weights", "cuda_graph"))
        waits = asyncio.ensure_future(engine.generate(msgspec.structs.replace(request, request_id="b")))
        await asyncio.sleep(0.02)
        assert not waits.done(), "tokens from weights nobody has sent"
        new = state(0)
        await engine.update_weights(make_manifest(new, version=1, contract_digest=engine.info().contract_digest), new)
        after = await waits
        assert (after.completions[0].token_ids, after.completions[0].logprobs) == (
            before.completions[0].token_ids,
            before.completions[0].logprobs,
        )
        assert len((await running).completions[0].token_ids) == 600
        await engine.close()

    run(main())


@pytest.mark.parametrize("overlap", [False, True])
@torch.inference_mode()
def test_routed_experts_are_those_of_the_packed_forward(overlap: bool):
    """Also where the prompt came from the prefix cache, was shared by siblings, or the sequence was retracted."""
    config = msgspec.structs.replace(SMALL, overlap=overlap, record_routed_experts=True, num_pages=8, max_running=6)
    core = core_of(config, num_pages=8, shape=MOE)
    decoder = random_decoder(MOE, 0)
    requests = [msgspec.structs.replace(r, return_routed_experts=i % 3 > 0) for i, r in enumerate(batch_of(12, 5))]
    add(core, *requests)
    for result in finish(core):
        request = requests[int(result.request_id[1:])]
        for completion in result.completions:
            if not request.return_routed_experts:
                assert completion.routed_experts is None
                continue
            found = completion.routed_experts
            found.validate()
            ids = request.input_ids + completion.token_ids
            plan, positions = packed_plan([len(ids)])
            routed: dict[int, torch.Tensor] = {}
            decoder(torch.tensor(ids), positions, PackedKV(plan), routed=routed)
            expected = torch.stack([routed[0], routed[2]], 1)[:-1].numpy()
            array = np.frombuffer(found.data, np.uint8).reshape(found.num_tokens, found.num_layers, found.top_k)
            assert np.array_equal(array, expected)
    assert core.metrics()["num_cached_tokens"] > 0 and core.metrics()["num_retractions"] > 0


def test_routed_experts_must_be_recorded_to_be_asked_for():
    request = msgspec.structs.replace(ask("a", max_new_tokens=2), return_routed_experts=True)

    async def main() -> None:
        async with EmbeddedEngine(random_decoder(MOE, 0), TOKENIZER, SMALL) as engine:
            with pytest.raises(EngineRefusal, match="start the engine with record_routed_experts=true"):
                await engine.generate(request)
        async with build() as engine:
            assert (await engine.generate(request)).completions[0].routed_experts is None

    run(main())


def test_the_cache_is_flushed_only_while_nothing_runs():
    async def main() -> None:
        async with build(AHEAD) as engine:
            prompt = tuple(range(4, 24)) * 2
            await engine.generate(ask("a", prompt))
            assert (await engine.generate(ask("b", prompt))).cached_tokens == 32
            running = asyncio.ensure_future(engine.generate(ask("long", max_new_tokens=600)))
            while engine.metrics()["num_running"] == 0:
                await asyncio.sleep(0.001)
            assert not await engine.flush_cache()
            await running
            assert await engine.flush_cache()
            assert (await engine.generate(ask("c", prompt))).cached_tokens == 0

    run(main())
