"""The trainer in one process: split invariance, mismatch, refusals, exact resume, supervised steps.

Its gradients are compared with an independent float64 model in tests/parity/test_gradient_oracle.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.base import NonFiniteStep, StepStats, Trainer
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import TINY, random_samples, record
from miles_kernels.nn.checkpoint import random_decoder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(
    algorithm: AlgorithmConfig | None = None,
    *,
    lr: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: object,
) -> FsdpTrainer:
    decoder = random_decoder(TINY, seed, dtype=dtype)
    schedule = OptimizerConfig(lr=lr, schedule="cosine", warmup_steps=2, weight_decay=0.01)
    return FsdpTrainer(decoder, algorithm or AlgorithmConfig(), TrainerConfig(**config), schedule, total_updates=20)


def draw(seed: int | None = None, trainer: FsdpTrainer | None = None, **kw: object) -> TrainBatch:
    """A scored batch; with a trainer, its recorded log-probabilities are that trainer's."""
    samples = random_samples(random.randrange(2**32) if seed is None else seed, num_groups=6, **kw)
    batch = TrainBatch.from_groups(samples, AlgorithmConfig())
    if trainer is None:
        return batch
    return TrainBatch.from_groups(record(samples, batch, trainer.forward_logprobs(batch)), AlgorithmConfig())


def gradients(trainer: FsdpTrainer, batch: TrainBatch, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], StepStats]:
    held: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", lambda grads: held.extend(g.clone() for g in grads) or 0.0)
        stats = trainer.step(batch)
    return held, stats


