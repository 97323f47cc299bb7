"""Training a draft: rows and labels by an oracle, packing, masks, running means, state, off-line training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_spec.cli import main
from miles_spec.models import Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft
from miles_spec.targets import IGNORE
from miles_spec.train import (
    DraftStream,
    DraftTrainConfig,
    DraftTrainer,
    Policy,
    ReplayBuffer,
    Rollout,
    read_rollouts,
    stream_of,
    train_offline,
)
from miles_spec.train.captured import Inputs, padded_lengths, run_pass, shape_of

SHAPE = DecoderConfig(
    family="qwen3",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)


def rollouts(seed: int, count: int = 8) -> list[Rollout]:
    """Prompts of one token and more, completions of one token and more, tools in between."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    found = []
    for number in range(count):
        mask = [False] * (1 + below(4)) + [True] * (1 + below(6))
        if below(3) == 0:
            mask += [False] * (1 + below(3)) + [True] * (1 + below(3))
        ids = torch.randint(40, (len(mask),), generator=generator)
        found.append(Rollout(token_ids=ids, loss_mask=torch.tensor(mask), sample_id=number, temperature=0.7 + 0.1 * below(4)))
    return found


def policy_of(decoder: Decoder) -> Policy:
    return Policy(embed=decoder.embed_tokens.detach(), head=decoder.head.detach())


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_those_of_a_plain_loop_over_every_sequence(seed: int) -> None:
    """The end of a sequence is a label, the last prompt token is none, nothing is learnt across a tool's answer."""
    decoder, given = random_decoder(SHAPE, seed), rollouts(seed)
    stream = stream_of(decoder, given)
    targets, row = stream.targets(3), 0
    starts = []
    for rollout in given:
        ids, mask, first = rollout.token_ids.tolist(), rollout.loss_mask.tolist(), row
        starts.append(first)
        for i in range(len(ids) - 1):
            for depth in (1, 2, 3):
                at = i + depth + 1
                drafted = all(mask[j] for j in range(i + 2, min(at, len(ids))))
                wanted = at < len(ids) and mask[at] and drafted
                assert int(targets.labels[depth - 1, row]) == (ids[at] if wanted else IGNORE)
                if wanted:
                    assert int(targets.teacher[depth - 1, row]) == first + i + depth
                if i + depth < len(ids):
                    assert int(targets.input_ids[depth - 1, row]) == ids[i + depth]
            row += 1
    assert row == stream.num_rows
    ends = sum(len(r.token_ids) >= 3 for r in given)
    assert sum(int(r.token_ids[-1]) in targets.labels[0].tolist() for r in given if len(r.token_ids) >= 3) == ends
    heat = stream.temperature()
    assert isinstance(heat, Tensor) and heat[starts].tolist() == pytest.approx([r.temperature for r in given])


@pytest.mark.parametrize(("kind", "loss"), [("mtp", "kl"), ("layers", "lk_lambda"), ("mtp", "ce")])
def test_a_padded_pass_has_the_numbers_of_the_plain_one(kind: str, loss: str) -> None:
    """What a GPU captures, run as it is: padding and looking at rows with labels alone change nothing; wrong rows do."""
    decoder = random_decoder(SHAPE, 1)
    makers = {
        "mtp": lambda: MtpDraft.from_trunk(decoder),
        "layers": lambda: MtpDraft.from_trunk(decoder, MtpConfig.of(SHAPE, num_layers=3)),
    }
    config, policy = DraftTrainConfig(loss=loss), policy_of(decoder)
    parts = [rollouts(seed, 30) for seed in (3, 4)]
    stream = DraftStream.join([stream_of(decoder, part) for part in parts])
    plain = makers[kind]()
    trainer = DraftTrainer(plain, config)
    labels, losses, accepted = trainer._passes([stream], policy, True, None, None)
    wanted = [parameter.grad for parameter in plain.parameters()]
    for wrong in (False, True):
        draft, lengths = makers[kind]().requires_grad_(True), stream.lengths
        targets = stream.host_targets(3)
        shape = shape_of(lengths, targets.num_supervised)
        assert max(targets.num_supervised) <= shape.labels < shape.rows
        assert shape.rows > stream.num_rows and sum(padded_lengths(lengths, shape)) == shape.rows
        assert len(padded_lengths(lengths, shape)) == shape.sequences
        inputs = Inputs.like(stream, shape, 3)
        inputs.fill(stream, targets, shape, labels)
        if wrong:
            inputs.picked[0] = inputs.picked[0].roll(1, 1)
        plan = inputs.plan(shape, padded_lengths(lengths, shape))
        total, numbers = run_pass(draft, config, inputs, plan, policy.embed, policy.head)
        total.backward()
        pairs = list(zip(draft.parameters(), wanted, strict=True))
        near = torch.allclose(numbers[0], losses, atol=1e-5) and torch.allclose(numbers[1], accepted, atol=1e-5)
        near = near and all(torch.allclose(p.grad, w, atol=1e-5) for p, w in pairs if p.grad is not None and w is not None)
        assert near is not wrong
        assert all((p.grad is None) == (w is None) for p, w in pairs)


