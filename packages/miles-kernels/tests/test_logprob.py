from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_kernels.ops.linear import linear
from miles_kernels.ops.logprob import linear_logprob, logprob_from_logits
from miles_kernels.ops.norm import rms_norm
from miles_kernels.ops.sample import sample
from miles_kernels.testing import across_threads, assert_bitwise_equal, sweep_rows, threads

pytestmark = pytest.mark.usefixtures("formulation")

CASES = [(97, None), (4096, None), (9000, None), (500, 128), (513, 128)]
"""(vocabulary, chunk): one chunk, a full one, several with a ragged tail."""


def oracle(logits: Tensor, targets: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    divisor = temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature
    logp = torch.log_softmax(logits.double() / divisor, -1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def options(chunk: int | None) -> dict[str, int]:
    return {} if chunk is None else {"chunk": chunk}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("vocab", "chunk"), CASES)
def test_values_and_gradients_against_float64(vocab: int, chunk: int | None, with_bias: bool) -> None:
    inputs = [torch.randn(23, 40), torch.randn(vocab, 40) * 0.5] + ([torch.randn(vocab)] if with_bias else [])
    targets, temperature = torch.randint(0, vocab, (23,)), torch.rand(23) + 0.3
    ours, theirs = ([x.clone().to(t).requires_grad_() for x in inputs] for t in (torch.float32, torch.float64))
    out = linear_logprob(ours[0], ours[1], targets, temperature, *ours[2:], **options(chunk))
    logits = theirs[0] @ theirs[1].t() + (theirs[2] if with_bias else 0.0)
    expected = oracle(logits, targets, temperature)
    for a, b in zip(out, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    g_logprob, g_entropy = torch.randn(23), torch.randn(23)
    for use_logprob, use_entropy in ((1, 0), (0, 1), (1, 1)):
        loss, loss64 = (
            use_logprob * (pair[0] * g_logprob).sum() + use_entropy * (pair[1] * g_entropy).sum() for pair in (out, expected)
        )
        pairs = zip(
            torch.autograd.grad(loss, ours, retain_graph=True),
            torch.autograd.grad(loss64, theirs, retain_graph=True),
            strict=True,
        )
        for a, b in pairs:
            # logits of up to 40 are rounded to about 4e-6, which softmax and the entropy's log p multiply by as much again
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_only_one_output_needs_a_gradient() -> None:
    hidden, weight, targets = torch.randn(5, 16, requires_grad=True), torch.randn(60, 16), torch.randint(0, 60, (5,))
    out = linear_logprob(hidden, weight, targets)
    (alone,) = torch.autograd.grad(out.entropy.sum(), hidden, retain_graph=True)
    (both,) = torch.autograd.grad(out.entropy.sum() + 0.0 * out.logprob.sum(), hidden)
    assert (alone - both).abs().max() < 1e-6
    assert linear_logprob(hidden, weight, targets, entropy=False).entropy is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "chunk"), CASES)
def test_engine_and_trainer_agree_bitwise(vocab: int, chunk: int | None, dtype: torch.dtype) -> None:
    """Full logits of any batch, scored with a temperature tensor, against fused scoring with a number, with autograd."""
    hidden, weight = torch.randn(70, 64).to(dtype), torch.randn(vocab, 64).to(dtype)
    targets = torch.randint(0, vocab, (70,))
    trained = linear_logprob(hidden, weight.clone().requires_grad_(), targets, 0.7, **options(chunk))
    for size in (1, 2, 15, 16, 33, 70):
        rows = torch.randperm(70)[:size]
        logits = linear(hidden[rows], weight, out_dtype=torch.float32)
        scored = logprob_from_logits(logits, targets[rows], torch.full((size,), 0.7), **options(chunk))
        assert_bitwise_equal(scored.logprob, trained.logprob[rows].detach(), f"logprob of {size}")
        assert_bitwise_equal(scored.entropy, trained.entropy[rows].detach(), f"entropy of {size}")
        lean = logprob_from_logits(logits, targets[rows], 0.7, entropy=False, **options(chunk))
        assert_bitwise_equal(lean.logprob, scored.logprob)


