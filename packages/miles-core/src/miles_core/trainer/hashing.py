"""Fingerprints of tensors: the checksum of `miles_kernels.checksum`, and one over many named tensors."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash
from torch import Tensor

from miles_kernels.checksum import dtype_name, tensor_hash

__all__ = ["combined_hash", "dtype_name", "tensor_hash"]


def combined_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One xxh3-64 over names, dtypes, shapes and checksums of many tensors, in order."""
    total = xxhash.xxh3_64()
    for name, tensor in tensors:
        total.update(f"{name}|{dtype_name(tensor.dtype)}|{tuple(tensor.shape)}|{tensor_hash(tensor)}\n".encode())
    return total.hexdigest()