def weights(trainer: FsdpTrainer) -> list[Tensor]:
    return [tensor.clone() for _, tensor in trainer.export_weights()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference of a tensor."""
    return max(float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


CONFIGS = {
    "grpo": AlgorithmConfig(),
    "dr_grpo": AlgorithmConfig(advantage="mean", reduction="constant", constant_tokens=8),
    "sequence": AlgorithmConfig(reduction="sequence", ratio_level="sequence", entropy_coef=0.01),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_does_not_depend_on_the_split(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw()
    while sum(map(batch.block_tokens, range(len(batch.blocks)))) <= max(45, *batch.last):  # too little to be split
        batch = draw()
    whole, stats = gradients(build(CONFIGS[name], grad_clip=0.0), batch, monkeypatch)
    assert stats.num_microbatches == 1
    for budget in (max(batch.last), 20, 45):
        split, split_stats = gradients(
            build(CONFIGS[name], grad_clip=0.0, max_tokens_per_microbatch=max(budget, *batch.last)), batch, monkeypatch
        )
        assert split_stats.num_microbatches > 1
        assert distance(split, whole) < 2e-6
        assert split_stats.loss == pytest.approx(stats.loss, rel=1e-5, abs=1e-6)
        for key, value in stats.means.items():
            assert split_stats.means[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_local_denominators_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the classic bug, a mean per micro-batch, is far outside the tolerance."""
    batch = draw()
    whole, _ = gradients(build(grad_clip=0.0), batch, monkeypatch)
    from miles_core.trainer import fsdp

    original = fsdp.microbatches

    def local(*args: object) -> Iterator:
        for micro in original(*args):
            yield replace(micro, weight=torch.full_like(micro.weight, 1 / micro.weight.numel()))

    monkeypatch.setattr(fsdp, "microbatches", local)
    wrong, _ = gradients(build(grad_clip=0.0, max_tokens_per_microbatch=max(20, *batch.last)), batch, monkeypatch)
    assert distance(wrong, whole) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_bitwise_equal_however_packed(dtype: torch.dtype) -> None:
    wide = build(dtype=dtype)
    batch = draw(trainer=wide, temperature=0.7)
    narrow = build(dtype=dtype, max_tokens_per_microbatch=max(batch.last))
    assert torch.equal(narrow.forward_logprobs(batch), wide.forward_logprobs(batch))
    stats = narrow.step(batch)
    assert (stats.tokens_unequal, stats.mismatch_max_abs) == (0, 0.0)
    assert stats.means["ratio"] == 1.0 and stats.means["policy_kl"] == 0.0
    assert narrow.step(batch).tokens_unequal > batch.num_tokens / 2  # the weights have moved: now they differ


def test_one_flipped_bit_is_counted() -> None:
    trainer = build()
    batch = draw(trainer=trainer)
    batch.rollout_logprobs[3] = torch.nextafter(batch.rollout_logprobs[3], torch.tensor(0.0))
    metrics = trainer.step(batch).metrics()
    assert metrics["mismatch/tokens_unequal"] == 1
    assert 0 < metrics["mismatch/max_abs"] < 1e-5


def test_several_updates_use_the_logprobs_of_the_start() -> None:
    trainer = build(updates_per_step=3, lr=0.01)
    batch = draw(trainer=trainer)
    stats = trainer.step(batch)
    assert (stats.num_updates, trainer.num_updates) == (3, 3)
    assert stats.tokens_unequal == 0  # compared before the first update
    assert stats.means["ratio"] != 1.0 and stats.means["policy_kl"] > 0


def test_the_learning_rate_counts_updates_only() -> None:
    one, three = build(), build(updates_per_step=3)
    batch = draw(3)
    assert len(batch.blocks) >= 3
    rates = [one.step(batch).lr for _ in range(3)]
    assert three.step(batch).lr == rates[2]
    assert rates[0] == pytest.approx(0.5e-3) and rates[1] == pytest.approx(1e-3)


def test_gradient_clipping_scales_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw()
    free, stats = gradients(build(grad_clip=0.0), batch, monkeypatch)
    bound = stats.grad_norm / 3
    clipped, clipped_stats = gradients(build(grad_clip=bound), batch, monkeypatch)
    assert clipped_stats.grad_norm == stats.grad_norm
    assert distance(clipped, [g / 3 for g in free]) < 1e-6
    untouched, _ = gradients(build(grad_clip=stats.grad_norm * 1.01), batch, monkeypatch)
    assert same(untouched, free)


def test_the_batch_is_not_changed() -> None:
    trainer = build(AlgorithmConfig(kl_coef=0.1), updates_per_step=2)
    batch = draw(trainer=trainer)
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    trainer.step(batch)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


@pytest.mark.parametrize("broken", ["advantage", "weight"])
def test_a_non_finite_step_is_refused_and_changes_nothing(broken: str) -> None:
    batch = draw(5)
    for mode in ("error", "skip"):
        trainer = build(on_nonfinite=mode)
        trainer.step(draw(6))
        bad = batch
        if broken == "advantage":
            bad = replace(batch, advantage=batch.advantage.clone().fill_(3e38))
        else:
            next(trainer.decoder.parameters()).data[7, 3] = float("nan")
            bad = replace(batch, token_ids=torch.full_like(batch.token_ids, 7))
        before, moments = weights(trainer), [m.clone() for m in trainer.optimizer.exp_avg]
        asked = Mock(wraps=trainer.parallel.union)
        trainer.parallel.union = asked  # type: ignore[method-assign]
        if mode == "error":
            with pytest.raises(NonFiniteStep, match=r"update 2: .*not finite.*weights are unchanged"):
                trainer.step(bad)
        else:
            stats = trainer.step(bad)
            assert (stats.num_updates, stats.num_skipped_updates) == (0, 1)
        assert asked.call_count == (mode == "error")  # the processes are asked for names once, not for every name
        assert trainer.num_updates == 1
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, weights(trainer), strict=True))
        assert same(moments, trainer.optimizer.exp_avg)
        assert all(p.grad is None for p in trainer.decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    algorithm = AlgorithmConfig(kl_coef=0.05)
    batches = [draw(seed) for seed in range(4)]
    straight = build(algorithm, dtype=dtype, lr=0.01)
    first = build(algorithm, dtype=dtype, lr=0.01)
    for batch in batches[:2]:
        straight.step(batch)
        first.step(batch)
    first.save(tmp_path / "trainer")
    resumed = build(algorithm, dtype=dtype, lr=0.01)
    resumed.load(tmp_path / "trainer")
    assert resumed.num_updates == 2
    for batch in batches[2:]:
        expected = straight.step(batch)
        assert resumed.step(batch) == expected
    assert same(weights(resumed), weights(straight))
    assert same(list(resumed.optimizer.state().values()), list(straight.optimizer.state().values()))


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved = build(AlgorithmConfig(kl_coef=0.1))
    saved.save(tmp_path / "a")
    with pytest.raises(ValueError, match="trainer.json: reference is"):
        build(AlgorithmConfig(kl_coef=0.1), seed=1).load(tmp_path / "a")
    with pytest.raises(ValueError, match="dtype is 'torch.float32', this run has 'torch.bfloat16'"):
        build(AlgorithmConfig(kl_coef=0.1), dtype=torch.bfloat16).load(tmp_path / "a")
    with pytest.raises(ValueError, match="cannot be read"):
        saved.load(tmp_path / "nowhere")
    file = tmp_path / "a" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        build(AlgorithmConfig(kl_coef=0.1)).load(tmp_path / "a")


def test_another_contract_is_said_aloud(tmp_path: Path) -> None:
    saved, other = build(), build(seed=1)
    saved.save(tmp_path / "a")
    file = tmp_path / "a" / "trainer.json"
    file.write_text(file.read_text().replace('"contract": "mk1-', '"contract": "mk1-x'))
    with pytest.warns(UserWarning, match="written under contract mk1-x"):
        other.load(tmp_path / "a")
    assert same(weights(other), weights(saved))


def test_the_kl_penalty_pulls_back_to_the_reference() -> None:
    free, held = build(lr=0.01), build(AlgorithmConfig(kl_coef=5.0), lr=0.01)
    batch = draw(1)
    assert held.step(batch).means["ref_kl"] == 0.0  # still the reference itself
    free.step(batch)
    for _ in range(6):
        free.step(batch)
        stats = held.step(batch)
    assert stats.means["ref_kl"] > 0
    reference = weights(build())
    assert sum(float((a - b).norm()) for a, b in zip(weights(held), reference, strict=True)) < sum(
        float((a - b).norm()) for a, b in zip(weights(free), reference, strict=True)
    )


def test_a_step_raises_the_probability_of_what_was_rewarded() -> None:
    trainer = build(lr=0.01)
    batch = draw(trainer=trainer)
    before = trainer.forward_logprobs(batch)
    for _ in range(3):
        trainer.step(batch)
    gain = trainer.forward_logprobs(batch) - before
    assert (gain * batch.advantage).sum() > 0


def test_supervised_steps_learn_the_targets() -> None:
    trainer = build(lr=0.02, updates_per_step=4)
    rng = random.Random()
    examples = [SftExample(tuple(rng.randrange(50) for _ in range(9)), (False,) * 3 + (True,) * 6, f"row {i}") for i in range(8)]
    batch = TrainBatch.from_sft(examples)
    assert batch.num_tokens == 48
    first = trainer.step(batch)
    assert first.num_updates == 1 and first.tokens_unequal is None and "mismatch/max_abs" not in first.metrics()
    assert first.loss == pytest.approx(-float(trainer_mean(build(), batch)), rel=1e-6)
    for _ in range(15):
        last = trainer.step(batch)
    assert last.loss < first.loss / 2


def trainer_mean(trainer: FsdpTrainer, batch: TrainBatch) -> Tensor:
    return trainer.forward_logprobs(batch).double().mean()


def test_it_speaks_the_protocol_and_exports_views() -> None:
    trainer = build()
    assert isinstance(trainer, Trainer)
    pointers = {p.untyped_storage().data_ptr() for p in trainer.decoder.parameters()}
    for name, tensor in trainer.export_weights():
        assert not tensor.requires_grad
        assert tensor.untyped_storage().data_ptr() in pointers, name


def test_metrics_are_plain_numbers() -> None:
    metrics = build().step(draw()).metrics()
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert {"train/loss", "train/entropy", "train/clip_low_fraction", "mismatch/tokens_unequal"} <= set(metrics)
