"""Attention of an unrolled draft: what recycling sees while decoding, computed for all tokens of a packed stream at once.

Legend: R = slots of the stream, H = query heads, Hkv = key/value heads, D = head size, S = sequences, L = longest of them.

At depth k a slot i sees the depth-1 keys of its sequence up to i, and of the depths 2 .. k the key of slot i alone: a branch
never sees the drafts of another ("training-time test" of EAGLE-3, 2503.01840). Distinct layers see the keys of
their own depth up to i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Keys and values, each [R, Hkv, D]."""
_MOST_SCORES = 1 << 24
"""Scores [S, H, L, L] of sequences that are computed together."""


@dataclass(frozen=True, eq=False)
class UnrollPlan:
    """Which slots of a stream are a sequence. Slots that pad a sequence form one of their own, which nobody reads.

    Example: plan = UnrollPlan.of([5, 3, 4], device="cuda")
    """

    lengths: tuple[int, ...]
    """[S] slots of each sequence, one after the other; together all R."""
    positions: Tensor
    """[R] int64: place in the own sequence, 0 for the first token."""
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, lengths: Sequence[int], *, padded_lengths: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> UnrollPlan:
        """For the stream that `draft_targets` was given the same lengths for."""
        parts: list[int] = []
        for length, slots in zip(lengths, lengths if padded_lengths is None else padded_lengths, strict=True):
            if not 0 <= length <= slots:
                raise ValueError(f"length {length} must lie in 0..{slots}, the slots of its sequence")
            parts += [part for part in (length, slots - length) if part]
        if not parts:
            raise ValueError("the stream is empty: there is nothing to unroll")
        return cls(tuple(parts), torch.cat([torch.arange(part) for part in parts]).to(device))

    def on_cuda(self) -> Any:
        """The same for the CUDA kernels."""
        if "cuda" not in self.cache:
            from miles_kernels.cuda.attention import KVBatch

            self.cache["cuda"] = KVBatch.packed(list(self.lengths), self.positions.device)
        return self.cache["cuda"]


def unrolled_attention(
    q: Tensor, trunk: Pair, branches: Sequence[Pair], plan: UnrollPlan, *, scale: float, window: int | None = None
) -> Tensor:
    """Attention [R, H, D] of q[R, H, D] at depth 1 + len(branches); every input may require a gradient.

    `trunk` are the keys and values of depth 1, `branches` those of depths 2, 3 ... up to this one. `window` counts keys back from
    this depth's own. Raises ValueError for shapes that do not fit the plan.
    """
    if q.shape[0] != plan.positions.numel() or trunk[0].shape[0] != q.shape[0] or q.shape[1] % trunk[0].shape[1]:
        raise ValueError(f"q {list(q.shape)} and keys {list(trunk[0].shape)} do not fit a plan of {plan.positions.numel()} slots")
    keep = len(branches)
    trunk_window: int | None
    if window is not None and keep >= window:
        branches, trunk_window = branches[-window:], 0
    else:
        trunk_window = None if window is None else window - keep
    if q.is_cuda:
        if trunk_window is not None and keep:
            raise ValueError("an unrolled sliding window has no CUDA kernel; train this draft on full attention or on the CPU")
        return _on_cuda(q, trunk, branches, plan, scale, trunk_window)
    return _dense(q, trunk, branches, plan, scale, trunk_window)


def _dense(q: Tensor, trunk: Pair, branches: Sequence[Pair], plan: UnrollPlan, scale: float, window: int | None) -> Tensor:
    """Scores over padded sequences of like length, differentiable as it stands."""
    kv_heads = trunk[0].shape[1]
    group = q.shape[1] // kv_heads
    wide = q.dtype if q.dtype is torch.float64 else torch.float32
    outs, order = [], []
    for starts, length in _buckets(plan, q.shape[1]):
        index = torch.tensor(starts)[:, None] + torch.arange(length)  # [S, L]
        flat = index.reshape(-1)

        def part(x: Tensor, flat: Tensor = flat, shape: tuple[int, ...] = index.shape) -> Tensor:
            return x.index_select(0, flat).to(wide).view(*shape, *x.shape[1:])

        queries = part(q).view(*index.shape, kv_heads, group, -1) * scale
        scores = torch.einsum("slkgd,stkd->skglt", queries, part(trunk[0]))
        place = torch.arange(length)
        hidden = place > place[:, None]
        if window is not None:
            hidden = hidden | (place <= place[:, None] - window)
        scores = scores.masked_fill(hidden, -math.inf)
        own = [torch.einsum("slkgd,slkd->skgl", queries, part(k)) for k, _ in branches]
        weights = torch.softmax(torch.cat([scores, *(x.unsqueeze(-1) for x in own)], -1), -1)
        out = torch.einsum("skglt,stkd->slkgd", weights[..., :length], part(trunk[1]))
        for number, (_, v) in enumerate(branches):
            weight = weights[..., length + number].permute(0, 3, 1, 2).unsqueeze(-1)
            out = out + weight * part(v).unsqueeze(3)
        outs.append(out.reshape(flat.numel(), *q.shape[1:]))
        order.append(flat)
    place = torch.empty(q.shape[0], dtype=torch.int64)
    place[torch.cat(order)] = torch.arange(q.shape[0])
    return torch.cat(outs).index_select(0, place).to(q.dtype)


