"""Head norms, rotation, cache write and attention in one op on a GPU: packed, cached and decoded alike, float64 oracles."""

import pytest
import torch

from miles_kernels.ops.rope import RopeTable
from miles_kernels.testing import count_unequal

pytestmark = pytest.mark.gpu
EPS = 1e-6


@pytest.fixture(autouse=True)
def _gpu():
    pytest.importorskip("triton")


def randn(*shape):
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def case(heads, kv_heads, dim, lengths, norm=True):
    from miles_kernels.cuda.attention import KVBatch
    from miles_kernels.cuda.qkv import Heads

    tokens = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
    cos, sin = RopeTable(dim, 10_000.0, device="cuda").rows(positions)
    weight = (1 + randn(2, dim) * 0.1).to(torch.bfloat16) if norm else None
    return (
        randn(tokens, (heads + 2 * kv_heads) * dim),
        weight,
        cos,
        sin,
        KVBatch.packed(lengths),
        Heads(heads, kv_heads, dim**-0.5, None, EPS),
    )


def in_float64(qkv, weight, cos, sin, lengths, sizes):
    h, kv = sizes.heads, sizes.kv_heads
    parts = qkv.view(qkv.shape[0], h + 2 * kv, -1)
    q, k, v = parts[:, :h], parts[:, h : h + kv], parts[:, h + kv :]

    def turn(x, w):
        if w is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w
        return x * cos.double() + torch.roll(x, x.shape[-1] // 2, -1) * sin.double()

    q, k = turn(q, None if weight is None else weight[0]), turn(k, None if weight is None else weight[1])
    outs, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        start += n
        keys, values = (x[rows].repeat_interleave(h // kv, 1).transpose(0, 1) for x in (k, v))
        scores = q[rows].transpose(0, 1) @ keys.transpose(1, 2) * sizes.scale
        hidden = torch.ones(n, n, dtype=torch.bool, device="cuda").triu(1)
        outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


SIZES = [(16, 8, 128), (32, 8, 128), (4, 2, 64), (4, 2, 32), (6, 2, 32)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SIZES)
def test_packed_alone_cached_and_decoded_have_the_same_bits(heads, kv_heads, dim, norm):
    from miles_kernels.cuda.attention import KVBatch
    from miles_kernels.cuda.qkv import attention_of

    lengths = [70, 900, 1, 33]
    qkv, weight, cos, sin, batch, sizes = case(heads, kv_heads, dim, lengths, norm)
    want = attention_of(qkv, weight, cos, sin, batch, sizes)
    wide = (qkv.double(), None if weight is None else weight.double())
    exact = in_float64(*wide, cos, sin, lengths, sizes)
    assert relative(want, exact) < 1e-2
    assert relative(in_float64(*wide, cos, -sin, lengths, sizes), exact) > 1e-2  # negative control
    trained = attention_of(qkv.clone().requires_grad_(), weight, cos, sin, batch, sizes)
    assert count_unequal(trained.detach(), want) == 0
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        start += n
        alone = attention_of(qkv[rows], weight, cos[rows], sin[rows], KVBatch.packed([n]), sizes)
        assert count_unequal(alone, want[rows]) == 0
    for page in (16, 64):
        pages = -(-max(lengths) // page)
        table = torch.randperm(len(lengths) * pages).view(len(lengths), pages)
        slots = torch.cat([table[i, torch.arange(n) // page] * page + torch.arange(n) % page for i, n in enumerate(lengths)])
        pools = [torch.full((kv_heads, table.numel() * page, dim), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        plan = KVBatch.paged(lengths, lengths, table.to("cuda", torch.int32), page)
        got = attention_of(qkv, weight, cos, sin, plan, sizes, (*pools, slots.cuda()))
        assert count_unequal(got, want) == 0, page
        value = qkv.view(len(qkv), -1, dim)[:, heads + kv_heads :]
        assert count_unequal(pools[1][:, slots.cuda()].transpose(0, 1), value) == 0  # stored as they are
        untouched = torch.ones(table.numel() * page, dtype=torch.bool)
        untouched[slots] = False
        assert all(bool((pool[:, untouched.cuda()] == 7.0).all()) for pool in pools)
        last = torch.tensor([sum(lengths[: i + 1]) - 1 for i in range(len(lengths))], device="cuda")
        one = KVBatch.paged([1] * 4, lengths, table.to("cuda", torch.int32), page)
        args = (qkv[last], weight, cos[last], sin[last], one, sizes, (*pools, slots.cuda()[last]))
        assert count_unequal(attention_of(*args), want[last]) == 0, "decode"


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SIZES)
def test_gradients_match_float64_and_repeat(heads, kv_heads, dim, norm):
    from miles_kernels.cuda.qkv import attention_of

    lengths = [70, 300, 1, 33]
    qkv, weight, cos, sin, batch, sizes = case(heads, kv_heads, dim, lengths, norm)
    leaves = [x.requires_grad_() for x in (qkv, weight) if x is not None]
    out = attention_of(qkv, weight, cos, sin, batch, sizes)
    grad = randn(*out.shape)
    got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert all(count_unequal(a, b) == 0 for a, b in zip(got, again, strict=True))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = in_float64(wide[0], wide[1] if norm else None, cos, sin, lengths, sizes)
    assert relative(out, exact) < 1e-2
    want = torch.autograd.grad(exact, wide, grad.double())
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 2e-2
        assert relative(a * 1.05, b) > 2e-2  # negative control


def test_a_gradient_through_a_cache_is_refused():
    from miles_kernels.cuda.qkv import attention_of

    qkv, weight, cos, sin, batch, sizes = case(4, 2, 64, [20])
    pools = [torch.zeros(2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    with pytest.raises(ValueError, match="no gradient"):
        attention_of(qkv.requires_grad_(), weight, cos, sin, batch, sizes, (*pools, torch.arange(20, device="cuda")))
