"""The closed loop with the real engine: generate, train, publish, generate; every logprob equal to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.sync.inprocess import publish
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer
from miles_rollout.wire import GenerateRequest, Sample, SamplingParams

TOKENIZER = CharTokenizer("0123456789+-= abcdef")
SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}
MIXTURE = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS = {
    "dense": DecoderConfig(family="qwen3", **SIZES),
    "moe": DecoderConfig(
        family="qwen3_moe",
        **MIXTURE,
    ),
    "glm": DecoderConfig(
        family="glm4_moe",
        shared_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=2,
        routed_scaling_factor=1.5,
        attention_bias=True,
        rope=RopeConfig(partial_rotary_factor=0.5),
        **MIXTURE,
    ),
}
PROMPTS = [tuple(TOKENIZER.encode(text)) for text in ("1+1=", "22+19-3 =", "a", "0 = 7 - 7 abc - ")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(shape: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """Random weights; a router's correction is not zero either."""
    decoder = random_decoder(shape, 0, dtype=dtype)
    for name, view in decoder.hf_state():
        if name.endswith(CORRECTION):
            view.copy_(torch.linspace(-0.2, 0.2, len(view)))
    return decoder


async def rollout(engine: EmbeddedEngine, step: int, temperature: float) -> list[Sample]:
    """Four groups of five; the reward likes even token ids."""

    async def group(number: int, prompt: tuple[int, ...]) -> list[Sample]:
        sampling = SamplingParams(n=5, max_new_tokens=14, temperature=temperature, seed=step)
        result = await engine.generate(GenerateRequest(request_id=f"{step}-{number}", input_ids=prompt, sampling=sampling))
        return [
            Sample(
                sample_id=done.sample_id,
                group_id=number,
                prompt_id=f"p{number}",
                token_ids=(*prompt, *done.token_ids),
                loss_mask=(False,) * len(prompt) + (True,) * len(done.token_ids),
                rollout_logprobs=(0.0,) * len(prompt) + done.logprobs,
                temperature=temperature,
                reward=sum(token % 2 == 0 for token in done.token_ids) / len(done.token_ids),
                reward_status="ok",
            )
            for done in result.completions
        ]

    groups = await asyncio.gather(*(group(number, prompt) for number, prompt in enumerate(PROMPTS)))
    return [sample for members in groups for sample in members]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_every_token_agrees_bitwise_after_every_update(model: str, dtype: torch.dtype) -> None:
    algorithm = AlgorithmConfig()
    trainer = FsdpTrainer(
        drawn(MODELS[model], dtype),
        algorithm,
        TrainerConfig(max_tokens_per_microbatch=90),
        OptimizerConfig(lr=0.01),
    )
    served = drawn(MODELS[model], dtype)

    async def loop() -> list[int]:
        unequal = []
        async with EmbeddedEngine(served, TOKENIZER, EmbeddedConfig(num_pages=64, prefill_chunk=16)) as engine:
            for step in range(1, 4):
                batch = TrainBatch.from_groups(await rollout(engine, step, 0.9 if step == 2 else 1.0), algorithm)
                stats = trainer.step(batch)
                assert stats.num_microbatches > 1
                unequal.append(stats.tokens_unequal)
                if step < 3:
                    await publish(trainer, engine, step)
            stale = TrainBatch.from_groups(await rollout(engine, 4, 1.0), algorithm)  # negative control: not published
            assert trainer.step(stale).tokens_unequal > stale.num_tokens / 2
        return unequal

    assert asyncio.run(loop()) == [0, 0, 0]
