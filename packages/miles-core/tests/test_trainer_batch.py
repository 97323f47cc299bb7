"""Batches and packing: every trained token once, read from the row that holds its prefix, whatever the budget."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_core.trainer.packing import Microbatch, cut, pack, require_fit, shard
from miles_core.trainer.testing import random_samples
from miles_rollout.wire import Sample


def check(micro: Microbatch, batch: TrainBatch, samples: list[Sample]) -> list[int]:
    """Compare every trained token with the sample it came from; returns the token indices seen."""
    owner = [(s, p) for s, sample in enumerate(samples) for p, m in enumerate(sample.loss_mask) if m]
    for row, target, index in zip(micro.source_index.tolist(), micro.targets.tolist(), micro.token_index.tolist(), strict=True):
        s, position = owner[index]
        assert target == samples[s].token_ids[position]
        assert int(micro.positions[row]) == position - 1
        assert int(micro.token_ids[row]) == samples[s].token_ids[position - 1]
    return micro.token_index.tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(13, 120))
def test_every_trained_token_is_read_once_within_the_budget(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    samples = random_samples(seed)
    rng.shuffle(samples)
    batch = TrainBatch.from_samples(samples, [0.0] * len(samples))
    budget = max(budget, max(batch.last))
    weight_S = batch.loss_weights(range(len(batch.blocks)), "sequence")
    seen: list[int] = []
    for pieces in cut(batch, range(len(batch.blocks)), budget):
        micro = pack(batch, pieces, weight_S)
        assert micro.num_tokens <= budget
        assert micro.num_sequences == int(micro.sequence.max()) + 1
        seen += check(micro, batch, samples)
    assert sorted(seen) == list(range(batch.num_tokens))


def test_a_shared_prompt_is_computed_once_and_again_only_after_a_cut() -> None:
    prompt = (1, 2, 3, 4, 5)
    samples = [
        Sample(
            sample_id=i,
            group_id=0,
            prompt_id="p",
            token_ids=(*prompt, 10 + i, 20 + i, 2),
            loss_mask=(False,) * 5 + (True,) * 3,
            rollout_logprobs=(0.0,) * 8,
        )
        for i in range(6)
    ]
    batch = TrainBatch.from_samples(samples, [0.0] * 6)
    assert batch.blocks == ((0, 1, 2, 3, 4, 5),)
    weight_S = torch.ones(6, dtype=torch.float64)
    assert batch.block_tokens(0) == 5 + 6 * 2  # the last token of a completion predicts nothing
    whole = pack(batch, cut(batch, [0], 17)[0], weight_S)
    assert whole.num_tokens == 17
    assert whole.token_ids.tolist().count(4) == 1
    pieces = cut(batch, [0], 11)
    assert pieces == [[[0, 1, 2]], [[3, 4, 5]]]
    assert [pack(batch, p, weight_S).num_tokens for p in pieces] == [11, 11]


def test_a_completion_of_one_token_needs_only_the_prompt() -> None:
    sample = Sample(
        sample_id=0,
        group_id=0,
        prompt_id="p",
        token_ids=(5, 6, 7),
        loss_mask=(False, False, True),
        rollout_logprobs=(0.0, 0.0, -1.0),
    )
    batch = TrainBatch.from_samples([sample, replace_id(sample, 1)], [1.0, -1.0])
    micro = pack(batch, cut(batch, [0], 99)[0], torch.ones(2, dtype=torch.float64))
    assert micro.token_ids.tolist() == [5, 6] and micro.source_index.tolist() == [1, 1] and micro.targets.tolist() == [7, 7]


def replace_id(sample: Sample, sample_id: int) -> Sample:
    import msgspec

    return msgspec.structs.replace(sample, sample_id=sample_id)


def test_weights_use_the_denominator_of_the_minibatch() -> None:
    samples = random_samples(1, num_groups=6)
    batch = TrainBatch.from_samples(samples, [0.0] * len(samples))
    for part in batch.split(3):
        for reduction in ("token", "sequence"):
            weight_S = batch.loss_weights(part, reduction)
            assert float((weight_S * torch.tensor(batch.num_trained)).sum()) == pytest.approx(1.0, rel=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_minibatches_cover_all_blocks_in_order_and_none_is_empty(sizes: list[int], parts: int) -> None:
    samples = [
        Sample(sample_id=0, group_id=g, prompt_id="", token_ids=(1, 2), loss_mask=(False, True), rollout_logprobs=(0.0, 0.0))
        for g, size in enumerate(sizes)
        for _ in range(size)
    ]
    batch = TrainBatch.from_samples(samples, [0.0] * len(samples))
    split = batch.split(parts)
    assert len(split) == min(parts, len(sizes))
    assert all(split) and [b for part in split for b in part] == list(range(len(sizes)))


def test_equal_groups_split_evenly() -> None:
    samples = [
        Sample(sample_id=0, group_id=g, prompt_id="", token_ids=(1, 2), loss_mask=(False, True), rollout_logprobs=(0.0, 0.0))
        for g in range(8)
        for _ in range(4)
    ]
    assert [len(part) for part in TrainBatch.from_samples(samples, [0.0] * 32).split(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_partition_the_blocks(size: int) -> None:
    samples = random_samples(random.randrange(2**32), num_groups=5)
    batch = TrainBatch.from_samples(samples, [0.0] * len(samples))
    shards = [shard(batch, range(len(batch.blocks)), rank, size) for rank in range(size)]
    assert sorted(b for part in shards for b in part) == list(range(len(batch.blocks)))
    loads = [sum(batch.block_tokens(b) for b in part) for part in shards]
    assert max(loads) - min(loads) <= max(batch.block_tokens(b) for b in range(len(batch.blocks)))


def test_groups_are_scored_and_the_unscored_left_out() -> None:
    samples = [
        Sample(
            sample_id=i,
            group_id=7,
            prompt_id="p",
            token_ids=(1, 2),
            loss_mask=(False, True),
            rollout_logprobs=(0.0, -1.0),
            reward=reward,
            reward_status=status,
        )
        for i, (reward, status) in enumerate([(1.0, "ok"), (None, "error"), (0.0, "ok"), (None, "timeout")])
    ]
    batch = TrainBatch.from_groups(samples, AlgorithmConfig(advantage="mean"))
    assert batch.num_dropped == 2
    assert batch.advantage.tolist() == [0.5, -0.5]


def test_greedy_samples_state_logprobs_at_temperature_one() -> None:
    samples = random_samples(3)
    cold = [replace_temperature(sample, t) for sample, t in zip(samples, [0.0, 0.7] * len(samples), strict=False)]
    batch = TrainBatch.from_samples(cold, [0.0] * len(cold))
    assert batch.temperature[:2].tolist() == pytest.approx([1.0, 0.7])


def replace_temperature(sample: Sample, temperature: float) -> Sample:
    import msgspec

    return msgspec.structs.replace(sample, temperature=temperature)


def test_bad_input_is_named() -> None:
    def sample(**kw: object) -> Sample:
        base = {"sample_id": 3, "group_id": 0, "prompt_id": "train.jsonl:17", "token_ids": (1, 2), "loss_mask": (False, True)}
        return Sample(**{**base, "rollout_logprobs": (0.0, 0.0), **kw})

    with pytest.raises(ValueError, match=r"sample 3 \(prompt train.jsonl:17\): its first token is trained"):
        TrainBatch.from_samples([sample(loss_mask=(True, True))], [0.0])
    with pytest.raises(ValueError, match=r"sample 3.*3 loss_mask entries for 2 token_ids"):
        TrainBatch.from_samples([sample(loss_mask=(False, True, True))], [0.0])
    with pytest.raises(ValueError, match="sample 3: 1 rollout_logprobs for 2"):
        TrainBatch.from_samples([sample(rollout_logprobs=(0.0,))], [0.0])
    with pytest.raises(ValueError, match="sample 3: its advantage nan"):
        TrainBatch.from_samples([sample()], [math.nan])
    with pytest.raises(ValueError, match="as many advantages"):
        TrainBatch.from_samples([sample()], [1.0, 2.0])
    with pytest.raises(ValueError, match="nothing to train on"):
        TrainBatch.from_samples([sample(loss_mask=(False, False))], [0.0])
    with pytest.raises(ValueError, match="nothing to train on"):
        TrainBatch.from_sft([])
    batch = TrainBatch.from_samples(
        [sample(token_ids=(1,) * 9, loss_mask=(False,) + (True,) * 8, rollout_logprobs=(0.0,) * 9)], [0.0]
    )
    with pytest.raises(ValueError, match=r"sample 3.*needs 8 tokens, more than trainer.max_tokens_per_microbatch = 7"):
        require_fit(batch, 7)
    require_fit(batch, 8)


def test_sft_examples() -> None:
    examples = [SftExample((1, 2, 3), (False, True, True), "a.jsonl:1"), SftExample((1, 2), (False, False))]
    batch = TrainBatch.from_sft(examples)
    assert (batch.kind, batch.num_sequences, batch.num_tokens, batch.num_dropped) == ("sft", 1, 2, 1)
    with pytest.raises(ValueError, match=r"a.jsonl:1: its first token"):
        TrainBatch.from_sft([replace(examples[0], loss_mask=(True, True, True))])