@pytest.mark.parametrize("kind", ["mtp", "layers", "eagle3"])
def test_packing_changes_neither_loss_nor_gradient(kind: str) -> None:
    """All sequences in one stream, against one stream each, against streams in another order."""
    decoder, given = random_decoder(SHAPE, 1), rollouts(11)
    ids = torch.arange(0, 40, 2)
    makers = {
        "mtp": lambda: MtpDraft.from_trunk(decoder),
        "layers": lambda: MtpDraft.from_trunk(decoder, MtpConfig.of(SHAPE, num_layers=3)),
        "eagle3": lambda: Eagle3Draft.from_trunk(
            decoder, Eagle3Config.of(SHAPE, draft_vocab_size=20, feature_layers=(1, 3, 2)), draft_ids=ids
        ),
    }
    found = []
    for groups in ([given], [[rollout] for rollout in given], [given[5:], given[:5]]):
        draft = makers[kind]()
        trainer = DraftTrainer(draft, DraftTrainConfig(lr=0.1, grad_clip=0.0), num_draft=3)
        streams = [stream_of(decoder, group, draft.config.feature_layers) for group in groups]
        made = trainer.step(streams, policy_of(decoder))
        assert made.grad_norm > 0 and not made.skipped
        found.append((made, torch.cat([m.reshape(-1) for m in trainer.optimizer.exp_avg])))
    for made, moment in found[1:]:
        assert made.loss_by_depth == pytest.approx(found[0][0].loss_by_depth, rel=1e-5)
        assert made.estimate.counts(3)[:18] == found[0][0].estimate.counts(3)[:18]
        torch.testing.assert_close(moment, found[0][1], rtol=1e-3, atol=1e-6)


def test_the_gradient_is_that_of_the_loss_and_stays_in_the_draft() -> None:
    """Finite differences on a weight of the block, from the loss of the deepest depth alone; policy tensors stay untouched."""
    decoder, given = random_decoder(SHAPE, 2).requires_grad_(True), rollouts(3)
    stream, policy = stream_of(decoder, given), Policy(embed=decoder.embed_tokens, head=decoder.head)
    draft = MtpDraft.from_trunk(decoder)
    with torch.no_grad():
        draft.join_proj[0].add_(torch.randn(draft.join_proj[0].shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    config = DraftTrainConfig(lr=0.0, grad_clip=0.0, depth_decay=1e6, betas=(0.0, 0.0))  # the third depth is all that counts
    trainer = DraftTrainer(draft, config)
    trainer.step([stream], policy)
    weight = draft.blocks[0].o_proj
    index = trainer.optimizer.names.index("blocks.0.o_proj")
    analytic = float(trainer.optimizer.exp_avg[index][3, 5])
    losses = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight[3, 5] += step
        losses.append(trainer.step([stream], policy, train=False).loss_by_depth[2])
        with torch.no_grad():
            weight[3, 5] -= step
    assert analytic == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05, abs=1e-4) and analytic != 0.0
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_training_makes_a_draft_better_and_a_mean_lags_behind() -> None:
    decoder, given = random_decoder(SHAPE, 4), rollouts(5, 30)
    stream, policy = stream_of(decoder, given), policy_of(decoder)
    for loss in ("kl", "tv", "lk_alpha", "lk_lambda", "ce"):
        trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(loss=loss, lr=3e-3, ema=0.9, warmup_steps=3))
        first = trainer.step([stream], policy)
        for _ in range(25):
            last = trainer.step([stream], policy)
        assert all(b < a for a, b in zip(first.loss_by_depth, last.loss_by_depth, strict=True)), loss
        if loss != "ce":  # labels here are random tokens, not the policy's, so only the others come closer to it
            assert all(b > a for a, b in zip(first.acceptance_by_depth, last.acceptance_by_depth, strict=True)), loss
        served, trained = trainer.serving.state_dict(), trainer.draft.state_dict()
        assert any(not torch.equal(served[name], trained[name]) for name in trained)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    decoder, given = random_decoder(SHAPE, 6), rollouts(7)
    stream = stream_of(decoder, given)
    trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(lr=0.1))
    before = {name: value.clone() for name, value in trainer.draft.state_dict().items()}
    stream.policy_hidden[0] = torch.nan
    assert trainer.step([stream], policy_of(decoder)).skipped and trainer.num_updates == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.draft.state_dict().items())


