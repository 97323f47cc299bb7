"""Linear, RMSNorm, rotary embedding, SwiGLU, embedding: float64 oracles, bitwise sweeps, negative controls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles_kernels.ops.act import swiglu
from miles_kernels.ops.embedding import embedding
from miles_kernels.ops.linear import linear
from miles_kernels.ops.norm import rms_norm
from miles_kernels.ops.rope import RopeTable, apply_rope, inverse_frequencies
from miles_kernels.testing import across_threads, assert_bitwise_equal, sweep_rows

pytestmark = pytest.mark.usefixtures("formulation")

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def oracle_rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers times exp(i angle)."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def check_gradients(op: Callable[..., Tensor], oracle: Callable[..., Tensor], *inputs: Tensor, tol: float = 2e-6) -> None:
    """Value and gradients of `op` against autograd through `oracle` in float64, relative to the largest element."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    out, expected = op(*ours), oracle(*theirs)
    seed = torch.randn(out.shape)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, ours, seed.to(out.dtype)),
        torch.autograd.grad(expected, theirs, seed.to(out.dtype).double()),
        strict=True,
    )
    for i, (a, b) in enumerate(pairs):
        assert (a.double() - b).abs().max() <= tol * b.abs().max(), f"output (0) or gradient {i}"
    with torch.no_grad():
        assert_bitwise_equal(op(*inputs), out.detach(), "with and without autograd")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_linear(dtype: torch.dtype) -> None:
    tol = 2e-6 if dtype is torch.float32 else 2.0**-8
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((37, 48), (80, 48), (80,)))
    check_gradients(linear, lambda x, w, b: x @ w.t() + b, x, weight, bias, tol=tol)
    check_gradients(linear, lambda x, w: x @ w.t(), x, weight, tol=tol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rms_norm(dtype: torch.dtype) -> None:
    def oracle(x: Tensor, w: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * w

    tol = 2e-6 if dtype is torch.float32 else 2.0**-7
    check_gradients(
        lambda x, w: rms_norm(x, w, EPS), oracle, torch.randn(21, 5, 40).to(dtype), torch.rand(40).to(dtype) + 0.5, tol=tol
    )


def test_gradients_of_swiglu() -> None:
    def oracle(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    check_gradients(swiglu, oracle, torch.randn(13, 66) * 4)


def test_gradients_of_rope() -> None:
    positions = torch.randint(0, 9000, (11,))
    cos, sin = RopeTable(32, 10_000.0).rows(positions)
    x = torch.randn(11, 6, 32)
    check_gradients(lambda x: apply_rope(x, cos, sin), lambda x: oracle_rotate(x, positions, 10_000.0), x)


def test_gradients_of_embedding() -> None:
    ids = torch.randint(0, 9, (300,))
    check_gradients(lambda w: embedding(ids, w), lambda w: w[ids], torch.randn(12, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "thread_counts"), [(128, (1,)), (100, (1, 2)), (576, (1,))])
def test_rows_do_not_depend_on_their_batch(width: int, thread_counts: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(150, width) * 3).to(dtype)
    weight, bias, scale = torch.randn(72, width).to(dtype), torch.randn(72).to(dtype), torch.rand(width).to(dtype)
    half = width // 2
    cos, sin = RopeTable(half, 10_000.0).rows(torch.arange(150))

    def sweep(name: str, op: Callable[..., Tensor], *inputs: Tensor) -> None:
        sweep_rows(op, *inputs, name=name, sizes=(1, 2, 3, 7, 11, 16, 17, 33, 64), thread_counts=thread_counts).check()

    sweep("linear", lambda x: linear(x, weight, bias, mode="native"), x)
    sweep("linear exact", lambda x: linear(x, weight, bias, mode="exact"), x)
    sweep("rms_norm", lambda x: rms_norm(x, scale, EPS), x)
    sweep("head norm", lambda x: rms_norm(x.view(-1, 2, half), scale[:half], EPS), x)
    sweep("swiglu", swiglu, x)
    sweep("rope", lambda x, c, s: apply_rope(x.view(-1, 2, half), c, s), x, cos, sin)


def test_torch_pointwise_ops_fail_the_same_sweep() -> None:
    """Negative control: sigmoid, or rsqrt in bfloat16, rounds by position in the tensor, so rows of odd length change."""
    x = torch.randn(150, 101)
    unequal = sum(
        sweep_rows(op, y, thread_counts=(1,)).num_unequal for op, y in ((torch.sigmoid, x), (torch.rsqrt, x.abs().bfloat16()))
    )
    assert unequal > 0


def test_one_rounding_in_bfloat16() -> None:
    x, weight, bias = torch.randn(20, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    assert_bitwise_equal(linear(x, weight, bias), linear(x.float(), weight.float(), bias.float()).bfloat16())
    assert linear(x, weight, out_dtype=torch.float32).dtype is torch.float32
    assert_bitwise_equal(swiglu(x), swiglu(x.float()).bfloat16())
    scale = torch.rand(64).bfloat16()
    normed = rms_norm(x.float(), torch.ones(64), EPS).bfloat16()
    assert_bitwise_equal(rms_norm(x, scale, EPS), normed * scale, "round before the weight")


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_repeats_itself_on_one_and_two_threads(dtype: torch.dtype) -> None:
    x, weight, scale = torch.randn(333, 64).to(dtype), torch.randn(128, 64).to(dtype), torch.rand(64).to(dtype)
    ids, seed = torch.randint(0, 20, (333,)), torch.randn(333, 64).to(dtype)

    def gradients() -> Tensor:
        leaves = [t.clone().requires_grad_() for t in (x, weight, scale, torch.zeros(20, 64, dtype=dtype))]
        hidden = rms_norm(leaves[0] + embedding(ids, leaves[3]), leaves[2], EPS)
        grads = torch.autograd.grad(swiglu(linear(hidden, leaves[1])), leaves, seed)
        return torch.cat([g.flatten() for g in grads])

    first = across_threads(gradients, (1, 2, 1, 2), "gradients")
    assert first.abs().sum() > 0


def test_swiglu_saturates_without_nan() -> None:
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0]])
    out = swiglu(torch.cat((gate, torch.ones(1, 4)), 1))
    assert (out - F.silu(gate.double())).abs().max() < 1e-5
    with pytest.raises(ValueError, match="even last dimension"):
        swiglu(torch.randn(2, 3))


def test_rope_table_grows_and_rejects_negative_positions() -> None:
    small, large = RopeTable(16, 10_000.0, num_positions=8), RopeTable(16, 10_000.0, num_positions=4096)
    positions = torch.tensor([3, 1000])
    for ours, theirs in zip(small.rows(positions), large.rows(positions), strict=True):
        assert_bitwise_equal(ours, theirs)
    with pytest.raises(ValueError, match="negative"):
        small.rows(torch.tensor([-1]))


def test_rope_scaling() -> None:
    base = inverse_frequencies(64, 500_000.0)
    assert torch.equal(inverse_frequencies(64, 500_000.0, {"rope_type": "default"}), base)
    assert torch.equal(inverse_frequencies(64, 500_000.0, {"type": "linear", "factor": 4.0}), base / 4)
    config = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for frequency, scaled in zip(base.tolist(), inverse_frequencies(64, 500_000.0, config).tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert math.isclose(scaled, expected, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("dim", "scaling", "message"),
    [
        (7, None, "even"),
        (8, {"rope_type": "spiral"}, "spiral.*known: default, linear, llama3"),
        (8, {"rope_type": "linear"}, "lacks 'factor'"),
    ],
)
def test_rope_errors_say_what_to_change(dim: int, scaling: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(dim, 10_000.0, scaling)
