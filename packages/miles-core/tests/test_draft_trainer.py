"""A draft beside the trainer: it sees what an unpacked policy would show it, follows the policy, and cannot touch it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.draft.collect import rollouts_of
from miles_core.draft.trainer import PREFIX, Arm, DraftingTrainer
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.packing import Microbatch
from miles_core.trainer.testing import TINY, random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.decoder import PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_spec.models import Eagle3Draft, MtpDraft
from miles_spec.train import UPSTREAM, DraftStream, DraftTrainConfig, DraftTrainer, Policy
from miles_spec.train.budget import DraftCost, policy_cost


def policy(seed: int = 0, **config: object) -> FsdpTrainer:
    return FsdpTrainer(random_decoder(TINY, seed), AlgorithmConfig(), TrainerConfig(**config), OptimizerConfig(lr=1e-2))


def drafting(inner: FsdpTrainer, **settings: object) -> DraftingTrainer:
    draft = MtpDraft.from_trunk(inner.decoder)
    return DraftingTrainer(inner, {"draft": Arm(trainer=DraftTrainer(draft, DraftTrainConfig(**settings), num_draft=3))})


def batch(seed: int) -> TrainBatch:
    samples = random_samples(seed, temperature=0.8)
    return TrainBatch.from_samples(samples, [sample.reward - 0.5 for sample in samples])


def state(trainer: FsdpTrainer) -> dict[str, Tensor]:
    return {**dict(trainer.export_weights()), **trainer.optimizer.state()}


@pytest.mark.parametrize("config", [{}, {"updates_per_step": 2, "max_tokens_per_microbatch": 40}])
def test_the_policy_has_the_same_bits_with_and_without_drafts(config: dict[str, int]) -> None:
    """Parameters, moments and every reported number, after steps with three drafts in training."""
    alone, inner = policy(**config), policy(**config)
    beside = drafting(inner, lr=1e-2, ema=0.5, replay_rows=60, max_rows=50)
    eagle = DraftTrainer(Eagle3Draft.from_trunk(inner.decoder), DraftTrainConfig(lr=1e-2))
    with pytest.raises(ValueError, match="other layers of the policy"):
        DraftingTrainer(inner, {"draft": beside.arms["draft"], "eagle": Arm(trainer=eagle)})
    for name, fields in (("upstream", UPSTREAM), ("lk", {"loss": "lk_lambda", "depths": 2})):
        beside.arms[name] = Arm(trainer=DraftTrainer(MtpDraft.from_trunk(inner.decoder), DraftTrainConfig(lr=1.0, **fields)))
    before = combined_hash(beside.draft_weights())
    for step in range(6):
        mine, theirs = alone.step(batch(step)).metrics(), beside.step(batch(step)).metrics()
        assert mine == {name: value for name, value in theirs.items() if not name.startswith("draft/")}
        assert theirs["draft/loss_depth_3"] > 0
    expected, found = state(alone), state(inner)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert combined_hash(beside.draft_weights()) != before


def test_a_draft_over_three_layers_is_shown_them() -> None:
    """EAGLE-3: the same bits of the policy, and a smaller loss than that of a draft that stays as it was."""
    alone, inner = policy(), policy()
    eagle = DraftTrainer(Eagle3Draft.from_trunk(inner.decoder), DraftTrainConfig(lr=3e-3, warmup_steps=0), num_draft=2)
    frozen = Arm(trainer=DraftTrainer(Eagle3Draft.from_trunk(inner.decoder), DraftTrainConfig()), train=False)
    beside = DraftingTrainer(inner, {"draft": Arm(trainer=eagle), "frozen": frozen})
    for _ in range(6):
        alone.step(batch(1))
        row = beside.step(batch(1)).metrics()
    expected, found = state(alone), state(inner)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert row["draft/loss_depth_2"] < 0.8 * row["draft/frozen/loss_depth_2"]
    assert row["draft/age"] == 0 and row["draft/frozen/age"] == 6


def test_an_observer_that_leaks_is_noticed() -> None:
    """The comparison above can fail: a gradient of one part in a billion on one weight is enough."""
    alone, inner = policy(), policy()

    class Leaky:
        def forward(self, micro: Microbatch, hidden: Tensor, taps: Mapping[int, Tensor]) -> None: ...

        def before_update(self) -> None:
            inner.decoder.norm.grad += 1e-7

    inner.observe(Leaky())
    for step in range(3):
        alone.step(batch(step))
        inner.step(batch(step))
    assert not torch.equal(alone.decoder.norm, inner.decoder.norm)


def unpacked(decoder: torch.nn.Module, number: int, made_of: TrainBatch) -> DraftStream:
    """One sequence computed alone."""
    rollout = rollouts_of(made_of)[number]
    plan, positions = packed_plan([rollout.num_rows], [-1])
    with torch.no_grad():
        return DraftStream.of([rollout], decoder(rollout.token_ids[:-1], positions, PackedKV(plan)))


@pytest.mark.parametrize("budget", [23, 60, 4000])
def test_the_states_are_those_of_every_sequence_alone(budget: int) -> None:
    """Shared prompts, cut groups, several turns, completions of one token: bit for bit; then loss and gradient of the draft."""
    made_of, inner = batch(3), policy(max_tokens_per_microbatch=budget)
    seen: dict[int, Tensor] = {}
    beside = drafting(inner, lr=0.0, grad_clip=0.0)
    alone = [unpacked(random_decoder(TINY, 0), number, made_of) for number in range(made_of.num_sequences)]
    train = beside.main.step

    def step(streams: list[DraftStream], policy: Policy, **kw: object) -> object:
        numbers = [number for numbers, _ in beside._held for number in numbers]
        parts = [part for stream in streams for part in stream.policy_hidden.split(list(stream.lengths))]
        seen.update(zip(numbers, parts, strict=True))
        made = train(streams, policy, **kw)
        one = DraftTrainer(MtpDraft.from_trunk(inner.decoder), DraftTrainConfig(lr=0.0, grad_clip=0.0), num_draft=3).step(
            alone, policy
        )
        assert made.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert made.loss_by_depth == pytest.approx(one.loss_by_depth, rel=1e-5)
        assert made.estimate.counts(3)[:18] == one.estimate.counts(3)[:18]
        return made

    beside.main.step = step  # type: ignore[assignment, method-assign]
    beside.step(made_of)
    assert sorted(seen) == list(range(made_of.num_sequences))
    for number, stream in enumerate(alone):
        assert torch.equal(seen[number], stream.policy_hidden), number


def test_a_budget_takes_whole_sequences_by_a_key() -> None:
    inner = policy()
    beside = drafting(inner, max_rows=30)
    stats = [beside.step(batch(1)).metrics() for _ in range(3)]
    assert all(0 < row["draft/num_rows"] <= 30 for row in stats)
    again = drafting(policy(), max_rows=30)
    assert [again.step(batch(1)).metrics()["draft/num_rows"] for _ in range(3)] == [row["draft/num_rows"] for row in stats]


def test_a_share_of_the_step_is_the_same_sequences_however_they_are_packed() -> None:
    """Within a share counted in operations, with the loss of an oracle that is given just these sequences."""
    made_of, found = batch(2), []
    rollouts, cost = rollouts_of(made_of), DraftCost(MtpDraft.from_trunk(policy().decoder), 3)
    flops = policy_cost(TINY, sum(rollout.num_rows for rollout in rollouts), len(made_of.trained))
    share = (cost.fixed + 0.6 * sum(map(cost.of, rollouts))) / flops
    for config in ({}, {"max_tokens_per_microbatch": 40}):
        inner = policy(**config)
        beside = drafting(inner, max_share=share)
        metrics = beside.step(made_of).metrics()
        chosen = sorted(beside._wanted["draft"])
        assert 1 < len(chosen) < len(rollouts) and cost.fixed / flops < metrics["draft/planned_share"] <= share
        assert metrics["draft/num_rows"] == sum(rollouts[i].num_rows for i in chosen)
        found.append((chosen, metrics["draft/loss_depth_1"], metrics["draft/loss_depth_3"]))
    assert found[0][0] == found[1][0] and found[0][1:] == pytest.approx(found[1][1:], rel=1e-5)
    whole = drafting(policy()).step(made_of).metrics()
    assert "draft/planned_share" not in whole and whole["draft/loss_depth_1"] != pytest.approx(found[0][1], rel=1e-4)


def test_updates_may_be_steps_apart() -> None:
    """Steps between cost nothing, are counted in the draft's age, and may still be measured."""
    beside = drafting(policy(), every=3, lr=1e-2)
    beside.measure_every = 2
    before, rows, changed = combined_hash(beside.draft_weights()), [], []
    for step in range(7):
        rows.append(beside.step(batch(step)).metrics())
        after = combined_hash(beside.draft_weights())
        changed.append(after != before)
        before = after
    assert changed == [True, False, False, True, False, False, True]
    assert [row["draft/age"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert ["draft/loss_depth_1" in row for row in rows] == [True, False, True, True, True, False, True]
    assert [row["draft/train_s"] > 0 for row in rows] == [True, False, True, True, True, False, True]


def test_the_draft_is_published_with_the_policy() -> None:
    beside = drafting(policy())
    names = [name for name, _ in beside.export_weights()]
    own = [name for name, _ in beside.inner.export_weights()]
    assert names[: len(own)] == own and len(names) > len(own)
    assert names[len(own) :] == [PREFIX + name for name, _ in beside.main.draft.named_state()]


@pytest.mark.parametrize("every", [1, 2])
def test_resuming_goes_on_with_the_same_bits(tmp_path: Path, every: int) -> None:
    settings = {"lr": 3e-3, "ema": 0.9, "every": every}
    straight = drafting(policy(), **settings)
    for step in range(5):
        straight.step(batch(step))
    first = drafting(policy(), **settings)
    for step in range(3):
        first.step(batch(step))
        first.inner.memory.sleep()
        assert not any(p.untyped_storage().nbytes() for p in first.main.draft.parameters())
        assert not any(p.untyped_storage().nbytes() for p in first.main.optimizer.exp_avg)
    first.save(tmp_path)
    second = drafting(policy(7), **settings)
    second.load(tmp_path)
    for step in range(3, 5):
        second.step(batch(step))
    second.inner.memory.sleep()
    assert combined_hash(second.export_weights()) == combined_hash(straight.export_weights())
    other = drafting(policy(), loss="ce")
    with pytest.raises(ValueError, match="loss is 'kl', this run has 'ce'"):
        other.load(tmp_path)
    (tmp_path / "drafts" / "steps.json").write_text('{"num_steps": -1}')
    with pytest.raises(ValueError, match="steps.json: num_steps is -1"):
        drafting(policy(7), **settings).load(tmp_path)


def test_a_gap_between_estimate_and_engine_is_an_alarm() -> None:
    beside = drafting(policy())
    beside.served = {"steps": 10.0, "drafted": 30.0, "accepted": 25.0}
    with pytest.warns(UserWarning, match="another draft than the one trained"):
        row = beside.step(batch(0)).metrics()
    assert row["draft/estimate_alarm"] == 1.0 and row["draft/estimate_gap"] < -0.1
    estimate = row["draft/accept_length_estimate"]
    beside = drafting(policy())
    beside.served = {"steps": 1000.0, "drafted": 3000.0, "accepted": 1000.0 * (estimate - 1.0)}
    row = beside.step(batch(0)).metrics()
    assert row["draft/estimate_alarm"] == 0.0 and abs(row["draft/estimate_gap"]) < 0.1
