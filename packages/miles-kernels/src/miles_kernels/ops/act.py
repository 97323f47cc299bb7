"""SwiGLU (Shazeer 2020), silu written as x / (1 + exp(-x)): torch's own vector and scalar bodies of silu differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_kernels.native import kernels_for


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` as [..., I] for `gate_up[..., 2 I]` = gate then up; float32 maths, one rounding at the end."""
    if gate_up.is_cuda:
        from miles_kernels.cuda.act import swiglu as on_cuda

        return on_cuda(gate_up)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    return _forward(gate_up)


def _forward(gate_up: Tensor) -> Tensor:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu needs an even last dimension (gate then up), got shape {tuple(gate_up.shape)}")
    kernels = kernels_for(gate_up)
    if kernels is not None:
        return kernels.swiglu(gate_up)
    gate, up = gate_up.float().chunk(2, -1)
    return torch.div(gate, torch.neg(gate).exp_().add_(1.0)).mul_(up).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        kernels = kernels_for(gate_up, grad)
        if kernels is not None:
            return kernels.swiglu_backward(gate_up, grad)
        gate, up = gate_up.float().chunk(2, -1)
        grad = grad.float()
        sigmoid = torch.neg(gate).exp_().add_(1.0).reciprocal_()
        silu = gate * sigmoid
        out = torch.empty_like(gate_up, dtype=torch.float32)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(grad, silu, out=d_up)
        torch.mul(1.0 + gate - silu, sigmoid, out=d_gate)
        d_gate.mul_(up).mul_(grad)
        return out.to(gate_up.dtype)
