"""Losses and their gradients against naive Python loops in float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.algorithm.loss import (
    LOSSES,
    LossInputs,
    cispo_loss,
    clipped_surrogate,
    kl_estimate,
    mismatch_weight,
    policy_loss,
    policy_ratio,
    sft_loss,
)
from miles_core.algorithm.reduce import sequence_weights

COUNTS = (5, 1, 8, 3)


def draw(dtype: torch.dtype = torch.float64) -> LossInputs:
    n = sum(COUNTS)
    logprob = (-torch.rand(n, dtype=dtype) * 3).requires_grad_()
    near = logprob.detach() + 0.4 * torch.randn(n, dtype=dtype)
    return LossInputs(
        logprob=logprob,
        weight=sequence_weights(COUNTS, "token").to(dtype).repeat_interleave(torch.tensor(COUNTS)),
        advantage=torch.randn(n, dtype=dtype),
        old_logprob=near,
        rollout_logprob=near + 0.3 * torch.randn(n, dtype=dtype),
        ref_logprob=near + 0.5 * torch.randn(n, dtype=dtype),
        entropy=torch.rand(n, dtype=dtype),
        sequence=torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS)),
        num_sequences=len(COUNTS),
    )


def naive_policy(x: LossInputs, logprob: list[float], cfg: AlgorithmConfig) -> float:
    """The whole objective in scalar Python."""
    total, begin = 0.0, 0
    old, ref, rollout, adv = x.old_logprob.tolist(), x.ref_logprob.tolist(), x.rollout_logprob.tolist(), x.advantage.tolist()
    for count in COUNTS:
        rows = range(begin, begin + count)
        begin += count
        sequence_log_ratio = sum(logprob[i] - old[i] for i in rows) / count
        for i in rows:
            r = math.exp(sequence_log_ratio if cfg.ratio_level == "sequence" else logprob[i] - old[i])
            clipped = min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high)
            surrogate = min(r * adv[i], clipped * adv[i])
            if cfg.dual_clip is not None and adv[i] < 0:
                surrogate = max(surrogate, cfg.dual_clip * adv[i])
            loss = -surrogate
            if cfg.mismatch_clip is not None:
                loss *= min(math.exp(old[i] - rollout[i]), cfg.mismatch_clip)
            d = logprob[i] - ref[i]
            loss += cfg.kl_coef * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[cfg.kl_kind]
            total += float(x.weight[i]) * (loss - cfg.entropy_coef * float(x.entropy[i]))
    return total


CONFIGS = [
    AlgorithmConfig(),
    AlgorithmConfig(clip_low=0.1, clip_high=0.3),
    AlgorithmConfig(dual_clip=1.5, clip_high=0.28),
    AlgorithmConfig(kl_coef=0.1, kl_kind="k1", entropy_coef=0.02),
    AlgorithmConfig(kl_coef=0.3, kl_kind="k2"),
    AlgorithmConfig(kl_coef=0.2, kl_kind="k3", mismatch_clip=1.1),
    AlgorithmConfig(ratio_level="sequence", clip_low=0.05, clip_high=0.05, kl_coef=0.1),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=range(len(CONFIGS)))
def test_value_and_gradient_match_scalar_python(cfg: AlgorithmConfig) -> None:
    x = draw()
    output = policy_loss(x, cfg)
    values = x.logprob.tolist()
    assert output.loss.item() == pytest.approx(naive_policy(x, values, cfg), rel=1e-12)
    output.loss.backward()
    step = 1e-6
    for i in range(len(values)):
        up, down = list(values), list(values)
        up[i] += step
        down[i] -= step
        numeric = (naive_policy(x, up, cfg) - naive_policy(x, down, cfg)) / (2 * step)
        assert float(x.logprob.grad[i]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_the_oracle_notices_a_wrong_clip() -> None:
    x = draw()
    x = replace(x, advantage=x.advantage.abs(), old_logprob=x.logprob.detach() - 1.0)  # every ratio is e, all are clipped
    right, wrong = AlgorithmConfig(clip_high=0.2), AlgorithmConfig(clip_high=0.3)
    assert policy_loss(x, wrong).loss.item() != pytest.approx(naive_policy(x, x.logprob.tolist(), right), rel=1e-3)


def test_equal_logprobs_give_ratio_exactly_one_and_the_reinforce_gradient() -> None:
    x = draw(torch.float32)
    x = replace(x, old_logprob=x.logprob.detach())
    assert torch.equal(policy_ratio(x.logprob, x.old_logprob), torch.ones_like(x.logprob))
    output = policy_loss(x, AlgorithmConfig())
    output.loss.backward()
    assert torch.equal(x.logprob.grad, -x.advantage * x.weight)
    assert output.stats["clip_low_fraction"] == 0 and output.stats["policy_kl"] == 0 and output.stats["ratio"] == len(x.logprob)


def test_cispo_keeps_a_bounded_gradient_on_clipped_tokens() -> None:
    x = draw()
    cfg = AlgorithmConfig(loss="cispo", clip_low=0.5, clip_high=0.2)
    cispo_loss(x, cfg).loss.backward()
    ratio = (x.logprob.detach() - x.old_logprob).exp().clamp(0.5, 1.2)
    assert torch.allclose(x.logprob.grad, -ratio * x.advantage * x.weight, rtol=1e-12)
    assert (x.logprob.grad != 0).all()


def test_sft_is_cross_entropy() -> None:
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (6,))
    inputs = LossInputs(
        logprob=logits.log_softmax(-1)[torch.arange(6), targets], weight=torch.full((6,), 1 / 6, dtype=torch.float64)
    )
    loss = sft_loss(inputs).loss
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, targets))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_estimates_are_never_negative_and_zero_at_equality(kind: str) -> None:
    a, b = torch.randn(1000), torch.randn(1000)
    assert (kl_estimate(a, b, kind) >= 0).all()
    assert torch.equal(kl_estimate(a, a, kind), torch.zeros(1000))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind: str) -> None:
    p, q = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * kl_estimate(p, q, kind)).sum(), exact)


def test_dual_clip_bounds_only_negative_advantages() -> None:
    ratio = torch.tensor([10.0, 10.0, 0.1, 0.1])
    advantage = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert clipped_surrogate(ratio, advantage, 0.2, 0.2).tolist() == pytest.approx([10.0, -1.2, 0.8, -0.1])
    assert clipped_surrogate(ratio, advantage, 0.2, 0.2, dual_clip=3.0).tolist() == pytest.approx([3.0, -1.2, 0.8, -0.1])


def test_mismatch_weight_is_truncated_and_carries_no_gradient() -> None:
    old = torch.tensor([0.0, 0.0], requires_grad=True)
    weight = mismatch_weight(old, torch.tensor([-5.0, 1.0]), 2.0)
    assert weight.tolist() == pytest.approx([2.0, math.exp(-1)]) and not weight.requires_grad


@pytest.mark.parametrize("name", LOSSES.names())
def test_no_loss_changes_its_inputs(name: str) -> None:
    x = draw()
    before = {f.name: getattr(x, f.name).detach().clone() for f in fields(x) if isinstance(getattr(x, f.name), Tensor)}
    LOSSES.get(name)(x, AlgorithmConfig(kl_coef=0.1, entropy_coef=0.1, mismatch_clip=2.0, dual_clip=3.0)).loss.backward()
    for field_name, value in before.items():
        assert torch.equal(getattr(x, field_name), value), field_name


def test_missing_inputs_are_named() -> None:
    x = LossInputs(logprob=torch.zeros(2), weight=torch.ones(2))
    with pytest.raises(ValueError, match="needs advantage, old_logprob"):
        policy_loss(x, AlgorithmConfig())
    x = replace(x, advantage=torch.ones(2), old_logprob=torch.zeros(2))
    with pytest.raises(ValueError, match="needs ref_logprob"):
        policy_loss(x, AlgorithmConfig(kl_coef=1.0))
    with pytest.raises(ValueError, match="needs rollout_logprob"):
        policy_loss(x, AlgorithmConfig(mismatch_clip=1.0))
    with pytest.raises(ValueError, match="needs entropy"):
        policy_loss(x, AlgorithmConfig(entropy_coef=1.0))
    with pytest.raises(ValueError, match="sequence index"):
        policy_loss(x, AlgorithmConfig(ratio_level="sequence"))
    with pytest.raises(ValueError, match="Known: k1, k2, k3"):
        kl_estimate(x.logprob, x.logprob, "k4")


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_weights_match_the_definition_of_each_reduction(reduction: str) -> None:
    values = [torch.randn(n, dtype=torch.float64) for n in COUNTS]
    expected = {
        "token": torch.cat(values).mean(),
        "sequence": torch.stack([v.mean() for v in values]).mean(),
        "constant": torch.stack([v.sum() / 16 for v in values]).mean(),
    }[reduction]
    weight = sequence_weights(COUNTS, reduction, 16)
    got = sum(w * v.sum() for w, v in zip(weight, values, strict=True))
    assert torch.allclose(got, expected, rtol=1e-12)


def test_sequences_without_trained_tokens_count_nowhere() -> None:
    assert torch.equal(sequence_weights([4, 0, 2], "sequence")[[0, 2]], sequence_weights([4, 2], "sequence"))
    with pytest.raises(ValueError, match="constant_tokens"):
        sequence_weights([1], "constant")
    with pytest.raises(ValueError, match="Known: token, sequence, constant"):
        sequence_weights([1], "tokens")


def test_configuration_refuses_half_an_option() -> None:
    with pytest.raises(ValueError, match="needs constant_tokens"):
        AlgorithmConfig(reduction="constant")
    with pytest.raises(ValueError, match="clip_lo"):
        AlgorithmConfig(clip_lo=0.1)
