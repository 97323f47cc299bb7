"""The likeliest tokens beside every sampled one: right, and the same whatever else the engine does."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import torch
from engine_cases import SMALL, ask, build, run

from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_rollout.engine import EngineRefusal
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine
from miles_rollout.wire import Completion, GenerateRequest

PROMPT = tuple(4 + i % 17 for i in range(21))


def top(request: GenerateRequest, count: int = 4) -> GenerateRequest:
    return msgspec.structs.replace(request, num_top_logprobs=count)


def expected(decoder: Decoder, ids: tuple[int, ...], found: Completion, temperature: float, count: int) -> torch.Tensor:
    """Log-probabilities [C, V] of one packed forward in float64, for the positions of the completion."""
    plan, positions = packed_plan([len(ids) + len(found.token_ids)])
    with torch.inference_mode():
        hidden = decoder(torch.tensor(ids + found.token_ids), positions, PackedKV(plan))
        logits = decoder.logits(hidden)[len(ids) - 1 : -1].double()
    return torch.log_softmax(logits / (temperature or 1.0), -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_they_are_the_largest_of_the_distribution(temperature: float) -> None:
    async def main() -> None:
        async with build() as engine:
            request = top(ask("a", PROMPT, n=3, seed=5, temperature=temperature, max_new_tokens=12, top_k=3))
            result = await engine.generate(request)
            for completion in result.completions:
                rows = expected(engine._decoder, PROMPT, completion, temperature, 4)
                assert [len(each) for each in completion.top_logprobs] == [4] * 12
                for row, entries, token, logprob in zip(
                    rows, completion.top_logprobs, completion.token_ids, completion.logprobs, strict=True
                ):
                    values, ids = row.topk(4)
                    assert [token_id for token_id, _ in entries] == ids.tolist()
                    assert torch.allclose(torch.tensor([v for _, v in entries], dtype=torch.float64), values, atol=2e-6)
                    told = dict(entries)
                    assert token not in told or told[token] == logprob, "the sampled token has two log-probabilities"
                assert any(dict(e).get(t) == v for e, t, v in zip(
                    completion.top_logprobs, completion.token_ids, completion.logprobs, strict=True))  # fmt: skip

    run(main())


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        EmbeddedConfig(num_pages=10, max_running=8, max_batched_tokens=32, prefill_chunk=5),
        msgspec.structs.replace(SMALL, overlap=True),
        msgspec.structs.replace(SMALL, draft="ngram"),
    ],
    ids=["plain", "tight", "overlap", "ngram"],
)
def test_they_do_not_depend_on_company_or_schedule(config: EmbeddedConfig) -> None:
    async def main(engine: EmbeddedEngine, *requests: GenerateRequest) -> list[tuple[Completion, ...]]:
        async with engine:
            return [result.completions for result in await asyncio.gather(*(engine.generate(each) for each in requests))]

    wanted = top(ask("w", PROMPT, n=2, seed=9, max_new_tokens=20))
    (alone,) = run(main(build(), wanted))
    others = [ask(f"o{i}", (5 + i, 6, 7), seed=i, max_new_tokens=25) for i in range(4)]
    found = run(main(build(config), *others, wanted, top(ask("more", (8, 9), max_new_tokens=9), 7)))
    assert found[4] == alone
    assert all(not completion.top_logprobs for each in found[:4] for completion in each)
    assert all(len(entries) == 7 for entries in found[5][0].top_logprobs)


def test_streams_bring_them_with_their_tokens() -> None:
    async def main() -> None:
        async with build() as engine:
            whole = (await engine.generate(top(ask("w", PROMPT, seed=2)))).completions[0]
            chunks = [chunk async for chunk in engine.stream(top(ask("s", PROMPT, seed=2)))]
            assert tuple(each for chunk in chunks for each in chunk.top_logprobs) == whole.top_logprobs
            assert all(len(chunk.top_logprobs) == len(chunk.token_ids) for chunk in chunks)

    run(main())


def test_what_cannot_be_told_is_refused() -> None:
    async def main(engine: EmbeddedEngine, count: int, words: str) -> None:
        async with engine:
            with pytest.raises(EngineRefusal, match=words):
                await engine.generate(top(ask("r"), count))

    run(main(build(), 21, "num_top_logprobs=21 must lie in 0..20"))
    run(main(build(), -1, "num_top_logprobs=-1"))
