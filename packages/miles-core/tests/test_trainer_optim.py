"""Optimizer, schedules and norm against torch.optim.AdamW, closed formulas and float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from miles_core.trainer.config import OptimizerConfig
from miles_core.trainer.optim import AdamW, global_norm, lr_at
from miles_core.trainer.tensorfile import load_tensors, save_tensors


def params(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    shapes = {"w": (13, 7), "norm": (13,), "embed": (40, 7)}
    return [(name, torch.nn.Parameter(torch.randn(shape).to(dtype))) for name, shape in shapes.items()]


def test_updates_equal_torch_adamw_with_decay_on_matrices_only() -> None:
    named = params()
    cfg = OptimizerConfig(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, warmup_steps=3)
    ours = AdamW(named, cfg)
    copies = [torch.nn.Parameter(p.detach().clone()) for _, p in named]
    theirs = torch.optim.AdamW(
        [{"params": [copies[0], copies[2]]}, {"params": [copies[1]], "weight_decay": 0.0}],
        betas=(0.8, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    for k in range(6):
        for (_, p), copy in zip(named, copies, strict=True):
            p.grad = torch.randn_like(p)
            copy.grad = p.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = min(1.0, (k + 1) / 3) * 0.01
        theirs.step()
        assert ours.step(ours.gradients()) == pytest.approx(group["lr"])
        for (name, p), copy in zip(named, copies, strict=True):
            whole = p.numel() - p.numel() % 16  # torch rounds what fills no vector register differently; ours rounds all alike
            assert torch.equal(p.flatten()[:whole], copy.flatten()[:whole]), name
            assert torch.allclose(p, copy, rtol=1e-6, atol=1e-7), name


def test_low_precision_parameters_have_fp32_masters_and_gradients() -> None:
    named = params(torch.bfloat16)
    optimizer = AdamW(named, OptimizerConfig(lr=1e-5))
    start = [p.detach().clone() for _, p in named]
    masters = [m.clone() for m in optimizer.masters]
    for _ in range(256):  # 256 micro-batches of 1/256: a bf16 sum would stall at 1/2
        for _, p in named:
            p.grad = torch.full_like(p, 1 / 256)
        optimizer.collect()
    assert all(p.grad is None for _, p in named)
    assert all(torch.equal(g, torch.ones_like(g)) and g.dtype == torch.float32 for g in optimizer.gradients())
    for _ in range(20):
        optimizer.step(optimizer.gradients())
    for (_, p), first, master, now in zip(named, start, masters, optimizer.masters, strict=True):
        assert torch.allclose(now, master - 20e-5, atol=1e-6)  # twenty small steps add up in fp32 ...
        assert torch.equal(p, now.bfloat16()) and p.dtype == torch.bfloat16  # ... and the parameter is the rounded master
        assert first.dtype == torch.bfloat16


def test_a_parameter_without_gradient_still_decays_and_counts() -> None:
    named = params()
    optimizer = AdamW(named, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = named[0][1].detach().clone()
    optimizer.step(optimizer.gradients())
    assert torch.allclose(named[0][1], before * (1 - 0.05))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_follow_their_formula(schedule: str) -> None:
    cfg = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=4, total_steps=20, min_lr_ratio=0.25)
    assert [lr_at(cfg, k, None) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]
    for k in range(4, 30):
        p = min(1.0, (k - 4) / 16)
        height = {"constant": 1.0, "linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2}[schedule]
        floor = 0.25 if schedule != "constant" else 0.0
        assert lr_at(cfg, k, None) == pytest.approx(2.0 * (floor + (1 - floor) * height))
    assert lr_at(cfg.model_copy(update={"total_steps": None}), 12, 20) == lr_at(cfg, 12, 999)


def test_a_falling_schedule_without_an_end_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match='schedule = "cosine" needs optimizer.total_steps'):
        AdamW(params(), OptimizerConfig(schedule="cosine"))
    with pytest.raises(ValueError, match="betas"):
        OptimizerConfig(betas=(0.9, 1.0))


def test_norm_matches_float64_and_does_not_depend_on_threads() -> None:
    tensors = [torch.randn(300, 1000) * 1e-3, torch.randn(7), torch.randn(4096), torch.randn(4097), torch.randn(4097 * 4096)]
    exact = math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))
    before = torch.get_num_threads()
    try:
        norms = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            norms.append(global_norm(tensors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*norms)
    assert float(norms[0]) == pytest.approx(exact, rel=1e-6)
    for bad in (math.inf, math.nan):
        tensors[0][5, 5] = bad
        assert not math.isfinite(float(global_norm(tensors)))


def test_updates_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            named = [("w", torch.nn.Parameter(torch.randn(1001, 333)))]
            optimizer = AdamW(named, OptimizerConfig(lr=0.01, weight_decay=0.1))
            for _ in range(3):
                optimizer.step([torch.randn(1001, 333)])
            results.append(named[0][1].detach().clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_tensor_files_round_trip_and_name_what_does_not_fit(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "t": torch.randn(4, 6).t()}
    file = tmp_path / "x.safetensors"
    save_tensors(file, state)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_tensors(file, target)
    assert all(torch.equal(target[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="c is missing; b is unexpected; a is torch.float32"):
        load_tensors(file, {"a": torch.zeros(4, 3), "c": torch.zeros(1), "t": torch.zeros(6, 4)})
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="x.safetensors: not a whole safetensors file"):
        load_tensors(file, target)
