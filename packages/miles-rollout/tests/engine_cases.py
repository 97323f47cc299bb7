"""What the tests of the embedded engine share: a tiny model, requests, and a naive reference by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable
from typing import Any

import torch

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_kernels.ops.sample import sample
from miles_rollout.engines.embedded import EmbeddedConfig, EmbeddedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.weights.stage import make_manifest, stage
from miles_rollout.wire import GenerateRequest, SamplingParams

TOKENIZER = CharTokenizer("abcdefghijklmnopqrst")
SHAPE = DecoderConfig(
    family="qwen3",
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=640,
    initializer_range=0.3,
)
SMALL = EmbeddedConfig(num_pages=64, max_running=16, max_batched_tokens=64)


def build(config: EmbeddedConfig = SMALL, seed: int = 0, **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(random_decoder(SHAPE, seed), TOKENIZER, config, model="tiny", **options)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(limited())


def ask(request_id: str, ids: tuple[int, ...] = (5, 6, 7), **sampling: Any) -> GenerateRequest:
    options = {"max_new_tokens": 8, "ignore_eos": True, **sampling}
    fields = {name: options.pop(name) for name in ("sample_ids", "return_prompt_logprobs") if name in options}
    return GenerateRequest(request_id=request_id, input_ids=ids, sampling=SamplingParams(**options), **fields)


def batch_of(count: int, seed: int, *, most_prompt: int = 40, most_new: int = 30) -> list[GenerateRequest]:
    """Random requests, half of which start alike, with all kinds of sampling."""
    rng = random.Random(seed)
    common = tuple(rng.randrange(4, 24) for _ in range(35))
    requests = []
    for i in range(count):
        ids = common[: rng.choice([0, 0, 16, 35])] + tuple(rng.randrange(4, 24) for _ in range(rng.randint(1, most_prompt)))
        n = rng.choice([1, 1, 2, 5])
        sampling = {
            "temperature": rng.choice([1.0, 0.7, 0.0, 1.3]),
            "top_k": rng.choice([-1, -1, 5]),
            "top_p": rng.choice([1.0, 0.8]),
            "min_p": rng.choice([0.0, 0.05]),
            "max_new_tokens": rng.randint(1, most_new),
            "ignore_eos": rng.random() < 0.5,
            "seed": rng.randrange(2**40),
        }
        requests.append(
            ask(
                f"r{i}",
                ids,
                n=n,
                sample_ids=tuple(rng.randrange(2**50) for _ in range(n)),
                return_prompt_logprobs=rng.random() < 0.3,
                **sampling,
            )
        )
    return requests


async def gather(engine: EmbeddedEngine, requests: list[GenerateRequest]) -> dict[str, Any]:
    results = await asyncio.gather(*[engine.generate(request) for request in requests])
    return {result.request_id: outcome(result) for result in results}


def outcome(result: Any) -> tuple[Any, ...]:
    """What must not depend on how a request was served."""
    return result.completions, result.prompt_logprobs


@torch.no_grad()
def by_hand(decoder: Decoder, request: GenerateRequest, index: int) -> tuple[list[int], list[float], list[float]]:
    """Oracle: one packed forward of the whole sequence per token, no cache, no batch."""
    s, ids = request.sampling, list(request.input_ids)
    tokens: list[int] = []
    logprobs: list[float] = []
    sampled: list[float] = []
    for _ in range(s.max_new_tokens):
        plan, positions = packed_plan([len(ids)])
        hidden = decoder(torch.tensor(ids), positions, PackedKV(plan))
        out = sample(
            decoder.logits(hidden[-1:]),
            seed=s.seed,
            sample_id=torch.tensor([request.sample_ids[index] if request.sample_ids else index]),
            position=torch.tensor([len(ids)]),
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
        )
        ids.append(int(out.token))
        tokens.append(ids[-1])
        logprobs.append(float(out.logprob))
        sampled.append(float(out.sampled_logprob))
        if ids[-1] in s.stop_token_ids or (not s.ignore_eos and ids[-1] == 2):
            break
    return tokens, logprobs, sampled


async def until_idle(engine: EmbeddedEngine) -> None:
    while engine.metrics()["num_running"] or engine.metrics()["num_queued"]:
        await asyncio.sleep(0.001)


def staged(tensors: Iterable[tuple[str, torch.Tensor]], device: str = "cpu") -> Any:
    """Weights as an engine core swaps them in."""
    pairs = list(tensors)
    return stage(make_manifest(pairs, version=1, contract_digest=""), pairs, device)


def state(seed: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in random_decoder(SHAPE, seed).hf_state()]
