"""Log-probability and entropy of target tokens, over the vocabulary in ascending chunks.

`logprob_from_logits` (engine) and `linear_logprob` (trainer) run the same arithmetic on the same chunks, so their bits
are equal. A chunk's row sum is short enough not to be split over threads; the running log-sum-exp is the online one of
Milakov & Gimelshein 2018. The distribution is softmax(logits / temperature), unfiltered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_kernels.native import kernels_for
from miles_kernels.ops.chain import add_product, main_of
from miles_kernels.ops.matmul import Mode, mm, mm_dgrad, mm_wgrad

VOCAB_CHUNK = 4096
LOWEST = torch.finfo(torch.float32).min
NEGLIGIBLE = -200.0
"""exp() of this is 0 in float32: the floor keeps 0 * -inf out of the entropy of masked logits."""


class LogprobOutput(NamedTuple):
    """logprob[N] and entropy[N] (None when not asked for), float32, in nats."""

    logprob: Tensor
    entropy: Tensor | None


class LogprobState(NamedTuple):
    """Running (maximum, sum of exp, sum of exp times shifted logit, target logit), each [N, 1]."""

    top: Tensor
    total: Tensor
    weighted: Tensor | None
    target: Tensor
    packed: Tensor | None = None
    """[N, 4] of all four, when the C kernels keep it"""


def logprob_from_logits(
    logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0, *, chunk: int = VOCAB_CHUNK, entropy: bool = True
) -> LogprobOutput:
    """Log-probability of `targets[N]` under softmax(`logits[N, V]` / temperature), and the entropy. No gradient.

    `logits` float32; `temperature` a positive number or float32 [N]. Same bits as `linear_logprob` on those logits.
    """
    if logits.is_cuda:
        from miles_kernels.cuda.logprob import logprob_from_logits as on_cuda

        return LogprobOutput(*on_cuda(logits, targets, temperature, entropy=entropy))
    if logits.dtype is not torch.float32:
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError("logprob_from_logits has no backward; train through linear_logprob or detach the logits")
    divisor = divisor_of(temperature, logits.shape[0])
    vocab = logits.shape[1]
    chunks = ((start, logits[:, start : start + chunk]) for start in range(0, vocab, chunk))
    return finish(accumulate(chunks, targets, divisor, vocab, chunk, entropy))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    bias: Tensor | None = None,
    *,
    chunk: int = VOCAB_CHUNK,
    entropy: bool = True,
    mode: Mode | None = None,
) -> LogprobOutput:
    """`logprob_from_logits(hidden[N, H] @ weight[V, H]^T + bias[V], targets, temperature)` without holding [N, V].

    Backward (for hidden, weight and bias; from both outputs) recomputes one chunk of logits at a time in float32.
    """
    if hidden.is_cuda:
        from miles_kernels.cuda.logprob import linear_logprob as on_cuda

        return LogprobOutput(*on_cuda(hidden, weight, targets, temperature, bias, entropy=entropy))
    divisor, targets = divisor_of(temperature, hidden.shape[0]), targets.to(torch.int64)
    needs = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs:
        logprob, ent = _LinearLogprob.apply(hidden, weight, bias, targets, divisor, chunk, entropy, mode)
        return LogprobOutput(logprob, ent)
    chunks = _chunks(hidden, weight, bias, chunk, mode)
    return finish(accumulate(chunks, targets, divisor, weight.shape[0], chunk, entropy))


def divisor_of(temperature: Tensor | float, rows: int) -> Tensor | None:
    """The temperature as [N, 1] so that a number and a tensor divide alike; None where dividing would change nothing."""
    if isinstance(temperature, Tensor):
        if temperature.numel() not in (1, rows):
            raise ValueError(f"temperature must be a number or [{rows}], got {list(temperature.shape)}")
        return temperature.to(torch.float32).reshape(-1, 1).expand(rows, 1)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy rows are scored at temperature 1")
    return None if temperature == 1.0 else torch.full((rows, 1), temperature)


def scaled(logits: Tensor, divisor: Tensor | None) -> Tensor:
    """Logits [N, C] fp32 over `divisor_of` the temperature."""
    return logits if divisor is None else logits / divisor


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, mode: Mode | None) -> Iterator[tuple[int, Tensor]]:
    """(first column, logits fp32) of each chunk, not yet divided by the temperature."""
    vocab = weight.shape[0]
    hidden = hidden.float()
    for start in range(0, vocab, chunk):
        stop = min(start + chunk, vocab)
        logits = mm(hidden, weight[start:stop], mode)
        if bias is not None:
            logits += bias[start:stop]
        yield start, logits


def accumulate(
    chunks: Iterator[tuple[int, Tensor]], targets: Tensor, divisor: Tensor | None, vocab: int, chunk: int, entropy: bool
) -> LogprobState:
    """Statistics of the rows over chunks (first column, logits [N, C] fp32) that come in ascending order, C <= `chunk`.

    `targets` int64 [N]; `divisor` as from `divisor_of`. Raises IndexError for a target outside the vocabulary,
    ValueError for another number of targets than rows.
    """
    targets = targets.to(torch.int64).reshape(-1, 1)  # the C kernels read 8 bytes for each
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise IndexError(f"targets must lie in [0, {vocab}), got {int(targets.min())} to {int(targets.max())}")
    if vocab == 0:
        raise ValueError("the vocabulary is empty")
    state: LogprobState | None = None
    running: Tensor | None = None
    for start, logits in chunks:
        if len(targets) != len(logits):
            raise ValueError(f"{len(targets)} targets for {len(logits)} rows")
        kernels = kernels_for(logits)
        if kernels is not None:
            running = logits.new_zeros(len(logits), 4) if running is None else running
            kernels.lse(logits, start, divisor, targets.contiguous(), running, entropy)
        else:
            state = _step(state, start, scaled(logits, divisor), targets, entropy, only=vocab <= chunk)
    if running is not None:
        top, total, weighted, target = running.split(1, 1)
        return LogprobState(top, total, weighted if entropy else None, target, running)
    assert state is not None
    return state


def _step(state: LogprobState | None, start: int, z: Tensor, targets: Tensor, entropy: bool, only: bool) -> LogprobState:
    top = z.amax(-1, keepdim=True).clamp_(min=LOWEST)
    if state is None:
        new_top, target = top, z.gather(1, targets if only else targets.clamp(max=z.shape[1] - 1))
    else:
        new_top = torch.maximum(state.top, top)
        local = targets - start
        inside = (local >= 0) & (local < z.shape[1])
        target = torch.where(inside, z.gather(1, local.clamp_(0, z.shape[1] - 1)), state.target)
    shifted = z - new_top
    exp = torch.exp(shifted)
    total = exp.sum(-1, keepdim=True)
    weighted = exp.mul_(shifted.clamp_(min=NEGLIGIBLE)).sum(-1, keepdim=True) if entropy else None
    if state is not None:
        drop = state.top - new_top
        rescale = torch.exp(drop)
        if weighted is not None and state.weighted is not None:
            weighted += (state.weighted + state.total * drop) * rescale
        total += state.total * rescale
    return LogprobState(new_top, total, weighted, target)


def finish(state: LogprobState) -> LogprobOutput:
    """Log-probability and entropy [N] fp32 from the statistics of all chunks."""
    kernels = None if state.packed is None else kernels_for(state.packed)
    if kernels is not None and state.packed is not None:
        return LogprobOutput(*kernels.lse_finish(state.packed, state.weighted is not None))
    log_total = torch.log(state.total)
    logprob = (state.target - state.top) - log_total
    if state.weighted is None:
        return LogprobOutput(logprob.squeeze(1), None)
    return LogprobOutput(logprob.squeeze(1), (log_total - state.weighted / state.total).squeeze(1))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Tensor | None,
        chunk: int,
        entropy: bool,
        mode: Mode | None,
    ) -> tuple[Tensor, Tensor | None]:
        chunks = _chunks(hidden, weight, bias, chunk, mode)
        state = accumulate(chunks, targets, divisor, weight.shape[0], chunk, entropy)
        out = finish(state)
        normaliser = torch.log(state.total) + state.top
        ctx.save_for_backward(hidden, weight, bias, targets, divisor, normaliser, out.entropy)
        ctx.chunk, ctx.mode = chunk, mode
        ctx.set_materialize_grads(False)
        return out.logprob, out.entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None and grads[1] is None:
            return (None,) * 8
        hidden, weight, bias, targets, divisor, normaliser, entropy = ctx.saved_tensors
        g_logprob, g_entropy = (None if g is None else g.float().view(-1, 1) for g in grads)
        wide = hidden.float()
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(wide) if need_hidden else None
        main = main_of(weight)
        d_weight = torch.empty_like(weight) if need_weight and main is None else None
        d_bias = torch.empty_like(bias) if need_bias else None
        for start, logits in _chunks(wide, weight, bias, ctx.chunk, ctx.mode):
            stop = start + logits.shape[1]
            dz = logit_gradient(scaled(logits, divisor) - normaliser, start, targets.view(-1, 1), g_logprob, g_entropy, entropy)
            if divisor is not None:
                dz /= divisor
            if main is not None:
                add_product(main[start:stop], dz, wide)
            if d_hidden is not None and main is not None:
                d_hidden += mm(dz, weight[start:stop].float().t().contiguous(), ctx.mode)
            elif d_hidden is not None:
                d_hidden += mm_dgrad(dz, weight[start:stop])
            if d_weight is not None:
                d_weight[start:stop] = mm_wgrad(dz, wide)
            if d_bias is not None:
                d_bias[start:stop] = dz.sum(0)
        return (None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, *(None,) * 5)


def logit_gradient(
    logp: Tensor, start: int, targets: Tensor, g_logprob: Tensor | None, g_entropy: Tensor | None, entropy: Tensor | None
) -> Tensor:
    """d loss / d scaled logits of one chunk: `g_lp (1[target] - p) - g_H p (log p + H)`."""
    p = torch.exp(logp)
    if g_entropy is None or entropy is None:
        dz = p if g_logprob is None else p.mul_(-g_logprob)
    else:
        slope = logp.clamp_(min=NEGLIGIBLE).add_(entropy.view(-1, 1)).mul_(g_entropy)
        dz = p.mul_(slope if g_logprob is None else slope.add_(g_logprob)).neg_()
    if g_logprob is None:
        return dz
    local = targets - start
    inside = (local >= 0) & (local < logp.shape[1])
    return dz.scatter_add_(1, local.clamp_(0, logp.shape[1] - 1), torch.where(inside, g_logprob, 0.0))
