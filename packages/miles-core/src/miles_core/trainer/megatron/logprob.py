"""Log-probability and entropy from hidden states and a vocabulary that tensor-parallel processes share. [N, V] never exists.

Legend: N = predicting rows, h = hidden size, V = vocabulary, v = its rows on this process (padding included), C = chunk.

Two ways, with equal mathematics:
- `vocab_parallel_logprob` (plain layers): every process scans its own rows of the vocabulary, chunk by chunk, with a running
  maximum and sum (Milakov & Gimelshein 2018); three small reductions join them. The backward pass recomputes the chunks.
- `token_parallel_logprob` (aligned layers): the head is gathered, and every process scores its share of the rows by
  `miles_kernels.linear_logprob`, so a token's bits do not depend on the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.trainer.megatron.core import mappings
from miles_kernels.ops.logprob import LogprobOutput, linear_logprob

CHUNK = 8192
LOWEST = torch.finfo(torch.float32).min


def vocab_parallel_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float, vocab_size: int, group: dist.ProcessGroup
) -> LogprobOutput:
    """log p(target) and entropy, both [N] float32, under softmax(hidden [N, h] @ weight^T / temperature).

    `weight` [v, h] is this process' share of the head, `targets` [N] are ids of the whole vocabulary; rows from `vocab_size`
    on are padding and no part of the distribution. Both outputs are differentiable.
    """
    heat = temperature.float() if isinstance(temperature, Tensor) else torch.full(hidden.shape[:1], temperature)
    first = dist.get_rank(group) * weight.shape[0]
    return LogprobOutput(
        *_VocabParallel.apply(hidden, weight, targets, heat.to(hidden.device)[:, None], first, vocab_size, group)
    )


def token_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | float,
    vocab_size: int,
    group: dist.ProcessGroup,
    mode: Any,
) -> LogprobOutput:
    """The same for hidden states that every process of `group` holds; the bits of `linear_logprob` with the whole head."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return linear_logprob(hidden, weight[:vocab_size], targets, temperature, mode=mode)
    head = mappings.gather_from_sequence_parallel_region(weight, group=group)[:vocab_size]
    bounds = [hidden.shape[0] * r // size for r in range(size + 1)]
    mine = slice(bounds[rank], bounds[rank + 1])
    hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=group)  # each process sends back its rows' gradient
    heat = temperature[mine] if isinstance(temperature, Tensor) else temperature
    own = hidden[mine].contiguous()
    if len(own):
        out = linear_logprob(own, head, targets[mine], heat, mode=mode)
    else:  # fewer rows than processes: nothing to score, but this process' part in the others' backward pass remains
        nothing = own.float().sum(1) + 0.0 * head[0, 0].float()
        out = LogprobOutput(nothing, nothing)
    place = torch.arange(mine.start, mine.stop, device=hidden.device)
    joined = spread(torch.stack((out.logprob, out.entropy)), place, hidden.shape[0], group)
    return LogprobOutput(joined[0], joined[1])


def spread(values: Tensor, place: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """[..., m] float32 of this process put at `place` [m] among `total`, every other place filled by the process that has it.

    Keeps every bit. Each process gets back the gradient of its own values only, which is right when all of them compute the
    same function of the result.
    """
    return _Spread.apply(values, place, total, group) if dist.get_world_size(group) > 1 else values


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(place)
        out = values.new_zeros((*values.shape[:-1], total))
        out[..., place] = values
        dist.all_reduce(out.view(torch.int32), group=group)  # integers: zeros leave any float's bits alone
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[..., ctx.saved_tensors[0]], None, None, None


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        heat: Tensor,
        first: int,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        rows = len(targets)
        top = torch.full((rows, 1), LOWEST, device=hidden.device)
        total, weighted, found = torch.zeros((3, rows, 1), device=hidden.device)
        used = _used_rows(weight, first, vocab_size)
        for start in range(0, used, CHUNK):
            z = _scores(hidden, weight[start : min(start + CHUNK, used)], heat)
            new_top = torch.maximum(top, z.amax(1, keepdim=True))
            drop, shifted = top - new_top, z - new_top
            exp = shifted.exp()
            keep = drop.exp()
            weighted = (weighted + total * drop) * keep + (exp * shifted).sum(1, keepdim=True)
            total, top = total * keep + exp.sum(1, keepdim=True), new_top
            found += _target_score(z, targets, first + start)
        if dist.get_world_size(group) > 1:
            highest = top.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            drop = top - highest
            sums = torch.cat(((total * drop.exp()), (weighted + total * drop) * drop.exp(), found), 1)
            dist.all_reduce(sums, group=group)
            (total, weighted, found), top = sums.split(1, 1), highest
        log_total = total.log()
        logprob, entropy = found - top - log_total, log_total - weighted / total
        ctx.save_for_backward(hidden, weight, targets, heat, top + log_total, entropy)
        ctx.first, ctx.vocab_size, ctx.group = first, vocab_size, group
        return logprob.squeeze(1), entropy.squeeze(1)

    @staticmethod
    def backward(ctx: Any, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, heat, normaliser, entropy = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, device=hidden.device)
        d_weight = torch.zeros_like(weight)
        used = _used_rows(weight, ctx.first, ctx.vocab_size)
        for start in range(0, used, CHUNK):
            stop = min(start + CHUNK, used)
            logp = _scores(hidden, weight[start:stop], heat) - normaliser
            dz = logp.exp() * (-g_logprob[:, None] - g_entropy[:, None] * (logp + entropy))
            local = targets - ctx.first - start
            inside = (local >= 0) & (local < stop - start)
            dz.scatter_add_(1, local.clamp(0, stop - start - 1)[:, None], torch.where(inside, g_logprob, 0.0)[:, None])
            dz /= heat
            d_hidden += _product(dz.to(weight.dtype), weight[start:stop])
            d_weight[start:stop] = _product(dz.t().to(weight.dtype), hidden).to(weight.dtype)
        if dist.get_world_size(ctx.group) > 1:
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None, None


def _used_rows(weight: Tensor, first: int, vocab_size: int) -> int:
    """Rows of this share that are no padding."""
    return max(0, min(weight.shape[0], vocab_size - first))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] as float32."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _scores(hidden: Tensor, rows: Tensor, heat: Tensor) -> Tensor:
    return _product(hidden, rows.t()) / heat


def _target_score(z: Tensor, targets: Tensor, first: int) -> Tensor:
    """[N, 1]: the target's score where it lies in this chunk, else 0."""
    local = (targets - first)[:, None]
    inside = (local >= 0) & (local < z.shape[1])
    return torch.where(inside, z.gather(1, local.clamp(0, z.shape[1] - 1)), 0.0)
