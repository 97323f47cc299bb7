"""Head norms and rotation on CUDA as an op of their own, with the kernel that the fused attention of a block uses.

Legend: T = tokens, H, Hkv = query and key/value heads, D = head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def turn_heads(qkv: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float) -> Tensor:
    """Normed and rotated queries and keys [T, H + Hkv, D] of qkv [T, (H + 2 Hkv) * D]; `norm` [2, D] or None. Differentiable."""
    from miles_kernels.cuda.qkv import Heads

    return _Turn.apply(qkv, norm, cos, sin, Heads(heads, kv_heads, 1.0, None, eps))


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, sizes: Any) -> Tensor:
        from miles_kernels.cuda import qkv as fused

        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv, norm, cos, sin)
        ctx.sizes = sizes
        return fused.turn(qkv, norm, cos, sin, sizes, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from miles_kernels.cuda import qkv as fused

        qkv, norm, cos, sin = ctx.saved_tensors
        d_qkv = torch.zeros_like(qkv)
        turned = ctx.sizes.heads + ctx.sizes.kv_heads
        d_qkv.view(len(qkv), turned + ctx.sizes.kv_heads, -1)[:, :turned] = grad
        return d_qkv, fused.turn_back(d_qkv, qkv, norm, cos, sin, ctx.sizes), None, None, None
