"""SwiGLU on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.cuda.launch import at_home, cdiv, direct, eager, early_for

BLOCK = 1024


@at_home
def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` as [..., I] for gate_up[..., 2 I]; float32 arithmetic, one rounding."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu needs an even last dimension (gate then up), got shape {tuple(gate_up.shape)}")
    if direct(gate_up):
        return _forward(gate_up)
    if eager(gate_up):
        return _SwiGLU.apply(gate_up)
    return torch.ops.miles_cuda.swiglu(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _backward(ctx.saved_tensors[0], grad)


def _flat(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _forward(gate_up: Tensor) -> Tensor:
    from miles_kernels.cuda.act_kernels import swiglu_forward

    flat, inner = _flat(gate_up), gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], inner))
    if out.numel():
        grid = (flat.shape[0], cdiv(inner, BLOCK))
        early = early_for(flat.shape[0], flat)
        swiglu_forward[grid](
            flat, out, flat.shape[0], inner, flat.stride(0), BLOCK=BLOCK, EARLY=early, num_warps=4, launch_pdl=early
        )
    return out


@torch.library.custom_op("miles_cuda::swiglu", mutates_args=(), device_types="cuda", schema="(Tensor gate_up) -> Tensor")
def _swiglu(gate_up: Tensor) -> Tensor:
    return _forward(gate_up)


@torch.library.custom_op(
    "miles_cuda::swiglu_backward", mutates_args=(), device_types="cuda", schema="(Tensor gate_up, Tensor grad) -> Tensor"
)
def _swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    return _backward(gate_up, grad)


def _backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    from miles_kernels.cuda.act_kernels import swiglu_backward

    flat, g, inner = _flat(gate_up), _flat(grad), gate_up.shape[-1] // 2
    out = gate_up.new_empty(gate_up.shape)
    if out.numel():
        grid = (flat.shape[0], cdiv(inner, BLOCK))
        swiglu_backward[grid](flat, g, out, flat.shape[0], inner, flat.stride(0), g.stride(0), BLOCK=BLOCK, num_warps=4)
    return out


@torch.library.register_fake("miles_cuda::swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("miles_cuda::swiglu_backward")
def _(gate_up: Tensor, grad: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _grad(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.miles_cuda.swiglu_backward(ctx.saved_tensors[0], grad)


_swiglu.register_autograd(_grad, setup_context=_save)
