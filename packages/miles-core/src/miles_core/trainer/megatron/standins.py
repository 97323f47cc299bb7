"""megatron-core on a CPU: it asks for CUDA devices by name in many places, and for nothing else of CUDA that matters here.

`on_device(device)` is a context around every call into megatron-core. For a CUDA device it does nothing. For a CPU it answers
`torch.cuda.current_device()` with the CPU, makes tensors asked for on "cuda" on the CPU, and lets `Tensor.type()` say the
CUDA name that megatron-core's optimizer expects. Nothing outlives the context.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Run calls into megatron-core on `device`, without the warnings about its own calls of torch. Re-entrant."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch names it will rename
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="megatron")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        if device.type != "cpu":
            yield
            return
        stack.enter_context(_CudaMeansCpu())
        for name, value in _replacements().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", _all_to_all_single))
        yield


_real_all_to_all_single = dist.all_to_all_single


def _all_to_all_single(*args: Any, **kwargs: Any) -> Any:
    """With sizes as numbers: megatron-core turns them into such only when they are on a GPU."""
    sizes = {k: x.tolist() if k.endswith("split_sizes") and isinstance(x, Tensor) else x for k, x in kwargs.items()}
    return _real_all_to_all_single(*args, **sizes)


def _replacements() -> dict[str, Any]:
    return {
        "current_device": lambda: _CPU,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: _NoStream(),
        "default_stream": lambda *_: _NoStream(),
        "stream": lambda *_: _NoStream(),
        "Stream": _NoStream,
        "Event": _NoStream,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }


class _NoStream:
    """A stream or event on a device that has none: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self


class _CudaMeansCpu(TorchFunctionMode):
    """Factories asked for "cuda" work on the CPU; `cuda()` and `type()` of a CPU tensor answer as on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")
