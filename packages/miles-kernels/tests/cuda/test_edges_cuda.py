"""Edges on a GPU: odd sizes, views, empty batches, ids out of range, mixed dtypes, variants that are off by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from miles_kernels.testing import assert_bitwise_equal, count_unequal

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.fail("a gpu test needs a CUDA device; deselect with -m 'not gpu'")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


def half(*shape: int) -> Tensor:
    return torch.randn(shape).to(HALF)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("width", [40, 100, 128, 1000, 1024])
def test_a_norm_has_the_bits_of_the_same_rows_anywhere(width: int) -> None:
    from miles_kernels.cuda.norm import add_rms_norm, rms_norm

    x, w = half(9, width), half(width)
    want = rms_norm(x, w, 1e-6)
    room = half(9 * (width + 3) + 1)
    view = room[1:].view(9, width + 3)[:, :width].copy_(x)
    odd = half(width + 1)[1:].copy_(w)
    assert odd.data_ptr() % 16
    for rows, weight in ((view, w), (x, odd), (view, odd), (x[4:], w)):
        assert_bitwise_equal(rms_norm(rows, weight, 1e-6), want[-len(rows) :], "view")
    zeros = torch.zeros_like(x)
    assert_bitwise_equal(add_rms_norm(view, zeros, odd, 1e-6)[0], want, "with a residual")


def test_biases_of_two_dtypes_in_turn() -> None:
    from miles_kernels.cuda.linear import linear

    x, w, b = half(17, 1024), half(512, 1024), half(512)
    exact = x.double() @ w.double().t() + b.double()
    for bias in (b, b.float(), b, half(513)[1:].copy_(b), torch.stack((b, b), 1)[:, 0]):
        assert distance(linear(x, w, bias), exact) < 5e-3
    with pytest.raises(ValueError, match="do not fit together"):
        linear(x, half(512, 1016))


def test_no_tokens_have_gradients_of_zero() -> None:
    from miles_kernels.cuda.linear import linear
    from miles_kernels.cuda.logprob import linear_logprob

    x, w, b = half(0, 64).requires_grad_(), half(300, 64).requires_grad_(), half(300).requires_grad_()
    linear(x, w, b).sum().backward()
    assert w.grad is not None and not w.grad.any() and b.grad is not None and not b.grad.any()
    w.grad = None
    linear_logprob(x, w, torch.empty(0, dtype=torch.int64)).logprob.sum().backward()
    assert w.grad is not None and not w.grad.any()


def test_ids_out_of_range_and_logits_that_are_no_numbers() -> None:
    from miles_kernels.cuda.logprob import linear_logprob, logprob_from_logits
    from miles_kernels.cuda.router import route

    x, w = half(20, 64), half(300, 64)
    targets = torch.randint(0, 300, (20,))
    good = linear_logprob(x, w, targets).logprob
    bad = targets.clone()
    bad[3], bad[7] = -100, 300
    for got in (linear_logprob(x, w, bad).logprob, logprob_from_logits((x.float() @ w.float().t()), bad).logprob):
        assert got.isnan().nonzero().flatten().tolist() == [3, 7]
    kept = torch.ones(20, dtype=torch.bool)
    kept[3] = kept[7] = False
    assert_bitwise_equal(linear_logprob(x, w, bad).logprob[kept], good[kept], "the other rows")
    logits = torch.randn(5, 60)
    logits[2, 40] = float("nan")
    logits[4, 1] = float("inf")
    ids, weights = route(logits, 4)
    assert 0 <= int(ids.min()) and int(ids.max()) < 60
    assert weights.isnan().any(1).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("window", [None, 77])
def test_heads_of_256(window: int | None) -> None:
    from miles_kernels.cuda.attention import KVBatch, forward

    lengths = [300, 129, 1, 640]
    q, k, v = half(sum(lengths), 16, 256), half(sum(lengths), 2, 256), half(sum(lengths), 2, 256)
    out, lse = forward(q, k, v, KVBatch.packed(lengths), scale=1 / 16, window=window)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        keys, values = (x[rows].double().transpose(0, 1).repeat_interleave(8, 0) for x in (k, v))
        scores = q[rows].double().transpose(0, 1) @ keys.transpose(1, 2) / 16
        i = torch.arange(length)
        hidden = i[None] > i[:, None]
        hidden |= i[None] <= i[:, None] - (window or length)
        want = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
        assert distance(out[rows], want) < 5e-3
        last = slice(start + length - 1, start + length)
        one = KVBatch(torch.tensor([0, 1], dtype=torch.int32), *(torch.tensor([n], dtype=torch.int32) for n in (length, start)),
                      None, 0, 1, length)  # fmt: skip
        for partial in (False, True):
            alone = forward(q[last], k, v, one, scale=1 / 16, window=window, partial=partial)
            assert_bitwise_equal(alone[0], out[last], "the last query alone")
        start += length
    assert count_unequal(forward(q, k, v, KVBatch.packed(lengths), scale=1 / 15, window=window)[0], out) > 0  # the control


@pytest.mark.parametrize(
    ("tokens", "slots", "experts"), [(33, 8, 128), (100, 3, 5), (200, 1, 3), (700, 8, 128), (9000, 8, 128), (600, 10, 512)]
)
def test_tokens_are_sorted_by_expert(tokens: int, slots: int, experts: int) -> None:
    """Order, places, first rows of the experts and tiles, against torch's stable sort; ten times, as its launches overlap."""
    from miles_kernels.cuda import moe

    for _ in range(10):
        ids = (torch.rand(tokens, experts) + torch.arange(experts) / experts).topk(slots).indices
        plan = moe.plan_dispatch(ids, experts)
        order = torch.sort(ids.flatten(), stable=True).indices
        counts = torch.bincount(ids.flatten(), minlength=experts)
        assert torch.equal(plan.order.long(), order)
        assert torch.equal(plan.place.flatten().long(), torch.argsort(order))
        assert torch.equal(plan.groups.offsets[1:].long(), counts.cumsum(0)) and not plan.groups.offsets[0]
        ((height, tiles),) = plan.groups._plans.items()
        assert int(tiles.count) == int(((counts + height - 1) // height).sum())
    assert not torch.equal(plan.order, moe.plan_dispatch(ids.flip(0), experts).order)  # the control


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_experts_of_few_tokens_pair_by_pair(tokens: int) -> None:
    from miles_kernels.cuda import moe

    for experts, slots, hidden, width in ((64, 8, 512, 96), (4, 2, 80, 48), (5, 4, 2048, 768)):
        x, up, down = (
            half(tokens, hidden),
            half(experts, 2 * width, hidden) * hidden**-0.5,
            half(experts, hidden, width) * width**-0.5,
        )
        ids, weights = torch.rand(tokens, experts).topk(slots).indices, torch.rand(tokens, slots)
        assert moe.few_proven(0, tokens, slots, ids.dtype, x.dtype)
        want = moe._sorted(x, up, down, ids, weights)
        assert_bitwise_equal(moe._few(x, up, down, ids, weights), want, "pairs")
        assert count_unequal(moe._few(x, up, down.roll(1, 0), ids, weights), want) > 0  # the control


@pytest.mark.parametrize(
    ("rows", "hidden", "vocab"), [(300, 264, 5003), (70, 1024, 30000), (300, 4096, 60_000), (9000, 2048, 33_000)]
)
def test_the_gradient_of_steps_that_lie_in_it(rows: int, hidden: int, vocab: int) -> None:
    """Near float64, the same twice, a row's bits its own, and those without a gradient of the weight, where nothing is lent."""
    from miles_kernels.cuda import logprob

    x, w, targets = half(rows, hidden), half(vocab, hidden) * 3 * hidden**-0.5, torch.randint(0, vocab, (rows,))
    inverse = logprob.inverse_temperature(1.0, rows, x.device)
    lp, ent, norm = logprob.forward(x, w, targets, inverse)
    g = torch.randn(rows)

    def call(some: slice, weights: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        each = (targets[some], inverse[some], norm[some], ent[some])
        return logprob.backward((g[some], None), x[some], w, *each, needs=(True, weights, False))

    (one, dw, _), (two, dw_two, _) = call(slice(0, rows)), call(slice(0, rows))
    part, alone = call(slice(5, 40))[0], call(slice(0, rows), False)[0]
    assert one is not None and two is not None and part is not None and alone is not None
    assert dw is not None and dw_two is not None
    assert_bitwise_equal(one, two, "twice")
    assert_bitwise_equal(dw, dw_two, "weights twice")
    assert_bitwise_equal(part, one[5:40], "another batch")
    assert_bitwise_equal(alone, one, "nothing lent")
    some = slice(0, 64)
    p = torch.softmax(x[some].double() @ w.double().t(), -1)
    p[torch.arange(64), targets[some]] -= 1
    assert distance(one[some], -(g.double()[some, None] * p) @ w.double()) < 6e-3
    columns = torch.randperm(vocab)[:200]
    z = x.double() @ w[columns].double().t()
    p = torch.exp2(z * 1.4426950408889634 - norm[:, None].double()) - (targets[:, None] == columns).double()
    assert distance(dw[columns], -(g.double()[:, None] * p).t() @ x.double()) < 6e-3
    uniform = [(start, min(start + 1024, vocab)) for start in range(0, vocab, 1024)]
    other = logprob.backward((g, None), x, w, targets, inverse, norm, ent, steps=uniform)[0]
    assert other is not None and count_unequal(other, one) > 0, "the steps fix the order of sums"
