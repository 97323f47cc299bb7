"""Rotary position embedding on CUDA, rotate-half layout. `qkv` has it with the head norms and the cache write in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.launch import at_home, cdiv, direct, next_power_of_2

ROWS = 16


@at_home
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x[T, heads, D] by `RopeTable.rows` (cos, sin float32 [T, 1, D] or [T, D], sin signed). Backward rotates back."""
    if direct(x, cos, sin):
        return _launch(x, cos, sin, False)
    return torch.ops.miles_cuda.rope(x, cos, sin, False)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    from miles_kernels.cuda.norm_kernels import rotate

    tokens, heads, dim = x.shape
    cos, sin = cos.reshape(tokens, dim), sin.reshape(tokens, dim)
    if dim % 2 or cos.dtype is not torch.float32:
        raise ValueError(f"rope: needs an even head size and float32 tables, got {dim} and {cos.dtype}")
    if x.stride(2) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rotate[(cdiv(tokens * heads, ROWS),)](
            x, cos, sin, out, tokens * heads, heads,
            x.stride(0), x.stride(1), out.stride(0), out.stride(1), dim,
            D=dim, HALF=next_power_of_2(dim // 2), ROWS=ROWS, INVERSE=inverse, num_warps=4,
        )  # fmt: skip
    return out


@torch.library.custom_op(
    "miles_cuda::rope", mutates_args=(), device_types="cuda", schema="(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor"
)
def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return _launch(x, cos, sin, inverse)


@torch.library.register_fake("miles_cuda::rope")
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.inverse = inputs[3]


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    return torch.ops.miles_cuda.rope(grad, cos, sin, not ctx.inverse), None, None, None


_rope.register_autograd(_grad, setup_context=_save)
