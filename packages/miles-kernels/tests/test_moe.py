from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_kernels.ops.grouped import grouped_linear
from miles_kernels.ops.linear import linear
from miles_kernels.ops.moe import combine, moe_mlp, permute, plan_dispatch
from miles_kernels.ops.router import route, router
from miles_kernels.testing import across_threads, assert_bitwise_equal, sweep_rows

EXPERTS, TOP_K, HIDDEN, INNER = 11, 3, 48, 32


def weights(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        (torch.randn(*s) * 0.3).to(dtype) for s in ((EXPERTS, HIDDEN), (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    )


def block(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    ids, scores = router(x, gate, TOP_K)
    return moe_mlp(x, gate_up, down, ids, scores)


def oracle(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, normalize: bool = True) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x:
        p = torch.softmax(gate @ token, -1)
        chosen = sorted(range(EXPERTS), key=lambda e: (-p[e].item(), e))[:TOP_K]
        total = sum(p[e] for e in chosen) if normalize else 1.0
        out = torch.zeros_like(token)
        for e in chosen:
            g, u = (gate_up[e] @ token).chunk(2)
            out = out + p[e] / total * (down[e] @ (g * torch.sigmoid(g) * u))
        rows.append(out)
    return torch.stack(rows)


def test_block_and_gradients_against_float64() -> None:
    inputs = (torch.randn(29, HIDDEN), *weights())
    ours, theirs = ([t.clone().to(d).requires_grad_() for t in inputs] for d in (torch.float32, torch.float64))
    out, expected = block(*ours), oracle(*theirs)
    grad = torch.randn_like(out)
    pairs = [
        (out, expected),
        *zip(torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, theirs, grad.double()), strict=True),
    ]
    for i, (a, b) in enumerate(pairs):
        assert (a - b).abs().max() <= 5e-6 * b.abs().max(), f"output (0) or gradient {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    x, parameters = torch.randn(64, HIDDEN).to(dtype), weights(dtype)
    sweep_rows(lambda x: block(x, *parameters), x, name="moe block", sizes=(1, 2, 7, 16, 33, 64)).check()


def test_grouped_rows_equal_each_experts_linear() -> None:
    x, weight, counts = torch.randn(60, HIDDEN), torch.randn(5, 40, HIDDEN), [3, 0, 40, 16, 1]
    out, start = grouped_linear(x, weight, counts), 0
    for expert, count in enumerate(counts):
        assert_bitwise_equal(out[start : start + count], linear(x[start : start + count], weight[expert]), f"expert {expert}")
        start += count
    with pytest.raises(ValueError, match="5 counts summing to 61"):
        grouped_linear(x, weight, [4, 0, 40, 16, 1])


def test_ties_go_to_the_lower_expert() -> None:
    logits = torch.randn(200, 64).mul(2).round()
    ids, scores = route(logits, 8)
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(64), key=lambda e: (-row[e], e))[:8]
    assert (scores.sum(-1) - 1).abs().max() < 1e-6
    picked = torch.topk(logits, 8).indices
    assert not torch.equal(picked, ids), "negative control: torch.topk does not promise the lower id"


def test_replayed_experts_keep_their_weights() -> None:
    logits = torch.randn(9, EXPERTS)
    ids, scores = route(logits, TOP_K)
    assert_bitwise_equal(route(logits, TOP_K, ids=ids).weights, scores)
    other = (ids + 1) % EXPERTS
    assert torch.equal(route(logits, TOP_K, ids=other).ids, other)


@pytest.mark.parametrize("normalize", [True, False])
def test_route_gradient_against_float64(normalize: bool) -> None:
    logits = torch.randn(17, EXPERTS, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    ids, scores = route(logits, TOP_K, normalize=normalize)
    p = torch.softmax(wide, -1).gather(1, ids)
    expected = p / p.sum(-1, keepdim=True) if normalize else p
    grad = torch.randn_like(scores)
    (ours,), (theirs,) = torch.autograd.grad(scores, logits, grad), torch.autograd.grad(expected, wide, grad.double())
    assert (ours - theirs).abs().max() < 1e-6
    assert not ids.requires_grad


def test_permute_and_combine_undo_each_other() -> None:
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(20)])
    dispatch, x = plan_dispatch(ids, EXPERTS), torch.randn(20, HIDDEN)
    assert sum(dispatch.counts) == 60 and len(dispatch.counts) == EXPERTS
    sorted_ids = ids.flatten()[dispatch.order]
    assert torch.equal(sorted_ids, sorted_ids.sort().values)
    one_slot = torch.zeros(20, TOP_K)
    one_slot[:, 1] = 1.0
    assert_bitwise_equal(combine(permute(x, dispatch), one_slot, dispatch), x)


def test_backward_repeats_itself() -> None:
    inputs, grad = (torch.randn(80, HIDDEN), *weights()), torch.randn(80, HIDDEN)

    def gradients() -> Tensor:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return torch.cat([g.flatten() for g in torch.autograd.grad(block(*leaves), leaves, grad)])

    across_threads(gradients, (1, 2, 1), "moe gradients")


def test_errors() -> None:
    with pytest.raises(ValueError, match="top_k must lie in 1 .. 11"):
        route(torch.randn(2, EXPERTS), 12)
    with pytest.raises(ValueError, match="expert id 11"):
        plan_dispatch(torch.tensor([[11]]), EXPERTS)
