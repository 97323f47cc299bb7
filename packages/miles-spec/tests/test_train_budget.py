"""What a step costs by counting, and which sequences are learnt from within a share of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_spec.models import Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft
from miles_spec.train import DraftTrainConfig, DraftTrainer, Rollout
from miles_spec.train.budget import DraftCost, choose, policy_cost

SHAPE = DecoderConfig(
    family="qwen3", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


def rollouts_of(seed: int, count: int = 30) -> list[Rollout]:
    rng = random.Random(seed)
    sizes = [rng.randrange(4, 30) for _ in range(count)]
    return [
        Rollout(token_ids=torch.zeros(size, dtype=torch.int64), loss_mask=torch.arange(size) >= size // 3, sample_id=7 * i)
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("experts", [0, 6])
def test_operations_are_those_of_the_matrices(experts: int):
    """Six for every element of a matrix that a token meets, by the tensors themselves."""
    more = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 12} if experts else {}
    shape = replace(SHAPE, family="qwen3_moe" if experts else "qwen3", **more)
    decoder = random_decoder(shape, 0)
    met = sum(
        weight.numel() * (2 / experts if weight.ndim == 3 else 1)
        for name, weight in decoder.named_parameters()
        if weight.ndim > 1 and name not in ("embed_tokens", "lm_head")
    )
    head = shape.vocab_size * shape.hidden_size
    assert policy_cost(shape, 11, 7) == pytest.approx(6 * (11 * met + 7 * head))
    draft = MtpDraft.from_trunk(decoder)
    block = sum(w.numel() * (2 / experts if w.ndim == 3 else 1) for w in draft.parameters() if w.ndim > 1)
    cost = DraftCost(draft, 3)
    assert cost.per_row == pytest.approx(3 * 6 * block) and cost.per_label == pytest.approx(3 * 6 * head) and cost.fixed > 0
    assert cost.of(rollouts_of(0)[0]) == pytest.approx(
        cost.per_row * rollouts_of(0)[0].num_rows + cost.per_label * int(rollouts_of(0)[0].loss_mask.sum())
    )


def test_heads_and_layers_of_their_own():
    eagle = DraftCost(Eagle3Draft.from_trunk(random_decoder(SHAPE, 0), Eagle3Config.of(SHAPE, draft_vocab_size=10)), 2)
    assert eagle.per_label == 2 * 8 * 10 * SHAPE.hidden_size, "its head is trained, and smaller"
    one, three = (DraftCost(MtpDraft.random(MtpConfig.of(SHAPE, num_layers=n)), 3) for n in (1, 3))
    assert three.per_row == pytest.approx(one.per_row) and three.fixed > one.fixed


def test_a_share_bounds_the_cost_and_ids_decide():
    draft, rollouts = MtpDraft.from_trunk(random_decoder(SHAPE, 0)), rollouts_of(1)
    trainer = DraftTrainer(draft, DraftTrainConfig(max_share=0.05))
    fixed = trainer.planned_cost([])
    policy, seen = (fixed + 0.3 * (trainer.planned_cost(rollouts) - fixed)) / 0.05, set()
    for key in range(6):
        chosen = trainer.choose(rollouts, key, policy)
        assert 1 < len(chosen) < len(rollouts)
        assert trainer.planned_cost([rollouts[i] for i in chosen]) <= 0.05 * policy
        left = min(trainer._cost.of(rollouts[i]) for i in range(len(rollouts)) if i not in chosen)
        assert trainer.planned_cost([rollouts[i] for i in chosen]) + left > 0.05 * policy, "there is no room for another"
        order = random.Random(key).sample(range(len(rollouts)), len(rollouts))
        again = trainer.choose([rollouts[i] for i in order], key, policy)
        assert sorted(order[i] for i in again) == chosen, "in whatever order they come"
        seen.add(tuple(chosen))
    assert len(seen) == 6, "other sequences at other steps"
    assert len(trainer.choose(rollouts, 0, 1.0)) == 1 and trainer.choose(rollouts, 0) == list(range(30))
    both = DraftTrainer(draft, DraftTrainConfig(max_share=0.05, max_rows=40)).choose(rollouts, 0, policy)
    assert sum(rollouts[i].num_rows for i in both) <= 40
    with pytest.raises(ValueError, match="max_share=0"):
        DraftTrainConfig(max_share=0.0)


def test_places_decide_where_there_are_no_ids():
    nameless = [replace(rollout, sample_id=None) for rollout in rollouts_of(2)]
    sizes = [float(rollout.num_rows) for rollout in nameless]
    chosen = choose(nameless, sizes, 60.0, 1)
    assert sum(sizes[i] for i in chosen) <= 60 and choose(nameless, sizes, 60.0, 1) == chosen
    turned = choose(nameless[::-1], sizes[::-1], 60.0, 1)
    assert sorted(29 - i for i in turned) != chosen, "so this does depend on the order"