def test_no_streams_and_no_labels_are_a_step_of_nothing() -> None:
    """A process may get no sequence, and a sequence no label."""
    decoder = random_decoder(SHAPE, 8)
    trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(lr=0.1), num_draft=2)
    short = Rollout(token_ids=torch.tensor([1, 2]), loss_mask=torch.tensor([False, True]), sample_id=0)
    before = trainer.draft.state_dict()["final_norm.0"].clone()
    for streams in ([], [stream_of(decoder, [short])]):
        made = trainer.step(streams, policy_of(decoder))
        assert made.grad_norm == 0.0 and made.num_labels == 0 and not made.skipped
        assert "loss_depth_1" not in made.metrics()
    assert torch.equal(trainer.draft.state_dict()["final_norm.0"], before)


def test_the_replay_buffer_forgets_the_oldest_and_draws_by_key() -> None:
    decoder, given = random_decoder(SHAPE, 9), rollouts(1, 12)
    buffer = ReplayBuffer(60)
    for rollout in given:
        buffer.add(stream_of(decoder, [rollout]))
    assert 0 < buffer.num_rows <= 60 and len(buffer) < len(given)
    drawn, again, other = (buffer.draw(25, key) for key in (3, 3, 4))
    assert drawn is not None and again is not None and other is not None and drawn.num_rows <= 25
    assert [r.sample_id for r in drawn.sequences] == [r.sample_id for r in again.sequences]
    assert torch.equal(drawn.policy_hidden, again.policy_hidden)
    assert [r.sample_id for r in drawn.sequences] != [r.sample_id for r in other.sequences]
    assert buffer.draw(0, 1) is None


