"""Named tensors in a safetensors file: the only place of this package that touches the format."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64}


def save_tensors(file: Path, tensors: Mapping[str, Tensor], *, checksums: bool = False) -> None:
    """Write `tensors` (any dtype, moved to the CPU) to `file`, with a CRC-32 of each as model directories carry it if asked."""
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = None
    if checksums:
        sums = {name: f"{zlib.crc32(tensor.view(torch.uint8).reshape(-1).numpy()):08x}" for name, tensor in held.items()}
        metadata = {"format": "pt", "crc32": json.dumps(sums)}
    save_file(held, file, metadata=metadata)


def load_tensors(file: Path, like: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `file` into `like`, bit for bit.

    Raises ValueError naming the file and every tensor that is missing, unexpected, or of another shape or dtype.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in like.items()}
    for name, tensor in read_tensors([file], shapes):
        like[name].copy_(tensor)


def read_tensors(
    files: Sequence[Path], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in `files`, one at a time, after checking that together they hold what is `expected`.

    Raises ValueError naming the file and every tensor that is missing, unexpected, or of another shape or dtype.
    """
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    extra: list[str] = []
    unlike: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for name in handle.keys():
                    where[name] = file
                    if name not in expected:
                        extra.append(f"{name} is unexpected")
                        continue
                    view, (shape, dtype) = handle.get_slice(name), expected[name]
                    found = (tuple(view.get_shape()), _DTYPES.get(view.get_dtype()))
                    if found != (shape, dtype):
                        unlike.append(f"{name} is {found[1]} {found[0]}, expected {dtype} {shape}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); resume from another checkpoint") from None
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(where))] + extra + unlike
    if wrong:
        raise ValueError(f"{files[0]}: {'; '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}. It belongs to another model")
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():
                yield name, handle.get_tensor(name)
