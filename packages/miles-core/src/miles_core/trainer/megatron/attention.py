"""Self-attention over packed streams for megatron-core's layers, whose own local attention knows neither packing nor CP.

Legend: t = tokens of this process, T = of the whole stream, H, Hkv = heads of this process before the exchange, D = head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles_core.trainer.megatron.core import SelfAttention, mappings
from miles_core.trainer.megatron.stream import Stream
from miles_kernels.ops.attention import attention
from miles_kernels.ops.rope import apply_rope, paired_order


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention with rotary angles by absolute position and a core that takes a `Stream`."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """hidden_states [t, 1, hidden] -> (output [t, 1, hidden], bias or None)."""
        stream: Stream = kwargs["packed_seq_params"]
        aligned = self.config.miles.aligned
        assert stream.cos is not None and stream.sin is not None
        if aligned and fused_op(hidden_states) is not None:
            out = self._fused(hidden_states, stream)
        else:
            q, k, v = (x.squeeze(1) for x in self.get_query_key_value_tensors(hidden_states, None))
            q, k = self._paired(q, k, normed=aligned)
            rotate, cos, sin = apply_rope if aligned else _plain_rope, stream.cos[stream.own], stream.sin[stream.own]
            q, k = rotate(q.contiguous(), cos, sin), rotate(k.contiguous(), cos, sin)
            out = self.core_attention(q, k, v, None, attn_mask_type=None, attention_bias=None, packed_seq_params=stream)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

    def _fused(self, hidden_states: Tensor, stream: Stream) -> Tensor:
        """[t, H, D] by the decoder's own op on CUDA, which norms, rotates and attends at once: head norms in two kernels would
        sum in another order."""
        model, core = self.config.miles.model, self.core_attention
        share = core.cp_group.size()
        mixed = self.linear_qkv(hidden_states)[0].squeeze(1)
        grouped = mixed.view(mixed.shape[0], self.num_query_groups_per_partition, -1, model.head_dim)
        q = grouped[:, :, :-2].reshape(mixed.shape[0], -1, model.head_dim)
        q, k, v = (core.trade(x, share) for x in (q, grouped[:, :, -2], grouped[:, :, -1]))
        q, k = self._paired(q, k, normed=False)
        norms = (
            torch.stack(self._paired(self.q_layernorm.weight, self.k_layernorm.weight, normed=False)) if model.qk_norm else None
        )
        sizes = (q.shape[1], k.shape[1], core.scale, core.window, model.rms_norm_eps)
        qkv = torch.cat((q, k, v), 1).flatten(1)
        out = fused_op(qkv)(qkv, norms, stream.cos, stream.sin, stream.plan, sizes)
        return core.trade_back(out, share)

    def _paired(self, q: Tensor, k: Tensor, *, normed: bool) -> tuple[Tensor, Tensor]:
        """Elements of heads in the order that the rotation pairs; `AlignedHeadNorm` leaves them so (`normed`)."""
        model = self.config.miles.model
        if model.rotary_dim == model.head_dim or (normed and model.qk_norm):
            return q, k
        order = paired_order(model.head_dim, model.rotary_dim).to(q.device)
        return q.index_select(-1, order), k.index_select(-1, order)


def fused_op(x: Tensor) -> Any:
    """What `Decoder` calls from the q, k, v product to the output of attention where it has such an op, else None."""
    if not x.is_cuda:
        return None
    from miles_kernels.cuda.qkv import Heads, attention_of

    return lambda qkv, norms, cos, sin, plan, sizes: attention_of(qkv, norms, cos, sin, plan, Heads(*sizes))


class PackedAttention(nn.Module):
    """Causal attention within each sequence of a stream: `miles_kernels` when aligned, torch's SDPA otherwise."""

    def __init__(self, config: Any, layer_number: int, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.cp_group = pg_collection.cp
        self.scale = config.kv_channels**-0.5
        self.window = config.miles.model.window(layer_number - 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, packed_seq_params: Stream, **kwargs: Any) -> Tensor:
        """q [t, H, D], k and v [t, Hkv, D] -> [t, H, D]."""
        share = self.cp_group.size()
        q, k, v = (self.trade(x, share) for x in (q, k, v))
        if self.config.miles.aligned:
            pools = k.transpose(0, 1), v.transpose(0, 1)
            mode = self.config.miles.contract.matmul
            out = attention(q, *pools, packed_seq_params.plan, scale=self.scale, window=self.window, mode=mode)
        else:
            out = torch.cat(
                [self._sdpa(*parts) for parts in zip(*(x.split(packed_seq_params.lengths) for x in (q, k, v)), strict=True)]
            )
        return self.trade_back(out, share)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence: q [L, H, D] -> [L, H, D]."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = None
        if self.window is not None and q.shape[2] > self.window:
            age = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(q.shape[2], device=q.device)
            mask = (age >= 0) & (age < self.window)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def trade(self, x: Tensor, share: int) -> Tensor:
        """Give away tokens of other processes' heads, get all tokens of own heads: [t, heads, D] -> [T, heads / C, D]."""
        if share == 1:
            return x.contiguous()
        tokens, heads, dim = x.shape
        out = x.reshape(tokens, share, heads // share, dim).transpose(0, 1).reshape(share * tokens, heads // share, dim)
        return mappings.all_to_all(self.cp_group, out)

    def trade_back(self, x: Tensor, share: int) -> Tensor:
        """The inverse of `trade`: [T, heads / C, D] -> [t, heads, D]."""
        if share == 1:
            return x
        tokens, heads, dim = x.shape[0] // share, x.shape[1], x.shape[2]
        out = mappings.all_to_all(self.cp_group, x.contiguous()).view(share, tokens, heads, dim)
        return out.transpose(0, 1).reshape(tokens, share * heads, dim)


def _plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of x [t, heads, D] in float32; differentiable torch, the `sin` table carries the sign."""
    wide = x.float()
    return (wide * cos + torch.roll(wide, x.shape[-1] // 2, -1) * sin).to(x.dtype)
