"""Attention and sampling on a GPU against float64 oracles, and bit for bit between schedules and kernels."""

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


@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
def test_pruned_sampling_draws_what_full_noise_draws(spread):
    from miles_kernels.cuda.logprob import logprob_from_logits
    from miles_kernels.cuda.sample import draw
    from miles_kernels.ops.sample import sample

    rows, vocab = 64, 50_000
    logits = torch.randn(rows, vocab, device="cuda") * spread
    ids, position = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda") * 3
    for seed in range(6):
        got = draw(logits, seed=seed, sample_id=ids, position=position, temperature=0.8)
        full = draw(logits, seed=seed, sample_id=ids, position=position, temperature=0.8, exact_noise=True)
        assert count_unequal(got.token, full.token) == 0
        assert count_unequal(got.logprob, full.logprob) == 0
    reference = sample(logits, seed=5, sample_id=ids, position=position, temperature=0.8)
    assert int((reference.token != got.token).sum()) <= 1  # float32 logarithms of two libraries
    scored = logprob_from_logits(logits, got.token, torch.full((rows,), 0.8, device="cuda"))
    assert count_unequal(scored.logprob, got.logprob) == 0
    alone = draw(logits[9:10], seed=5, sample_id=ids[9:10], position=position[9:10], temperature=0.8)
    assert int(alone.token) == int(got.token[9]) and count_unequal(alone.logprob, got.logprob[9:10]) == 0


def test_sampling_greedy_ties_and_broken_rows():
    from miles_kernels.cuda.sample import draw

    logits = torch.zeros(5, 20_000, device="cuda")
    logits[0, [777, 15_000]] = 2.0
    logits[1, 5] = float("nan")
    logits[2, 19_999] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("-inf")
    logits[4, 123] = -3.0
    ids = torch.arange(5, device="cuda")
    for temperature in (0.0, 1.0):
        out = draw(logits, seed=1, sample_id=ids, position=ids, temperature=temperature)
        tokens = out.token.tolist()
        assert tokens[1:] == [-1, -1, -1, 123] and abs(float(out.logprob[4])) < 1e-6
        assert temperature or tokens[0] == 777


def test_sampling_follows_the_distribution():
    from miles_kernels.cuda.sample import draw

    p = torch.tensor([0.5, 0.25, 0.125, 0.125], device="cuda")
    logits = torch.full((4096, 300), float("-inf"), device="cuda")
    logits[:, 100:104] = p.log()
    ids = torch.arange(4096, device="cuda")
    counts = torch.zeros(4, device="cuda")
    for position in range(16):
        token = draw(logits, seed=3, sample_id=ids, position=torch.full_like(ids, position)).token
        counts += torch.bincount(token - 100, minlength=4)
    expected = p * counts.sum()
    assert float(((counts - expected).square() / expected).sum()) < 21.1  # chi-square, 3 degrees, p = 1e-4
