"""Small helpers of kernel launches (triton's own would need triton at import)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from miles_kernels.cuda import ready

P = ParamSpec("P")
R = TypeVar("R")

MOST_PROGRAMS = 65535
"""Programs along the second and third axis of a launch."""


def at_home(op: Callable[P, R]) -> Callable[P, R]:
    """An op that runs with the device of its first tensor as the current one, which is where kernels are launched.

    Raises ValueError where they cannot run, saying what to do.
    """

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if torch.compiler.is_compiling() or not isinstance(first, Tensor) or not first.is_cuda:
            return op(*args, **kwargs)
        ready.require(first.device.index)
        if first.device.index == torch.cuda.current_device():
            return op(*args, **kwargs)
        with torch.cuda.device(first.device):
            return op(*args, **kwargs)

    return run


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where it does not begin at a multiple of 16 bytes.

    How wide a kernel loads follows from that, and with it the layout in which it sums a row: a view must not have other bits.
    """
    return x.clone() if x.data_ptr() & 15 else x


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()


@functools.cache
def starts_early(device: int) -> bool:
    """Whether a kernel can be launched while its predecessor runs and wait for it itself (programmatic dependent launch)."""
    return torch.cuda.get_device_capability(device)[0] >= 9


FEW_ROWS = 64
"""Up to so many rows a decode step's kernels are short beside their launches, and are launched early; with more it costs time."""


def early_for(rows: int, tensor: Tensor) -> bool:
    """Whether a kernel over so many rows is launched while its predecessor runs; it must wait before it touches memory."""
    return rows <= FEW_ROWS and tensor.is_cuda and starts_early(tensor.device.index or 0)


def direct(*tensors: Tensor) -> bool:
    """Whether an op may launch its kernel at once: plain tensors, no gradient, nothing that traces or intercepts.

    A registered op costs tens of microseconds of Python per call, as much as a decode step's kernel.
    """
    if not eager(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def eager(*tensors: Tensor) -> bool:
    """Whether nothing traces or intercepts: then an autograd function serves, at a third of a registered op's cost."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
