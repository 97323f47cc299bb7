"""Rollout engine == trainer, bit for bit: every sampled token's log-probability, however the engine came to it.

The engine's side: paged decode, chunked prefill, cached prefixes, forks of one prompt, retraction. The trainer's side:
`Decoder.logprob` over one packed forward of all sequences, each prompt computed once for its completions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from miles_kernels.contract import Contract
from miles_kernels.nn import decoder as decoder_module
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine
from miles_rollout.engines.embedded.weights import make_manifest
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123456789+-*/=() .,!?")
BASE: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
SHAPES = {
    "llama": DecoderConfig(family="llama", tie_word_embeddings=True, **BASE),
    "qwen3": DecoderConfig(family="qwen3", **BASE),
    "qwen3_moe": DecoderConfig(
        family="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True, **BASE
    ),
    "glm4_moe": DecoderConfig(
        family="glm4_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True, n_group=4,
        topk_group=2, routed_scaling_factor=1.5, shared_intermediate_size=48, first_k_dense_replace=1, attention_bias=True,
        use_qk_norm=True, rope=RopeConfig(partial_rotary_factor=0.5), **BASE,
    ),
}  # fmt: skip
ROOMY = EmbeddedConfig(num_pages=600, max_running=64, max_batched_tokens=2048)
CONFIGS = {
    "one at a time": msgspec.structs.replace(ROOMY, max_running=1),
    "all together": ROOMY,
    "small chunks": msgspec.structs.replace(ROOMY, prefill_chunk=13, max_batched_tokens=80),
    "large chunks, no cache": msgspec.structs.replace(ROOMY, prefix_cache=False),
    "short of memory": EmbeddedConfig(num_pages=9, max_running=16, max_batched_tokens=256, prefill_chunk=33),
}


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_requests(rng: random.Random, count: int) -> list[GenerateRequest]:
    common = tuple(rng.randrange(4, TOKENIZER.vocab_size) for _ in range(50))
    requests = []
    for i in range(count):
        own = tuple(rng.randrange(4, TOKENIZER.vocab_size) for _ in range(rng.randint(1, 60)))
        sampling = SamplingParams(
            max_new_tokens=rng.randint(1, 24) if i % 2 else 24,
            ignore_eos=i % 2 == 0,  # the longest ones do run out of memory where there is little
            n=rng.choice([1, 3]) if i % 2 else 3,
            temperature=rng.choice([1.0, 0.8, 0.0]),
            seed=rng.randrange(2**31),
        )
        ids = common[: rng.choice([0, 20, 50])] + own
        requests.append(GenerateRequest(request_id=str(i), input_ids=ids, sampling=sampling, return_prompt_logprobs=i % 4 == 0))
    return requests


def generate(
    decoder: Decoder, config: EmbeddedConfig, requests: list[GenerateRequest]
) -> tuple[list[GenerateResult], dict[str, float]]:
    async def main() -> tuple[list[GenerateResult], dict[str, float]]:
        async with EmbeddedEngine(decoder, TOKENIZER, config) as engine, asyncio.timeout(120):
            results = await asyncio.gather(*[engine.generate(request) for request in requests])
            return list(results), engine.metrics()

    return asyncio.run(main())


def trainer_logprobs(decoder: Decoder, requests: list[GenerateRequest], results: list[GenerateResult]) -> list[list[float]]:
    """Per completion, from one packed forward with autograd on; a prompt is packed once, as parent of its completions."""
    ids: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    source: list[int] = []
    targets: list[int] = []
    temperature: list[float] = []
    counts: list[int] = []
    for request, result in zip(requests, results, strict=True):
        parent = len(lengths)
        last = len(ids) + len(request.input_ids) - 1
        ids += request.input_ids
        lengths.append(len(request.input_ids))
        parents.append(-1)
        for completion in result.completions:
            tokens = completion.token_ids
            source += [last, *range(len(ids), len(ids) + len(tokens) - 1)]
            targets += tokens
            temperature += [request.sampling.temperature or 1.0] * len(tokens)
            counts.append(len(tokens))
            ids += tokens
            lengths.append(len(tokens))
            parents.append(parent)
    plan, positions = packed_plan(lengths, parents)
    hidden = decoder(torch.tensor(ids), positions, PackedKV(plan))
    out = decoder.logprob(hidden[torch.tensor(source)], torch.tensor(targets), torch.tensor(temperature))
    assert out.logprob.requires_grad
    return [part.tolist() for part in out.logprob.detach().split(counts)]


def unequal(results: list[GenerateResult], expected: list[list[float]]) -> int:
    """Tokens whose two log-probabilities differ in any bit."""
    found = [list(completion.logprobs) for result in results for completion in result.completions]
    return sum(a != b for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", SHAPES)
def test_engine_and_trainer_agree_on_every_bit(family: str, dtype: torch.dtype, threads: int):
    seed = random.randrange(10**9)
    requests = make_requests(random.Random(seed), 12)
    decoder = random_decoder(SHAPES[family], seed, dtype=dtype)
    for name, view in decoder.hf_state():
        if name.endswith(CORRECTION):  # zeros would leave a part of the router untested
            view.copy_(torch.linspace(-0.2, 0.2, len(view)))
    outcomes = {}
    for name, config in CONFIGS.items():
        if threads > 1 and name in ("one at a time", "large chunks, no cache"):
            continue
        order = random.Random(seed).sample(requests, len(requests))
        results, metrics = generate(decoder, config, order)
        by_id = {result.request_id: result for result in results}
        outcomes[name] = [by_id[request.request_id] for request in requests]
        if name == "short of memory":
            assert metrics["num_retractions"] > 0
    first = outcomes["all together"]
    for name, results in outcomes.items():
        assert [r.completions for r in results] == [r.completions for r in first], (seed, name)
        assert [r.prompt_logprobs for r in results] == [r.prompt_logprobs for r in first], (seed, name)
    assert unequal(first, trainer_logprobs(decoder, requests, first)) == 0, seed
    assert sum(len(c.token_ids) for r in first for c in r.completions) > 100


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "glm4_moe"])
def test_float8_agrees_too_also_after_a_weight_update(family: str):
    """FP8 contract: the engine reads weights quantised at each swap, the trainer quantises in every forward."""
    seed = random.randrange(10**9)
    requests = make_requests(random.Random(seed), 6)
    shape = dataclasses.replace(SHAPES[family], hidden_size=128, moe_intermediate_size=64 if SHAPES[family].num_experts else 0)
    decoder, new = (random_decoder(shape, seed + i, contract=Contract.reference(precision="fp8")) for i in range(2))
    plain = random_decoder(shape, seed)

    async def main() -> tuple[list[GenerateResult], list[GenerateResult]]:
        async with EmbeddedEngine(decoder, TOKENIZER, CONFIGS["small chunks"]) as engine, asyncio.timeout(120):
            before = await asyncio.gather(*[engine.generate(request) for request in requests])
            assert unequal(before, trainer_logprobs(decoder, requests, before)) == 0, seed
            tensors = [(name, tensor.clone()) for name, tensor in new.hf_state()]
            manifest = make_manifest(tensors, version=1, contract_digest=engine.info().contract_digest)
            await engine.update_weights(manifest, tensors)
            renamed = [msgspec.structs.replace(request, request_id=request.request_id + "-again") for request in requests]
            return before, list(await asyncio.gather(*[engine.generate(request) for request in renamed]))

    before, after = asyncio.run(main())
    assert unequal(after, trainer_logprobs(new, requests, after)) == 0, seed
    assert unequal(before, trainer_logprobs(plain, requests, before)) > 50  # negative control: full precision is another model


def test_without_aligned_ops_tokens_are_unequal(monkeypatch: pytest.MonkeyPatch):
    """Negative control: the same comparison with plain torch linears must notice."""

    def plain(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None, **_: Any
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias).to(out_dtype or x.dtype)

    monkeypatch.setattr(decoder_module, "linear", plain)
    requests = make_requests(random.Random(random.randrange(10**9)), 6)
    different = 0
    for dtype in (torch.float32, torch.bfloat16):
        decoder = random_decoder(SHAPES["qwen3"], 0, dtype=dtype)
        results, _ = generate(decoder, CONFIGS["one at a time"], requests)
        different += unequal(results, trainer_logprobs(decoder, requests, results))
    print("unequal tokens with plain linears:", different)
    assert different > 0
