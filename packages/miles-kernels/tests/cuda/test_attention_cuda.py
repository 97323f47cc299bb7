"""Attention on a GPU against float64 oracles, and bit for bit between schedules and kernels."""

import pytest
import torch

from miles_kernels.testing import count_unequal

pytestmark = pytest.mark.gpu
LENS = [300, 129, 1, 640]


@pytest.fixture(autouse=True)
def _gpu():
    pytest.importorskip("triton")


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def oracle(q, k, v, lens, scale, window=None):
    outs, start = [], 0
    group = q.shape[1] // k.shape[1]
    for n in lens:
        rows = slice(start, start + n)
        qq = q[rows].double().transpose(0, 1)
        kk, vv = (x[rows].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        s = qq @ kk.transpose(1, 2) * scale
        i = torch.arange(n, device=q.device)
        hidden = i[None] > i[:, None]
        if window is not None:
            hidden |= i[None] <= i[:, None] - window
        outs.append((s.masked_fill(hidden, -torch.inf).softmax(-1) @ vv).transpose(0, 1))
        start += n
    return torch.cat(outs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dim_v", "window"),
    [
        (8, 2, 128, 128, None),
        (8, 8, 64, 64, None),
        (7, 1, 128, 128, None),
        (4, 4, 192, 128, None),
        (8, 2, 128, 128, 77),
        (6, 2, 96, 96, None),
        (4, 2, 32, 32, None),
    ],
)
def test_forward_and_gradients_match_float64(heads, kv_heads, dim, dim_v, window):
    from miles_kernels.cuda.attention import KVBatch
    from miles_kernels.cuda.attention_op import attention

    total = sum(LENS)
    q, k, v = (randn(total, h, d).requires_grad_() for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v)))
    out = attention(q, k, v, KVBatch.packed(LENS), scale=dim**-0.5, window=window)
    g = randn(*out.shape)
    got = torch.autograd.grad(out, (q, k, v), g)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = oracle(*leaves, LENS, dim**-0.5, window)
    wants = torch.autograd.grad(want, leaves, g.double())
    assert relative(out, want) < 5e-3
    assert all(relative(a, b) < 1e-2 for a, b in zip(got, wants, strict=True))
    assert relative(oracle(*leaves, LENS, dim**-0.5 * 1.05, window), want) > 5e-3  # negative control


@pytest.mark.parametrize("window", [None, 100])
def test_every_kernel_and_schedule_gives_the_same_bits(window):
    from miles_kernels.cuda import attention_ws
    from miles_kernels.cuda.attention import KVBatch, forward

    q, k, v = (randn(sum(LENS), h, 128) for h in (8, 2, 2))
    batch = KVBatch.packed(LENS)
    out, lse = forward(q, k, v, batch, scale=0.09, window=window, partial=False)
    for block_m, warps, partial in ((16, 1, False), (16, 4, True), (32, 4, False), (64, 4, True), (128, 8, True)):
        other = forward(q, k, v, batch, scale=0.09, window=window, block_m=block_m, num_warps=warps, partial=partial)
        assert count_unequal(other[0], out) == 0 and count_unequal(other[1], lse) == 0, (block_m, warps, partial)
    assert attention_ws.unsupported(q, k, v, batch) is None
    other = attention_ws.forward(q, k, v, batch, scale=0.09, window=window)
    assert count_unequal(other[0], out) == 0 and count_unequal(other[1], lse) == 0
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(x[:300].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.09, enable_gqa=True
    )[0].transpose(0, 1)
    assert count_unequal(stock, out[:300]) > 0  # another order of sums is seen


def test_gradients_repeat_and_do_not_depend_on_the_micro_batch():
    from miles_kernels.cuda.attention import KVBatch, backward, forward

    q, k, v = (randn(sum(LENS), h, 128) for h in (8, 2, 2))
    g = randn(sum(LENS), 8, 128)
    batch = KVBatch.packed(LENS)
    out, lse = forward(q, k, v, batch, scale=0.09)
    first = backward(q, k, v, out, lse, g, batch, scale=0.09)
    for _ in range(3):
        assert all(
            count_unequal(a, b) == 0 for a, b in zip(backward(q, k, v, out, lse, g, batch, scale=0.09), first, strict=True)
        )
    n = LENS[0]
    alone = backward(q[:n], k[:n], v[:n], out[:n], lse[:n], g[:n], KVBatch.packed([n]), scale=0.09)
    assert all(count_unequal(a, b[:n]) == 0 for a, b in zip(alone, first, strict=True))
