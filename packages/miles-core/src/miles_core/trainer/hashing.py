"""Fingerprints of tensor bytes: xxh3-64, little-endian, row-major, without copying contiguous CPU tensors."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


def _buffer(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    assert tensor.device.type == "cpu" and tensor.is_contiguous() and sys.byteorder == "little"
    return (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


def tensor_hash(tensor: Tensor) -> str:
    """xxh3-64 of the tensor's bytes, 16 hex digits."""
    held = tensor.detach().cpu().contiguous()
    return xxhash.xxh3_64_hexdigest(_buffer(held)) if held.numel() else xxhash.xxh3_64_hexdigest(b"")


def combined_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One xxh3-64 over names, dtypes, shapes and bytes of many tensors, in order."""
    total = xxhash.xxh3_64()
    for name, tensor in tensors:
        total.update(f"{name}|{dtype_name(tensor.dtype)}|{tuple(tensor.shape)}|{tensor_hash(tensor)}\n".encode())
    return total.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The bare name: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
