"""What driver and workers say to each other, as bytes: msgpack records, tensors as dtype, shape and raw bytes. No pickle."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import torch
from torch import Tensor

from miles_core.trainer.base import StepStats
from miles_core.trainer.batch import TrainBatch
from miles_kernels.checksum import byte_view, dtype_name


class RawTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor on its way."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Batch(msgspec.Struct, frozen=True):
    plain: dict[str, Any]
    tensors: dict[str, RawTensor]


def pack_tensor(tensor: Tensor) -> RawTensor:
    """Bytes of a tensor."""
    return RawTensor(dtype_name(tensor.dtype), tuple(tensor.shape), byte_view(tensor.cpu()).numpy().tobytes())


def unpack_tensor(raw: RawTensor) -> Tensor:
    """The tensor again, on the CPU."""
    dtype = getattr(torch, raw.dtype)
    if not raw.data:
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=torch.uint8).view(dtype).view(raw.shape)


def pack_batch(batch: TrainBatch) -> bytes:
    """A batch as bytes."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: pack_tensor(value) for name, value in values.items() if isinstance(value, Tensor)}
    return msgspec.msgpack.encode(_Batch({name: value for name, value in values.items() if name not in tensors}, tensors))


def unpack_batch(data: bytes) -> TrainBatch:
    """The batch again, bit for bit."""
    found = msgspec.msgpack.decode(data, type=_Batch)
    plain = {name: _tuples(value) for name, value in found.plain.items()}
    return TrainBatch(**plain, **{name: unpack_tensor(raw) for name, raw in found.tensors.items()})


def pack_stats(stats: StepStats) -> bytes:
    """What a step reports, as bytes."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(stats), "means": dict(stats.means), "extra": dict(stats.extra)})


def unpack_stats(data: bytes) -> StepStats:
    """The report again."""
    return StepStats(**msgspec.msgpack.decode(data))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