def test_rows_do_not_depend_on_their_batch() -> None:
    logits, targets = torch.randn(64, 9001) * 4, torch.randint(0, 9001, (64,))
    report = sweep_rows(lambda z, t: torch.stack(logprob_from_logits(z, t, 1.3), 1), logits, targets, sizes=(1, 2, 7, 16, 33, 64))
    assert report.check().num_elements > 0


def test_one_row_over_a_whole_vocabulary_would_depend_on_threads() -> None:
    """Negative control for the chunks: a long row alone is summed in two halves on two threads."""
    rows = torch.rand(20, 151_936)
    sums = []
    for count in (1, 2):
        with threads(count):
            sums.append(torch.stack([row.sum() for row in rows]))
    assert not torch.equal(*sums)


def test_chunks_do_not_depend_on_threads() -> None:
    logits, targets = torch.randn(1, 151_936), torch.randint(0, 151_936, (1,))
    found = across_threads(lambda: torch.cat(logprob_from_logits(logits, targets)), name="logprob of one long row")
    assert (found[0].double() - logits.double().log_softmax(-1)[0, targets[0]]).abs() < 1e-5


def test_backward_repeats_itself() -> None:
    hidden, weight, targets = torch.randn(50, 64), torch.randn(600, 64), torch.randint(0, 600, (50,))

    def gradients() -> Tensor:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear_logprob(*leaves, targets, 0.9, chunk=256)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.logprob.sum() - out.entropy.mean(), leaves)])

    assert across_threads(gradients, (1, 2, 1), "logprob gradients").abs().sum() > 0


def test_masked_logits_and_extremes() -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[:, 5] = 1000.0
    logits[1, 299] = 1000.0
    out = logprob_from_logits(logits, torch.tensor([5, 299]), chunk=128)
    expected = torch.tensor([0.0, -0.6931472])
    assert (out.logprob - expected).abs().max() < 1e-6
    assert (out.entropy + expected).abs().max() < 1e-6


def test_gradient_of_a_confident_token_is_finite() -> None:
    hidden, weight = torch.full((1, 8), 30.0, requires_grad=True), torch.eye(8, requires_grad=True)
    out = linear_logprob(hidden * torch.arange(8), weight, torch.tensor([0]))
    (out.logprob + out.entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_errors() -> None:
    logits, targets = torch.randn(2, 300), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        logprob_from_logits(logits, targets, 0.0)
    with pytest.raises(ValueError, match="float32"):
        logprob_from_logits(logits.bfloat16(), targets)
    with pytest.raises(ValueError, match="linear_logprob"):
        logprob_from_logits(logits.requires_grad_(), targets)
    for chunk in (128, 4096):
        with pytest.raises((IndexError, RuntimeError)):
            logprob_from_logits(logits.detach(), torch.tensor([0, 300]), chunk=chunk)


def test_what_the_kernels_read_is_as_long_as_they_think() -> None:
    """One temperature for all rows, narrow ids, a vector shorter than the rows: C and CUDA read on behind the end of these."""
    logits, targets = torch.randn(7, 300), torch.randint(0, 300, (7,))
    want = logprob_from_logits(logits, targets, torch.full((7,), 0.7)).logprob
    for temperature in (torch.tensor(0.7), torch.tensor([0.7])):
        assert torch.equal(logprob_from_logits(logits, targets, temperature).logprob, want)
    assert torch.equal(logprob_from_logits(logits, targets.int(), torch.tensor(0.7)).logprob, want)
    with pytest.raises(ValueError, match=r"a number or \[7\]"):
        logprob_from_logits(logits, targets, torch.ones(3))
    with pytest.raises(ValueError, match="6 targets for 7 rows"):
        logprob_from_logits(logits, targets[:6])
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(300, 16)
    (wide,) = torch.autograd.grad(linear_logprob(hidden, weight, targets).logprob.sum(), hidden)
    (narrow,) = torch.autograd.grad(linear_logprob(hidden, weight, targets.int()).logprob.sum(), hidden)
    assert torch.equal(wide, narrow)
    with pytest.raises(ValueError, match="does not end in the shape of weight"):
        rms_norm(torch.randn(3, 16), torch.randn(32), 1e-6)
    draw = {"seed": 1, "temperature": 0.7}
    ids = torch.arange(7)
    one, other = (sample(logits, sample_id=x, position=x, **draw) for x in (ids, ids.int()))
    assert torch.equal(one.token, other.token) and torch.equal(one.logprob, other.logprob)
