"""Named tensors in a safetensors file: the only place of this package that touches the format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` (any dtype, moved to the CPU) to `file`."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def load_tensors(file: Path, like: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `file` into `like`, bit for bit.

    Raises ValueError naming the file and every tensor that is missing, unexpected, or of another shape or dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            stored = set(handle.keys())
            wrong = [f"{name} is missing" for name in sorted(set(like) - stored)]
            wrong += [f"{name} is unexpected" for name in sorted(stored - set(like))]
            for name in sorted(stored & set(like)):
                tensor, target = handle.get_tensor(name), like[name]
                if tensor.shape != target.shape or tensor.dtype != target.dtype:
                    wrong.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {target.dtype} {tuple(target.shape)}")
                elif not wrong:
                    target.copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); resume from another checkpoint") from None
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}. It belongs to another model")