def test_state_is_restored_bit_for_bit_and_refused_when_damaged(tmp_path: Path) -> None:
    decoder, given = random_decoder(SHAPE, 10), rollouts(2)
    stream, policy = stream_of(decoder, given), policy_of(decoder)

    def fresh(**fields: object) -> DraftTrainer:
        return DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(lr=1e-2, ema=0.8, **fields))

    one = fresh()
    for _ in range(3):
        one.step([stream], policy)
    one.save(tmp_path)
    two = fresh()
    two.load(tmp_path)
    for trainer in (one, two):
        trainer.step([stream], policy)
    assert all(torch.equal(a, b) for a, b in zip(one.optimizer.state().values(), two.optimizer.state().values(), strict=True))
    assert all(torch.equal(value, two.serving.state_dict()[name]) for name, value in one.serving.state_dict().items())
    file = tmp_path / "draft_optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"draft_optimizer\.safetensors: not a whole"):
        fresh().load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": "mse"}, "loss='mse' must be one of"),
        ({"depths": 0, "lr": -1.0}, r"depths=0 must be at least 1; lr=-1\.0 must not be negative"),
        ({"ema": 1.0}, r"ema=1\.0"),
        ({"max_rows": 0}, "max_rows=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DraftTrainConfig(**fields)


def test_a_draft_of_two_layers_is_not_trained_three_deep() -> None:
    decoder = random_decoder(SHAPE, 0)
    with pytest.raises(ValueError, match="2 distinct layers, so it cannot go 3 deep"):
        DraftTrainer(MtpDraft.from_trunk(decoder, MtpConfig.of(SHAPE, num_layers=2)), DraftTrainConfig())
    stream = stream_of(decoder, rollouts(0))
    with pytest.raises(ValueError, match="8 sequences have"):
        DraftStream.of(stream.sequences, stream.policy_hidden[1:])


def test_offline_training_reads_samples_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, given = random_decoder(SHAPE, 3), rollouts(9, 12)
    file = tmp_path / "samples.jsonl"
    rows = [
        {
            "token_ids": r.token_ids.tolist(),
            "loss_mask": r.loss_mask.tolist(),
            "temperature": r.temperature,
            "sample_id": i,
            "text": "sampled\u2028text\x85 is no end of a line",
        }
        for i, r in enumerate(given)
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    read = read_rollouts([file])
    assert [r.token_ids.tolist() for r in read] == [r.token_ids.tolist() for r in given]

    def losses(seed: int) -> Sequence[float]:
        trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(lr=3e-3))
        return [made.loss_by_depth[0] for made in train_offline(trainer, decoder, read, 12, 40, seed=seed)]

    assert losses(0) == losses(0) != losses(1)
    file.write_text(json.dumps({**rows[0], "loss_mask": [True]}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"samples\.jsonl:1: not a sample .*one length"):
        read_rollouts([file])
    assert main(["train", str(tmp_path), str(file), "--out", str(tmp_path / "draft")]) == 2
    assert "samples.jsonl:1" in capsys.readouterr().err
    assert replace(given[0], sample_id=None).sample_id is None


def test_several_updates_of_a_step_are_as_many_steps_on_shares_of_it() -> None:
    """Also when the sequences lie in other streams, as on several processes; the estimate is that of the draft as it came."""
    decoder, given = random_decoder(SHAPE, 2), rollouts(5, 24)
    policy, plain = policy_of(decoder), DraftTrainConfig(lr=1e-2, warmup_steps=2)
    streams = [stream_of(decoder, given[:10]), stream_of(decoder, given[10:])]
    owner = [(number * 0x9E3779B97F4A7C15 % 2**64 >> 32) % 3 for number in range(24)]
    assert {owner.count(share) for share in range(3)} <= set(range(4, 13)), "shares of about a third each"

    def trainer(config: DraftTrainConfig) -> DraftTrainer:
        return DraftTrainer(MtpDraft.from_trunk(decoder), config, num_draft=3)

    several, steps, whole = trainer(replace(plain, updates=3)), trainer(plain), trainer(plain)
    made = several.step(streams, policy)
    for share in range(3):
        mine = [
            [i for i, number in enumerate(range(first, last)) if owner[number] == share] for first, last in ((0, 10), (10, 24))
        ]
        steps.step([stream.select(each) for stream, each in zip(streams, mine, strict=True) if each], policy, measure=False)
    once = whole.step(streams, policy)
    weights = [torch.cat([p.flatten() for p in t.draft.parameters()]) for t in (several, steps, whole)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert several.num_updates == 3 and made.num_labels == once.num_labels and made.num_rows == once.num_rows
    assert made.estimate == once.estimate and made.estimate.stats.num_proposed > 0
    assert made.loss_by_depth[0] == pytest.approx(once.loss_by_depth[0], rel=0.3)
    mixed = trainer(replace(plain, updates=3))
    mixed.step([stream_of(decoder, given)], policy)
    assert torch.allclose(torch.cat([p.flatten() for p in mixed.draft.parameters()]), weights[0], atol=1e-5)


def test_a_share_that_nobody_has_updates_nothing() -> None:
    decoder = random_decoder(SHAPE, 2)
    trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(updates=8))
    trainer.step([stream_of(decoder, rollouts(1, 2))], policy_of(decoder))
    assert 1 <= trainer.num_updates <= 2
    with pytest.raises(ValueError, match="updates=0"):
        DraftTrainConfig(updates=0)


def test_nothing_to_train_on_is_said() -> None:
    decoder = random_decoder(SHAPE, 2)
    trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig())
    with pytest.raises(ValueError, match="0 rollouts hold no row"):
        next(train_offline(trainer, decoder, [], 1, 100))