def _buckets(plan: UnrollPlan, heads: int) -> list[tuple[list[int], int]]:
    """(first slots, length) of sequences of one length, few enough at a time."""
    by_length: dict[int, list[int]] = {}
    start = 0
    for length in plan.lengths:
        by_length.setdefault(length, []).append(start)
        start += length
    out = []
    for length, starts in sorted(by_length.items()):
        most = max(1, _MOST_SCORES // (heads * length * length))
        out += [(starts[i : i + most], length) for i in range(0, len(starts), most)]
    return out


def _on_cuda(q: Tensor, trunk: Pair, branches: Sequence[Pair], plan: UnrollPlan, scale: float, window: int | None) -> Tensor:
    return _Branched.apply(plan.on_cuda(), scale, window, q, *trunk, *(x for pair in branches for x in pair))


class _Branched(torch.autograd.Function):
    """Attention over the trunk by the packed kernel, joined with the few keys of the branches by their log-sum-exp.

    The kernel's gradient needs of the whole sum only its output and its log-sum-exp, so it is given those of the joined one.
    """

    @staticmethod
    def forward(
        ctx: Any, batch: Any, scale: float, window: int | None, q: Tensor, k: Tensor, v: Tensor, *branches: Tensor
    ) -> Tensor:
        from miles_kernels.cuda.attention_op import run

        out, lse = run(q, k, v, batch, scale, window)
        if branches:
            scores = _own_scores(q, branches[::2], scale)  # [R, H, B]
            whole = torch.logsumexp(torch.cat(((lse * math.log(2)).unsqueeze(-1), scores), -1), -1)
            out = out.float() * torch.exp(lse * math.log(2) - whole).unsqueeze(-1)
            for number, value in enumerate(branches[1::2]):
                weight = torch.exp(scores[..., number] - whole)
                out = out + weight.unsqueeze(-1) * _to_heads(value, q.shape[1])
            out, lse = out.to(q.dtype), whole / math.log(2)
        ctx.save_for_backward(q, k, v, out, lse, *branches)
        ctx.batch, ctx.scale, ctx.window = batch, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from miles_kernels.cuda import attention as base

        q, k, v, out, lse, *branches = ctx.saved_tensors
        dq, dk, dv = base.backward(q, k, v, out, lse.contiguous(), grad, ctx.batch, scale=ctx.scale, window=ctx.window)
        if not branches:
            return None, None, None, dq, dk, dv
        heads, kv_heads = q.shape[1], k.shape[1]
        wide = grad.float()
        delta = (wide * out.float()).sum(-1)
        scores, total = _own_scores(q, branches[::2], ctx.scale), dq.float()
        grads: list[Tensor] = []
        for number, (key, value) in enumerate(zip(branches[::2], branches[1::2], strict=True)):
            weight = torch.exp(scores[..., number] - lse * math.log(2))
            d_score = weight * ((wide * _to_heads(value, heads)).sum(-1) - delta) * ctx.scale
            total = total + d_score.unsqueeze(-1) * _to_heads(key, heads)
            for part in (d_score.unsqueeze(-1) * q.float(), weight.unsqueeze(-1) * wide):
                grads.append(part.view(len(q), kv_heads, heads // kv_heads, -1).sum(2).to(q.dtype))
        return None, None, None, total.to(q.dtype), dk, dv, *grads


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """[R, Hkv, D] -> fp32 [R, H, D]."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _own_scores(q: Tensor, keys: Sequence[Tensor], scale: float) -> Tensor:
    """[R, H, B] of every query with the keys of its own slot."""
    return torch.stack([(q.float() * _to_heads(key, q.shape[1])).sum(-1) * scale for key in keys], -1)
