"""A tiny model and random but lifelike batches, for tests of trainers here and elsewhere."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
from torch import Tensor

from miles_core.trainer.batch import TrainBatch
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.wire import Sample

TINY = DecoderConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
"""A decoder that trains in milliseconds; `random_samples` draws from its vocabulary."""


def random_samples(
    seed: int,
    *,
    num_groups: int = 4,
    max_group: int = 5,
    max_prompt: int = 7,
    max_completion: int = 6,
    vocab_size: int = 50,
    temperature: float = 1.0,
    several_turns: bool = True,
) -> list[Sample]:
    """Scored samples in uneven groups; some have a second turn (an untrained stretch inside) or an untrained tail.

    Their rollout_logprobs are made up; `record` replaces them by a trainer's.
    """
    rng = random.Random(seed)
    samples: list[Sample] = []
    for group in range(num_groups):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, max_prompt))]
        for _ in range(rng.randint(1, max_group)):
            mask = [True] * rng.randint(1, max_completion)
            if several_turns and rng.random() < 0.3:
                mask += [False] * rng.randint(1, 3) + [True] * rng.randint(1, 3)
            if several_turns and rng.random() < 0.2:
                mask += [False] * rng.randint(1, 2)
            samples.append(
                Sample(
                    sample_id=len(samples),
                    group_id=group,
                    prompt_id=f"random:{group}",
                    token_ids=(*prompt, *(rng.randrange(vocab_size) for _ in mask)),
                    loss_mask=(*(False for _ in prompt), *mask),
                    rollout_logprobs=(*(0.0 for _ in prompt), *(-rng.random() if trained else 0.0 for trained in mask)),
                    temperature=temperature,
                    reward=rng.random(),
                    reward_status="ok",
                )
            )
    return samples


def record(samples: Sequence[Sample], batch: TrainBatch, logprob: Tensor) -> list[Sample]:
    """The samples with `logprob` [N] of `batch` (made of exactly these samples) as their rollout_logprobs."""
    values = iter(logprob.tolist())
    result = [
        msgspec.structs.replace(sample, rollout_logprobs=tuple(next(values) if trained else 0.0 for trained in sample.loss_mask))
        for sample in samples
    ]
    assert next(values, None) is None and batch.num_dropped == 0
    return result
