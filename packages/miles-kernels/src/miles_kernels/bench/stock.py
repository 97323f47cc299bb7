"""The default the whole-model bench compares with: the same decoder and weights on torch's own ops.

Products are cuBLAS (`F.linear`), attention is `F.scaled_dot_product_attention` (flash, or cuDNN's), and what lies between is
compiled by Inductor: residual with norm, head norms with rotation and the write to the cache, SwiGLU, log-softmax. The first
norm, which has no residual, is torch's fused one.

Legend: B = sequences, L = new tokens of each, T = B * L, S = keys, H, Hkv = query and key/value heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from miles_kernels.nn.decoder import Decoder, DecoderLayer

BACKENDS = {"default": SDPBackend.FLASH_ATTENTION, "default, cuDNN attention": SDPBackend.CUDNN_ATTENTION}


Compiled = dict[Any, Callable[..., Any]]
"""Functions by what they were compiled for."""


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, eps), total


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat((high, low), -1) * sin).to(x.dtype)


def _turn(qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float) -> tuple[Tensor, ...]:
    """qkv[B, L, (H + 2 Hkv) * D] -> normed and rotated q, k, and v, [B, L, heads, D] each."""
    parts = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, -1)
    q, k, v = parts.split((heads, kv_heads, kv_heads), 2)
    q, k = (F.rms_norm(x, x.shape[-1:], w, eps) for x, w in zip((q, k), weight.unbind(), strict=True))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _turn_and_store(
    qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float,
    k_cache: Tensor, v_cache: Tensor, at: Tensor,
) -> Tensor:  # fmt: skip
    """The same, keys and values written to the caches [B, S, Hkv, D] at positions `at[L]`; returns q."""
    q, k, v = _turn(qkv, weight, cos, sin, heads, kv_heads, eps)
    k_cache[:, at] = k
    v_cache[:, at] = v
    return q


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _logprob(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


class Stock:
    """A decoder's weights on stock ops, for sequences of equal length.

    Example: Stock(decoder).logits(token_ids[B, L], positions[L], cache)
    """

    def __init__(self, decoder: Decoder, attention: str = "default", compiled: Compiled | None = None) -> None:
        """`compiled` holds functions made so far, to be shared; None runs everything eagerly. Dense Qwen3 only."""
        assert decoder.config.qk_norm and not decoder.config.attention_bias and not decoder.config.num_experts
        self.decoder, self.backend, self._ready = decoder, BACKENDS[attention], compiled

    def _call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn` compiled for exactly these shapes."""
        if self._ready is None:
            return fn(*args)
        key = (fn, torch.is_grad_enabled(), *(x.shape for x in args if isinstance(x, Tensor)))
        if key not in self._ready:
            self._ready[key] = torch.compile(_copy_of(fn), dynamic=False, fullgraph=True)
        return self._ready[key](*args)

    def hidden(self, token_ids: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """token_ids[B, L] at positions[L] -> [B * L, hidden]; with a cache [B, S, Hkv, D] per layer keys are read from it."""
        eps = self.decoder.config.rms_norm_eps
        batch, length = token_ids.shape
        x: Tensor = F.embedding(token_ids.view(-1), self.decoder.embed_tokens)
        cos, sin = (table[positions] for table in self.decoder.rope_tables(0))
        delta: Tensor | None = None
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            if delta is None:
                h = _norm(x, layer.input_norm, eps)
            else:
                h, x = self._call(_add_norm, delta, x, layer.input_norm, eps)
            qkv = F.linear(h, layer.qkv_proj).view(batch, length, -1)
            out = self._attend(layer, qkv, cos, sin, None if cache is None else (*cache[index], positions))
            h, x = self._call(_add_norm, F.linear(out, layer.o_proj), x, layer.post_norm, eps)
            delta = F.linear(self._call(_swiglu, F.linear(h, layer.gate_up_proj)), layer.down_proj)
        out, _ = self._call(_add_norm, delta, x, self.decoder.norm, eps)
        return out

    def _attend(
        self, layer: DecoderLayer, qkv: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        config = layer.config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert layer.qk_norm is not None
        sizes = (layer.qk_norm.view(2, -1), cos, sin, heads, kv_heads, config.rms_norm_eps)
        if cache is None:
            q, k, v = self._call(_turn, qkv, *sizes)
        else:
            q, (k, v, _) = self._call(_turn_and_store, qkv, *sizes, *cache), cache
        batch, length = q.shape[:2]
        decode = length == 1
        if decode:  # the heads of a group as query rows: keys are then read once, not once per head
            q = q.view(batch, kv_heads, heads // kv_heads, dim)
        else:
            q = q.transpose(1, 2)
        with sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(
                q, k.transpose(1, 2), v.transpose(1, 2), is_causal=not decode, scale=layer.scale, enable_gqa=not decode
            )
        return out.reshape(batch, -1) if decode else out.transpose(1, 2).reshape(batch * length, -1)

    def logits(self, token_ids: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Scores [B, V] in bfloat16 of the token after the last."""
        batch, length = token_ids.shape
        hidden = self.hidden(token_ids, positions, cache).view(batch, length, -1)[:, -1]
        return F.linear(hidden, self.decoder.head)

    def logprob(self, token_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """log p of targets[T] through stored logits, for training."""
        return self._call(_logprob, F.linear(self.hidden(token_ids, positions), self.decoder.head), targets)


def _copy_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own for the compiler, so that one shape's guards never recompile another's code."""

    def copied(*args: Any) -> Any:
        return fn(*args)

    copied.__code__ = copied.__code__.replace(co_name=fn.__name__)
    return copied
