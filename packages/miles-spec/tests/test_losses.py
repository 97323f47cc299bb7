"""Draft losses equal their definitions in float64, with gradients, in tiles of any size and on any cut of the stream."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miles_spec import losses
from miles_spec.losses import KINDS, draft_loss, token_losses
from miles_spec.targets import context_slots, draft_targets


def oracle(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher: Tensor,
    temperature: Tensor | float,
    kind: str,
    scale: float,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """The definitions, one whole [M, V] at a time; autograd makes the gradients."""
    heat = torch.as_tensor(temperature, dtype=hidden.dtype).expand(len(hidden))[:, None]
    q, p = torch.softmax(hidden @ head.T / heat, 1), torch.softmax(teacher @ head.detach().T / heat, 1)
    accept = torch.minimum(p, q).sum(1)
    kl = (p * (p / q).log()).sum(1)
    weight = scale * torch.exp(-decay * accept.detach())
    loss = {
        "ce": -q.gather(1, labels[:, None])[:, 0].log(),
        "kl": kl,
        "tv": 0.5 * (p - q).abs().sum(1),
        "lk_alpha": -accept.log(),
        "lk_lambda": weight * kl + (1 - weight) * (1 - accept),
    }[kind]
    return loss, accept


def problem(num: int = 13, size: int = 6, vocab: int = 37, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(random.getrandbits(40))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(num, size),
        "head": normal(vocab, size),
        "labels": torch.randint(vocab, (num,), generator=generator),
        "teacher": normal(num, size),
        "heat": torch.rand(num, generator=generator, dtype=torch.float64) + 0.5,
        "up": normal(num),
    }


def error(
    kind: Any,
    x: dict[str, Tensor],
    *,
    chunks: tuple[int, int] = (4, 10),
    heat: Tensor | float | None = None,
    train_head: bool = True,
) -> float:
    """Largest difference of losses, acceptance and gradients. `heat`: give another temperature to ours alone."""
    results = []
    for ours in (True, False):
        hidden, head = x["hidden"].clone().requires_grad_(), x["head"].clone().requires_grad_()
        if ours:
            found = token_losses(
                hidden,
                head,
                x["labels"],
                kind=kind,
                teacher_hidden=x["teacher"],
                temperature=x["heat"] if heat is None else heat,
                train_head=train_head,
                kl_scale=0.7,
                kl_decay=2.0,
                token_chunk=chunks[0],
                vocab_chunk=chunks[1],
            )
            loss, accept = found.loss, found.acceptance
        else:
            hidden, head = (x[name].double().clone().requires_grad_() for name in ("hidden", "head"))
            loss, accept = oracle(hidden, head, x["labels"], x["teacher"].double(), x["heat"], kind, 0.7, 2.0)
        (loss * x["up"]).sum().backward()
        made = (loss, accept, hidden.grad, head.grad if train_head else loss)
        results.append([part.detach().double() for part in made if part is not None])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_definitions(kind: str) -> None:
    for chunks in ((4, 10), (1, 37), (100, 100), (5, 1)):
        for train_head in (True, False):  # without it, tiles that span the vocabulary are made once
            assert error(kind, problem(), chunks=chunks, train_head=train_head) < 1e-11
    assert error(kind, problem(), chunks=(100, 100), heat=1.0, train_head=False) > 1e-3
    assert error(kind, problem(dtype=torch.float32), chunks=(4, 10)) < 2e-4
    assert error(kind, problem(), heat=1.0) > 1e-3, "another temperature than the sampler's must be seen"


@pytest.mark.parametrize("kind", ["tv", "lk_alpha", "lk_lambda"])
def test_a_wrong_gradient_of_acceptance_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses._slopes
    monkeypatch.setattr(losses, "_slopes", lambda accept, options: (*right(accept, options)[:2], 0.5 * right(accept, options)[2]))
    assert error(kind, problem()) > 1e-3


def test_ce_without_a_teacher_and_bf16() -> None:
    x = problem()
    hidden = x["hidden"].clone().requires_grad_()
    found = token_losses(hidden, x["head"], x["labels"], kind="ce", temperature=x["heat"], vocab_chunk=10)
    assert torch.equal(
        found.loss, oracle(hidden, x["head"], x["labels"], x["teacher"], x["heat"], "ce", 1, 1)[0]
    ) or torch.allclose(found.loss, oracle(hidden, x["head"], x["labels"], x["teacher"], x["heat"], "ce", 1, 1)[0], atol=1e-12)
    assert bool(found.acceptance.isnan().all())
    half = problem(dtype=torch.bfloat16)
    assert error("kl", half) < 0.1
    own = half["hidden"].clone().requires_grad_()
    token_losses(own, half["head"], half["labels"], teacher_hidden=half["teacher"]).loss.sum().backward()
    assert own.grad is not None and own.grad.dtype is torch.bfloat16


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.most = max(self.most, value.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_all_tokens_never_exist(kind: Any) -> None:
    x = problem(num=200, size=4, vocab=500, dtype=torch.float32)
    hidden = x["hidden"].clone().requires_grad_()
    with Largest() as ours:
        found = token_losses(
            hidden, x["head"], x["labels"], kind=kind, teacher_hidden=x["teacher"], token_chunk=20, vocab_chunk=50
        )
        found.loss.sum().backward()
    with Largest() as whole:
        oracle(hidden, x["head"], x["labels"], x["teacher"], 1.0, kind, 1.0, 1.0)
    assert ours.most <= 500 * 4 and whole.most >= 200 * 500


def stream() -> tuple[list[int], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(random.getrandbits(40))
    lengths = [9, 1, 14, 3, 0, 21]
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    mask[10:24] = False  # a sequence without anything to learn
    return lengths, torch.randint(37, (sum(lengths),), generator=generator), mask


@pytest.mark.parametrize("kind", ["ce", "kl", "lk_lambda"])
def test_depths_are_weighted_and_processes_add_up(kind: Any) -> None:
    lengths, tokens, mask = stream()
    size, weights, heat = sum(lengths), [0.5, 0.3, 0.2], torch.rand(sum(lengths), dtype=torch.float64) + 0.5
    x, teacher = problem(num=3 * size), problem(num=size)["hidden"]
    states = x["hidden"].view(3, size, -1)
    targets = draft_targets(tokens, mask, lengths, 3)
    expected, per_depth = torch.tensor(0.0, dtype=torch.float64), []
    leaf = states.clone().requires_grad_()
    for depth in range(3):  # one token at a time
        rows = [i for i in range(size) if targets.labels[depth, i] >= 0]
        parts = [
            oracle(
                leaf[depth, i : i + 1],
                x["head"],
                tokens[i + depth + 2 : i + depth + 3],
                teacher[i + depth + 1 : i + depth + 2],
                float(heat[i + depth + 1]),
                kind,
                1.0,
                3.0,
            )[0]
            for i in rows
        ]
        per_depth.append(torch.cat(parts).mean())
        expected = expected + weights[depth] * per_depth[-1]
    expected.backward()
    for ranks in (1, 2, 4):
        total, shares, grad = 0.0, torch.zeros(3, dtype=torch.float64), torch.zeros_like(states)
        for rank in range(ranks):
            slots = context_slots(lengths, rank, ranks)
            own = states[:, slots].clone().requires_grad_()
            found = draft_loss(
                list(own),
                x["head"],
                targets.take(slots),
                kind=kind,
                teacher_hidden=teacher,
                temperature=heat,
                depth_weights=weights,
            )
            found.loss.backward()
            total += float(found.loss.detach())
            shares += found.by_depth
            grad[:, slots] = own.grad  # type: ignore[assignment]
            assert bool(((found.acceptance >= 0) & (found.acceptance <= 1)).all())
        assert total == pytest.approx(float(expected.detach()), abs=1e-12)
        assert shares.tolist() == pytest.approx([float(value.detach()) for value in per_depth], abs=1e-12)
        assert leaf.grad is not None and float((grad - leaf.grad).abs().max()) < 1e-12


def test_nothing_supervised_is_zero_not_nan() -> None:
    lengths, tokens, mask = stream()
    targets = draft_targets(tokens, mask & False, lengths, 2)
    states = torch.randn(2, sum(lengths), 6, requires_grad=True)
    found = draft_loss(list(states), torch.randn(37, 6), targets, teacher_hidden=torch.randn(sum(lengths), 6))
    found.loss.backward()
    assert float(found.loss.detach()) == 0.0 and found.acceptance.tolist() == [0.0, 0.0]
    assert states.grad is not None and not bool(states.grad.any())


def test_head_and_teacher_get_no_gradient_unless_asked() -> None:
    x = problem()
    hidden, head, teacher = (x[name].clone().requires_grad_() for name in ("hidden", "head", "teacher"))
    token_losses(hidden, head, x["labels"], teacher_hidden=teacher).loss.sum().backward()
    assert hidden.grad is not None and head.grad is None and teacher.grad is None
    token_losses(hidden, head, x["labels"], teacher_hidden=teacher, train_head=True).loss.sum().backward()
    assert head.grad is not None and teacher.grad is None


def test_wrong_input_is_refused() -> None:
    x = problem()
    hidden, head, labels, teacher = x["hidden"], x["head"], x["labels"], x["teacher"]
    with pytest.raises(ValueError, match="no draft loss 'mse'; there are: ce, kl"):
        token_losses(hidden, head, labels, kind="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass teacher_hidden, or take 'ce'"):
        token_losses(hidden, head, labels, kind="tv")
    with pytest.raises(ValueError, match="do not fit"):
        token_losses(hidden, head[:, :3], labels, kind="ce")
    with pytest.raises(ValueError, match="labels lie in"):
        token_losses(hidden, head, labels - 100, kind="ce")
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_losses(hidden, head, labels, kind="ce", temperature=0.0)
    with pytest.raises(ValueError, match="for 13 tokens"):
        token_losses(hidden, head, labels, teacher_hidden=teacher[:2])
    with pytest.raises(ValueError, match="teacher_head has 3 tokens, head 37"):
        token_losses(hidden, head, labels, teacher_hidden=teacher, teacher_head=head[:3])
    with pytest.raises(ValueError, match="vocab_chunk=0"):
        token_losses(hidden, head, labels, teacher_hidden=teacher, vocab_chunk=0)
    targets = draft_targets(labels, torch.ones(13, dtype=torch.bool), [13], 2)
    with pytest.raises(ValueError, match="targets have 2 depths, but there are 1 hidden"):
        draft_loss([hidden], head, targets, teacher_hidden=teacher)
    with pytest.raises(ValueError, match="depth 2: hidden has 5 slots, targets 13"):
        draft_loss([hidden, hidden[:5]], head, targets, teacher_hidden=teacher)
