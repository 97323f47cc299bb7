"""The implementations under test, behind one set of names: the CPU reference, the CUDA kernels, and stock torch as control.

Legend: T = packed tokens, B = sequences, N = pool slots, H, Hkv = query and key/value heads, D, DV = head sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One forward over B sequences: sequence b advances by q_lens[b] tokens to kv_lens[b] keys.

    `table` int64 [B, pages] holds the pages of each sequence on the CPU; None means packed training: the pool is the stream
    of this step's own keys, and q_lens equals kv_lens.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    table: Tensor | None = None
    page_size: int = 0

    def slots(self) -> Tensor:
        """Slots of the new tokens, int64 [T]."""
        if self.table is None:
            return torch.arange(sum(self.q_lens))
        rows = []
        for b, (count, total) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            position = torch.arange(total - count, total)
            rows.append(self.table[b, position // self.page_size] * self.page_size + position % self.page_size)
        return torch.cat(rows)

    def slot_table(self) -> Tensor:
        """Slots of all positions [B, most keys], pages resolved."""
        assert self.table is not None
        slots = self.table[:, :, None] * self.page_size + torch.arange(self.page_size)
        return slots.view(len(self.q_lens), -1)[:, : max(self.kv_lens)]

    def positions(self) -> Tensor:
        """Absolute positions of the new tokens, int64 [T]."""
        return torch.cat([torch.arange(total - count, total) for count, total in zip(self.q_lens, self.kv_lens, strict=True)])


class Backend(Protocol):
    """The ops of a decoder. All tensors live on `device`."""

    name: str
    device: str

    def linear(self, x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...
    def swiglu(self, gate_up: Tensor) -> Tensor: ...
    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor: ...
    def route(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]: ...
    def moe(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor: ...
    def logprob(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]: ...
    def logits_logprob(self, logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor: ...
    def sample(self, logits: Tensor, sample_id: Tensor, position: Tensor) -> tuple[Tensor, Tensor]: ...
    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, window: int | None) -> Tensor: ...


class Reference:
    """`miles_kernels.ops` on the CPU."""

    name, device = "reference", "cpu"

    def linear(self, x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        from miles_kernels.ops.linear import linear

        return linear(x, weight, out_dtype=out_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from miles_kernels.ops.norm import rms_norm

        return rms_norm(x, weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from miles_kernels.ops.rope import apply_rope

        return apply_rope(x, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        from miles_kernels.ops.act import swiglu

        return swiglu(gate_up)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        from miles_kernels.ops.embedding import embedding

        return embedding(ids, weight)

    def route(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        from miles_kernels.ops.router import route

        return tuple(route(logits, top_k))  # type: ignore[return-value]

    def moe(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        from miles_kernels.ops.moe import moe_mlp

        return moe_mlp(x, gate_up, down, ids, weights)

    def logprob(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        from miles_kernels.ops.logprob import linear_logprob

        out = linear_logprob(hidden, weight, targets, temperature)
        assert out.entropy is not None
        return out.logprob, out.entropy

    def logits_logprob(self, logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        from miles_kernels.ops.logprob import logprob_from_logits

        return logprob_from_logits(logits, targets, temperature).logprob

    def sample(self, logits: Tensor, sample_id: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        from miles_kernels.ops.sample import sample

        out = sample(logits, seed=11, sample_id=sample_id, position=position, temperature=0.9)
        return out.token, out.logprob

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, window: int | None) -> Tensor:
        from miles_kernels.ops.attention import attention, packed_plan, table_plan

        if step.table is None:
            plan, _ = packed_plan(list(step.q_lens))
        else:
            firsts = [total - count for count, total in zip(step.q_lens, step.kv_lens, strict=True)]
            plan = table_plan(step.slot_table(), list(step.q_lens), firsts)
        width = v.shape[2]
        if width < k.shape[2]:  # the reference knows one head size
            v = F.pad(v, (0, k.shape[2] - width))
        out = attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=scale, window=window)
        return out[..., :width]


class Cuda:
    """`miles_kernels.cuda`."""

    name, device = "cuda", "cuda"

    def linear(self, x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        from miles_kernels.cuda.linear import linear

        return linear(x, weight, out_dtype=out_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from miles_kernels.cuda.norm import rms_norm

        return rms_norm(x, weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from miles_kernels.cuda.rope import apply_rope

        return apply_rope(x, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        from miles_kernels.cuda.act import swiglu

        return swiglu(gate_up)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        from miles_kernels.cuda.embedding import embedding

        return embedding(ids, weight)

    def route(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.router import route

        return tuple(route(logits, top_k))  # type: ignore[return-value]

    def moe(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        from miles_kernels.cuda.moe import moe_mlp

        return moe_mlp(x, gate_up, down, ids, weights)

    def logprob(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.logprob import linear_logprob

        out = linear_logprob(hidden, weight, targets, temperature)
        assert out.entropy is not None
        return out.logprob, out.entropy

    def logits_logprob(self, logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        from miles_kernels.cuda.logprob import logprob_from_logits

        return logprob_from_logits(logits, targets, temperature).logprob

    def sample(self, logits: Tensor, sample_id: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.sample import draw

        out = draw(logits, seed=11, sample_id=sample_id, position=position, temperature=0.9)
        return out.token, out.logprob

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, window: int | None) -> Tensor:
        from miles_kernels.cuda.attention import KVBatch
        from miles_kernels.cuda.attention_op import attention

        if step.table is None:
            batch = KVBatch.packed(list(step.q_lens), self.device)
        else:
            table = step.table.to(self.device, torch.int32)
            batch = KVBatch.paged(list(step.q_lens), list(step.kv_lens), table, step.page_size)
        return attention(q, k, v, batch, scale=scale, window=window)


class Stock:
    """Plain torch: what a user has without this package. The negative control."""

    def __init__(self, device: str) -> None:
        self.name, self.device = "stock torch", device

    def linear(self, x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x, weight) if out_dtype in (None, x.dtype) else F.linear(x, weight).to(out_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (
            F.rms_norm(x, weight.shape[-1:], weight, eps) if weight.ndim == 1 else F.rms_norm(x, x.shape[-1:], eps=eps) * weight
        )

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (x * cos + torch.roll(x, x.shape[-1] // 2, -1) * sin).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def route(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(top_k)
        return ids, weights / weights.sum(-1, keepdim=True)

    def moe(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(gate_up.shape[0]):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            if token.numel():
                y = F.linear(self.swiglu(F.linear(x[token], gate_up[expert])), down[expert])
                out.index_add_(0, token, (y * weights[token, slot, None]).to(x.dtype))
        return out

    def logprob(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        logp = (F.linear(hidden, weight).float() / temperature[:, None]).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def logits_logprob(self, logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        return (logits / temperature[:, None]).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def sample(self, logits: Tensor, sample_id: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        logp = (logits.float() / 0.9).log_softmax(-1)
        noise = torch.empty_like(logp).exponential_()  # of a generator: who asked before counts, id and position do not
        token = (logp - noise.log()).argmax(-1, keepdim=True)
        return token[:, 0], logp.gather(1, token)[:, 0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, window: int | None) -> Tensor:
        outs = []
        start = 0
        table = step.slot_table().to(q.device) if step.table is not None else None
        for b, (count, total) in enumerate(zip(step.q_lens, step.kv_lens, strict=True)):
            slots = torch.arange(start, start + total, device=q.device) if table is None else table[b, :total]
            query = q[start : start + count].transpose(0, 1)[None]
            key, value = (pool[slots].transpose(0, 1)[None] for pool in (k, v))
            mask = torch.arange(total, device=q.device) <= torch.arange(total - count, total, device=q.device)[:, None]
            causal = count == total
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=None if causal else mask, is_causal=causal, scale=scale, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
            start += count
        return torch.cat(outs)


def backend(device: str) -> Backend:
    """The implementation this package offers on `device`. Raises ValueError saying what is missing, and what to do."""
    if device == "cpu":
        return Reference()
    if device != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    from miles_kernels.cuda import ready

    found = ready.problem(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if found is not None:
        raise ValueError(f"device cuda: {found} (--device cpu)")
    return Cuda()


Fn = Callable[..., "Tensor | tuple[Tensor, ...]"]
