"""Products, grouped products, MoE, log-probability and FP8 on a GPU: float64 oracles, bits against other batches and backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_kernels.testing import assert_bitwise_equal, count_unequal

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
SHAPES = [(15, 128), (48, 128), (128, 15), (1024, 3072), (2560, 2048), (33, 96), (128, 2048)]
"""(N, K); the last rows of the first ones do not start at multiples of 16 bytes."""


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.fail("a gpu test needs a CUDA device; deselect with -m 'not gpu'")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


def close(ours: Tensor, exact: Tensor, bound: float) -> None:
    error = (ours.double() - exact.double()).norm() / exact.double().norm()
    assert error <= bound, float(error)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_and_its_gradients(n: int, k: int, with_bias: bool, dtype: torch.dtype) -> None:
    from miles_kernels.cuda.linear import linear

    x, w = torch.randn(70, k, dtype=dtype, requires_grad=True), torch.randn(n, k, dtype=dtype, requires_grad=True)
    b = torch.randn(n, dtype=dtype, requires_grad=True) if with_bias else None
    out = linear(x, w, b)
    exact = x.double() @ w.double().t() + (0 if b is None else b.double())
    bound = 5e-3 if dtype is BF16 else 2e-6
    close(out, exact, bound)
    grad = torch.randn_like(out)
    leaves = [t for t in (x, w, b) if t is not None]
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad, retain_graph=True), torch.autograd.grad(exact, leaves, grad.double()), strict=True
    ):
        close(ours, theirs, bound)
    wide = linear(x, w, b, out_dtype=torch.float32)
    for rows in ([3], list(range(17)), list(torch.randperm(70)[:33].tolist())):
        assert_bitwise_equal(linear(x[rows], w, b), out[rows], f"rows {rows[:3]}..")
        assert_bitwise_equal(linear(x[rows], w, b, out_dtype=torch.float32), wide[rows], "float32 output")
    if dtype is BF16:
        assert_bitwise_equal(wide.to(BF16), out, "rounded once")


def test_backends_agree_and_default_cublas_does_not() -> None:
    from miles_kernels.cuda import dispatch

    n, k = 2560, 9728
    x, w = torch.randn(300, k, dtype=BF16), torch.randn(n, k, dtype=BF16)
    whole = dispatch.run("triton", x, w, torch.empty(300, n, dtype=BF16))
    for backend in sorted(dispatch._usable(0)):
        for rows in (1, 16, 100, 300):
            out = torch.full((rows, n), float("nan"), dtype=BF16)
            assert_bitwise_equal(dispatch.run(backend, x[:rows], w, out), whole[:rows], f"{backend} M={rows}")
    assert count_unequal(torch.mm(x[:16], w.t()), torch.mm(x, w.t())[:16]) > 0  # the probe's shape really tells them apart
    assert all(dispatch.proven(backend, 0).num_elements > 1e6 for backend in dispatch._usable(0) - {"triton"})


def test_product_in_a_cuda_graph() -> None:
    from miles_kernels.cuda.linear import linear

    x, w = torch.randn(16, 1024, dtype=BF16), torch.randn(3072, 1024, dtype=BF16)
    expected = linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, w)
    out.zero_()
    graph.replay()
    assert_bitwise_equal(out, expected)


def moe_inputs(tokens: int, experts: int, slots: int, hidden: int, width: int) -> tuple[Tensor, ...]:
    return (
        torch.randn(tokens, hidden, dtype=BF16),
        torch.randn(experts, 2 * width, hidden, dtype=BF16) * hidden**-0.5,
        torch.randn(experts, hidden, width, dtype=BF16) * width**-0.5,
        torch.rand(tokens, experts).topk(slots).indices,
        torch.rand(tokens, slots),
    )


def moe_oracle(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(ids == expert)
        gate, up = (x[token].double() @ gate_up[expert].double().t()).chunk(2, -1)
        part = (torch.nn.functional.silu(gate) * up) @ down[expert].double().t()
        out = out.index_add(0, token, part * weights[token, slot, None].double())
    return out


@pytest.mark.parametrize(
    ("experts", "slots", "hidden", "width"), [(4, 2, 128, 48), (8, 1, 64, 32), (128, 8, 256, 96), (3, 3, 72, 40)]
)
@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_moe(tokens: int, experts: int, slots: int, hidden: int, width: int) -> None:
    from miles_kernels.cuda.gemm_triton import Tile
    from miles_kernels.cuda.grouped import HALVES, gemm
    from miles_kernels.cuda.linear import linear
    from miles_kernels.cuda.moe import moe_mlp, permute, plan_dispatch

    x, gate_up, down, ids, weights = inputs = moe_inputs(tokens, experts, slots, hidden, width)
    out = moe_mlp(*inputs)
    close(out, moe_oracle(*inputs), 1e-2)
    dispatch = plan_dispatch(ids, experts)
    assert torch.equal(dispatch.order.long(), torch.sort(ids.reshape(-1), stable=True).indices)
    for t in {0, tokens // 2, tokens - 1}:
        alone = moe_mlp(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1])
        assert_bitwise_equal(alone, out[t : t + 1], f"token {t} alone")
    rows = permute(x, dispatch)
    y = gemm(rows, gate_up, dispatch.groups)
    offsets = dispatch.groups.offsets.tolist()
    for expert, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        assert_bitwise_equal(y[start:stop], linear(rows[start:stop], gate_up[expert]), f"expert {expert}")
    halves = Tile(128, 64, 64, 4, 3, HALVES, 2)
    assert_bitwise_equal(gemm(rows, gate_up, dispatch.groups, tile=halves), y, "half tiles at the ends")
    inner = gemm(rows, gate_up, dispatch.groups, gated=True)
    assert_bitwise_equal(gemm(rows, gate_up, dispatch.groups, gated=True, tile=halves), inner, "half tiles, gated")
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
    trained = moe_mlp(*leaves[:3], ids, leaves[3])
    assert_bitwise_equal(trained.detach(), out, "with gradients")
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(trained, leaves, grad, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(trained, leaves, grad), strict=True):
        assert_bitwise_equal(a, b, "same twice")
    exact = [t.double().requires_grad_() for t in (x, gate_up, down, weights)]
    for a, b in zip(ours, torch.autograd.grad(moe_oracle(*exact[:3], ids, exact[3]), exact, grad.double()), strict=True):
        close(a, b, 2e-2)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_moe_of_a_handful_of_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """The unsorted kernels: the bits of the sorted ones, repeated experts and empty tails included, also replayed."""
    from miles_kernels.bench.timing import capture
    from miles_kernels.cuda import moe

    for experts, slots, hidden, width in ((64, 8, 512, 96), (4, 2, 80, 48), (5, 4, 2048, 768)):
        x, gate_up, down, ids, weights = moe_inputs(tokens, experts, slots, hidden, width)
        assert moe._are_few(ids, down)
        few = moe.moe_mlp(x, gate_up, down, ids, weights)
        with monkeypatch.context() as patch:
            patch.setattr(moe, "FEW_PAIRS", 0)
            assert_bitwise_equal(few, moe.moe_mlp(x, gate_up, down, ids, weights), "sorted")
            assert count_unequal(few, moe.moe_mlp(x, gate_up, down.roll(1, 0), ids, weights)) > 0  # the control
        out: list[torch.Tensor] = []
        graph = capture([lambda args=(x, gate_up, down, ids, weights), out=out: out.append(moe.moe_mlp(*args))])
        for _ in range(5):
            ids.copy_(torch.rand(tokens, experts).topk(slots).indices)
            x.copy_(torch.randn_like(x))
            graph.replay()
            with monkeypatch.context() as patch:
                patch.setattr(moe, "FEW_PAIRS", 0)
                assert_bitwise_equal(out[-1], moe.moe_mlp(x, gate_up, down, ids, weights), "replayed")


@pytest.mark.parametrize(("vocab", "hidden"), [(15, 128), (1000, 64), (5003, 256), (151936, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_logprob(vocab: int, hidden: int, with_bias: bool) -> None:
    from miles_kernels.cuda.linear import linear
    from miles_kernels.cuda.logprob import linear_logprob, logprob_from_logits

    x, w = torch.randn(300, hidden, dtype=BF16), torch.randn(vocab, hidden, dtype=BF16) * hidden**-0.5 * 2
    bias = torch.randn(vocab, dtype=BF16) if with_bias else None
    targets, temperature = torch.randint(0, vocab, (300,)), torch.rand(300) + 0.5
    leaves = [t.clone().requires_grad_() for t in (x, w, bias) if t is not None]
    out = linear_logprob(leaves[0], leaves[1], targets, temperature, *leaves[2:])
    exact = [t.double().requires_grad_() for t in (x, w, bias) if t is not None]
    z = exact[0] @ exact[1].t() + (exact[2] if with_bias else 0.0)
    logp = torch.log_softmax(z / temperature.double()[:, None], -1)
    picked, entropy = logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    assert (out.logprob - picked).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    g_lp, g_ent = torch.randn(300), torch.randn(300)
    ours = torch.autograd.grad((out.logprob * g_lp).sum() + (out.entropy * g_ent).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((picked * g_lp).sum() + (entropy * g_ent).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-2)
    for rows in ([5], list(range(20)), torch.randperm(300)[:77].tolist()):
        scored = logprob_from_logits(linear(x[rows], w, bias, out_dtype=torch.float32), targets[rows], temperature[rows])
        assert_bitwise_equal(scored.logprob, out.logprob[rows].detach(), "logprob from logits")
        assert_bitwise_equal(scored.entropy, out.entropy[rows].detach(), "entropy from logits")
        part = linear_logprob(x[rows].requires_grad_(), w, targets[rows], temperature[rows], bias)
        assert_bitwise_equal(part.logprob.detach(), out.logprob[rows].detach(), "other batch")
    assert linear_logprob(x, w, targets, entropy=False).entropy is None


def test_uniform_logits_do_not_overflow() -> None:
    from miles_kernels.cuda.logprob import logprob_from_logits

    out = logprob_from_logits(torch.zeros(4, 151936), torch.zeros(4, dtype=torch.int64))
    expected = -torch.tensor(151936.0).log()
    assert (out.logprob - expected).abs().max() < 1e-5 and (out.entropy + expected).abs().max() < 1e-5


@pytest.mark.parametrize(("n", "k"), [(128, 128), (1024, 512), (4096, 4096), (384, 640)])
def test_fp8(n: int, k: int) -> None:
    from miles_kernels.cuda import fp8
    from miles_kernels.cuda.grouped import Groups
    from miles_kernels.ops.fp8 import dequantize_weight, quantize_rows_reference, quantize_weight_reference

    x, w = torch.randn(200, k, dtype=BF16, requires_grad=True), torch.randn(n, k, dtype=BF16, requires_grad=True)
    quantized, reference = fp8.quantize_rows(x.detach()), quantize_rows_reference(x.detach())
    assert torch.equal(quantized.values.float(), reference.values.float()) and torch.equal(quantized.scales, reference.scales)
    for weight in (w.detach(), torch.randn(3, n, k, dtype=BF16)[:, : n - 40]):
        got, want = fp8.quantize_weight(weight), quantize_weight_reference(weight)
        assert torch.equal(got.values.float(), want.values.float()) and torch.equal(got.scales, want.scales)
    out = fp8.linear(x, w)
    rows = (quantized.values.double().view(200, -1, 128) * quantized.scales.double()[..., None]).view(200, k)
    close(out, rows @ dequantize_weight(fp8.quantize_weight(w)).double().t(), 5e-3)
    close(out, x.double() @ w.double().t(), 6e-2)
    for part in (slice(3, 4), slice(0, 16), slice(50, 150)):
        assert_bitwise_equal(fp8.linear(x[part], w), out[part], f"rows {part}")
    grad = torch.randn_like(out)
    dx, dw = torch.autograd.grad(out, (x, w), grad)
    close(dx, grad.double() @ w.double(), 5e-3)
    close(dw, grad.double().t() @ x.double(), 5e-3)
    both = torch.stack((w, w.flip(0))).detach()
    grouped = fp8.grouped_linear(x.detach(), both, Groups.from_counts([90, 110], 200, x.device))
    assert_bitwise_equal(grouped[:90], out[:90].detach(), "expert 0")
