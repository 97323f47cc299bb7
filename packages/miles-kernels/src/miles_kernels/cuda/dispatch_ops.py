"""The ops as `torch.library` custom ops (`torch.ops.miles_cuda.*`), opaque to torch.compile, with fakes and autograd.

On CUDA they run the Hopper backends; on CPU plain torch in float32, so that graphs can be traced and checked anywhere.
Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "miles_cuda"


def _rounded_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a.float(), b.float()).to(dtype)


# ---------------------------------------------------------------- linear
@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, float_output: bool) -> Tensor:
    """`x[T, K] weight[N, K]^T + bias` in x's dtype, or float32 when `float_output`."""
    dtype = torch.float32 if float_output else x.dtype
    if x.is_cuda:
        from miles_kernels.cuda.linear import forward

        return forward(x, weight, bias, dtype)
    out = torch.mm(x.float(), weight.float().t())
    return (out if bias is None else out + bias.float()).to(dtype)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, float_output: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if float_output else x.dtype)


@torch.library.custom_op(f"{NAMESPACE}::linear_backward", mutates_args=())
def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dgrad, wgrad) of `linear`."""
    if x.is_cuda:
        from miles_kernels.cuda.linear import backward

        dx, dw, _ = backward(grad, x, weight, (True, True, False), None)
        assert dx is not None and dw is not None
        return dx, dw
    return _rounded_mm(grad, weight, x.dtype), _rounded_mm(grad.t(), x, weight.dtype)


@linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dw = linear_backward(grad.contiguous(), x, weight)
    return dx, dw, None if ctx.bias_dtype is None else grad.float().sum(0).to(ctx.bias_dtype), None


linear.register_autograd(_linear_autograd, setup_context=_linear_context)


# ---------------------------------------------------------------- grouped linear
def _experts_of_rows(offsets: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(
        offsets[1:].contiguous(), torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True
    )


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`x[R, K]` times `weight[E, N, K]^T`; expert e has rows offsets[e] to offsets[e + 1] (int32 [E + 1])."""
    if x.is_cuda:
        from miles_kernels.cuda.grouped import Groups, gemm

        return gemm(x, weight, Groups(offsets, x.shape[0]))
    rows = weight.float()[_experts_of_rows(offsets, x.shape[0])]
    return torch.einsum("rk,rnk->rn", x.float(), rows).to(x.dtype)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(dgrad, wgrad) of `grouped_linear`."""
    if x.is_cuda:
        from miles_kernels.cuda.grouped import Groups, gemm, wgrad

        groups = Groups(offsets, x.shape[0])
        return gemm(grad, weight, groups, transposed=True), wgrad(grad, x, groups, weight.shape, weight.dtype)
    expert = _experts_of_rows(offsets, x.shape[0])
    dx = torch.einsum("rn,rnk->rk", grad.float(), weight.float()[expert]).to(x.dtype)
    member = torch.nn.functional.one_hot(expert, weight.shape[0]).float()
    return dx, torch.einsum("re,rn,rk->enk", member, grad.float(), x.float()).to(weight.dtype)


@grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _grouped_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None)


grouped_linear.register_autograd(_grouped_autograd, setup_context=_grouped_context)


# ---------------------------------------------------------------- linear -> log-probability, entropy
@torch.library.custom_op(f"{NAMESPACE}::linear_logprob", mutates_args=())
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, log2 of the normaliser) of `targets[T]`, float32 [T] each; see `cuda.logprob`."""
    if hidden.is_cuda:
        from miles_kernels.cuda.logprob import forward

        return forward(hidden, weight, targets, inverse_temperature)
    z = torch.mm(hidden.float(), weight.float().t()) * inverse_temperature[:, None]
    log_total = torch.logsumexp(z, -1)
    logp = z - log_total[:, None]
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy, log_total * 1.4426950408889634


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    return one, two, three


@torch.library.custom_op(f"{NAMESPACE}::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    g_logprob: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight from those of the log-probability and the entropy."""
    if hidden.is_cuda:
        from miles_kernels.cuda.logprob import backward

        dx, dw, _ = backward((g_logprob, g_entropy), hidden, weight, targets, inverse_temperature, normaliser, entropy)
        assert dx is not None and dw is not None
        return dx, dw
    z = torch.mm(hidden.float(), weight.float().t()) * inverse_temperature[:, None]
    logp = z - normaliser[:, None] / 1.4426950408889634
    dz = -logp.exp() * (g_logprob[:, None] + g_entropy[:, None] * (logp + entropy[:, None]))
    dz = (dz + torch.nn.functional.one_hot(targets, weight.shape[0]) * g_logprob[:, None]) * inverse_temperature[:, None]
    return _rounded_mm(dz, weight, hidden.dtype), _rounded_mm(dz.t(), hidden, weight.dtype)


@linear_logprob_backward.register_fake
def _(
    g_logprob: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _logprob_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2], output[1])
    ctx.mark_non_differentiable(output[2])


def _logprob_autograd(ctx: Any, g_logprob: Tensor, g_entropy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*linear_logprob_backward(g_logprob.contiguous(), g_entropy.contiguous(), *ctx.saved_tensors), None, None)


linear_logprob.register_autograd(_logprob_autograd, setup_context=_logprob_context)
