from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_kernels.ops.grouped import grouped_linear
from miles_kernels.ops.linear import linear
from miles_kernels.ops.moe import combine, moe_mlp, permute, plan_dispatch
from miles_kernels.ops.router import route, route_sigmoid, router
from miles_kernels.routing import SigmoidRule
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
    with pytest.raises(ValueError, match="one of them -1"):
        grouped_linear(x, weight, [4, -1, 40, 16, 1])


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

    assert across_threads(gradients, (1, 2, 1), "moe gradients").abs().sum() > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="top_k must lie in 1 .. 11"):
        route(torch.randn(2, EXPERTS), 12)
    with pytest.raises(ValueError, match="expert id 11"):
        plan_dispatch(torch.tensor([[11]]), EXPERTS)


RULES = {
    "plain": SigmoidRule(),
    "scaled": SigmoidRule(scale=2.5),
    "groups": SigmoidRule(num_groups=4, kept_groups=2, scale=1.5),
    "one group of three": SigmoidRule(num_groups=3, kept_groups=1),
}


def sigmoid_oracle(logits: Tensor, k: int, rule: SigmoidRule, correction: Tensor, normalize: bool) -> tuple[list[int], Tensor]:
    """One token: the choice in plain Python, the weights differentiable."""
    scores = torch.sigmoid(logits)
    judged = (scores + correction).tolist()
    size = len(judged) // rule.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(rule.num_groups)]
    best = sorted(groups, key=lambda g: (-sum(sorted((judged[e] for e in g), reverse=True)[:2]), g[0]))[: rule.kept_groups]
    chosen = sorted((e for g in best for e in g), key=lambda e: (-judged[e], e))[:k]
    weights = scores[chosen]
    return chosen, rule.scale * (weights / (weights.sum() + 1e-20) if normalize else weights)


def clear_rows(correction: Tensor, rule: SigmoidRule, rows: int = 60) -> Tensor:
    """Logits whose scores, and sums over groups, lie far enough apart that float32 and float64 choose alike."""
    logits = torch.randn(4 * rows, len(correction)) * 2
    judged = torch.sigmoid(logits.double()) + correction.double()
    sums = judged.view(len(logits), rule.num_groups, -1).topk(2).values.sum(-1)
    gaps = [x.sort().values.diff().min(1).values for x in (judged, sums) if x.shape[1] > 1]
    return logits[torch.stack(gaps).min(0).values > 1e-5][:rows]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_sigmoid_rule_against_float64(rule: SigmoidRule, normalize: bool) -> None:
    correction, grad = torch.randn(12) * 0.4, torch.randn(60, 3)
    logits = clear_rows(correction, rule)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ids, weights = route_sigmoid(ours, 3, rule, correction, normalize=normalize)
    told = [sigmoid_oracle(row, 3, rule, correction.double(), normalize) for row in theirs]
    assert ids.tolist() == [chosen for chosen, _ in told]
    expected = torch.stack([w for _, w in told])
    assert (weights - expected).abs().max() <= 1e-6 * rule.scale
    weights.backward(grad)
    expected.backward(grad.double())
    assert ours.grad is not None and theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= 2e-6 * rule.scale
    replayed = route_sigmoid(logits, 3, rule, torch.zeros(12), normalize=normalize, ids=ids)
    assert_bitwise_equal(replayed.weights, weights.detach(), "weights do not know the correction")
    # negative control: what the correction and the groups decide is seen by the comparison above
    assert not torch.equal(route_sigmoid(logits, 3, rule, torch.zeros(12)).ids, ids)
    if rule.num_groups > 1:
        assert not torch.equal(route_sigmoid(logits, 3, SigmoidRule(), correction).ids, ids)


def test_sigmoid_ties_go_to_the_lower_expert_and_the_lower_group() -> None:
    logits = torch.zeros(1, 12)
    assert route_sigmoid(logits, 4, SigmoidRule(), torch.zeros(12)).ids.tolist() == [[0, 1, 2, 3]]
    raised = torch.zeros(12).index_fill_(0, torch.tensor([7, 10]), 0.5)
    rule = SigmoidRule(num_groups=4, kept_groups=2)
    assert route_sigmoid(logits, 4, rule, raised).ids.tolist() == [[7, 10, 6, 8]]
    assert route_sigmoid(logits, 4, rule, torch.zeros(12)).ids.tolist() == [[0, 1, 2, 3]]


def test_a_token_chooses_by_sigmoid_alone_as_in_any_batch() -> None:
    x, gate, correction = torch.randn(64, HIDDEN), torch.randn(12, HIDDEN), torch.randn(12)
    rule = RULES["groups"]

    def choose(x: Tensor) -> Tensor:
        ids, weights = router(x, gate, TOP_K, rule=rule, correction=correction)
        return torch.cat((ids.float(), weights), 1)

    sweep_rows(choose, x, name="sigmoid router", sizes=(1, 2, 7, 8, 9, 16, 33, 64)).check()
    across_threads(lambda: choose(x), name="sigmoid router")


def test_what_a_sigmoid_router_cannot_do_is_refused_by_name() -> None:
    logits = torch.zeros(2, 12)
    with pytest.raises(ValueError, match="num_experts=12 is no multiple of n_group=5"):
        route_sigmoid(logits, 2, SigmoidRule(num_groups=5), torch.zeros(12))
    with pytest.raises(ValueError, match=r"topk_group=3 must lie in 1\.\.n_group=2"):
        route_sigmoid(logits, 2, SigmoidRule(num_groups=2, kept_groups=3), torch.zeros(12))
    with pytest.raises(ValueError, match="num_experts_per_tok=7 exceeds the experts of topk_group=1"):
        route_sigmoid(logits, 7, SigmoidRule(num_groups=2), torch.zeros(12))
    with pytest.raises(ValueError, match=r"correction torch.bfloat16 \[12\] must be float32"):
        route_sigmoid(logits, 2, SigmoidRule(), torch.zeros(12, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="needs the experts' correction"):
        router(torch.zeros(2, HIDDEN), torch.zeros(12, HIDDEN), 2, rule=SigmoidRule())
