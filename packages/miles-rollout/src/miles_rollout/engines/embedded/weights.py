"""Weight updates: staged one tensor at a time, each verified on arrival, copied in only when everything is there.

The hash of a tensor is xxh3-64 of its bytes in row-major order, as 16 hex digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash
from torch import Tensor

from miles_rollout.wire import TensorSpec, WeightManifest


def tensor_hash(tensor: Tensor) -> str:
    """xxh3-64 of a tensor's bytes, row-major, 16 hex digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy())


def dtype_name(dtype: torch.dtype) -> str:
    """The name a manifest uses: "float32", "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def make_manifest(tensors: Iterable[tuple[str, Tensor]], *, version: int, contract_digest: str) -> WeightManifest:
    """The manifest of (HF name, tensor) pairs, hashing each tensor once."""
    specs = [
        TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), hash=tensor_hash(tensor))
        for name, tensor in tensors
    ]
    return WeightManifest(version=version, tensors=tuple(specs), contract_digest=contract_digest)


def check_manifest(
    manifest: WeightManifest, held: Mapping[str, tuple[tuple[int, ...], str]], *, version: int, contract_digest: str
) -> None:
    """Raise ValueError naming all that keeps `manifest` from replacing the weights `held`: name -> (shape, dtype name)."""
    wrong = []
    if manifest.version <= version:
        wrong.append(f"version {manifest.version} does not grow, the engine holds version {version}")
    if manifest.contract_digest != contract_digest:
        wrong.append(
            f"contract {manifest.contract_digest} is not the engine's {contract_digest}; "
            "build trainer and engine with one contract (same miles-kernels, same dtype, same machine kind)"
        )
    names = [spec.name for spec in manifest.tensors]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    for label, group in (
        ("listed twice", repeated),
        ("missing", sorted(held.keys() - set(names))),
        ("unexpected", sorted(set(names) - held.keys())),
    ):
        if group:
            wrong.append(f"tensors {label}: {_some(group)}")
    for spec in manifest.tensors:
        if spec.name in held and (tuple(spec.shape), spec.dtype) != held[spec.name]:
            shape, dtype = held[spec.name]
            wrong.append(f"{spec.name} is {spec.dtype} {list(spec.shape)}, the engine holds {dtype} {list(shape)}")
    if wrong:
        raise ValueError("weight update refused: " + "; ".join(wrong))


def stage(manifest: WeightManifest, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copy and verify every tensor of a checked manifest; the result is one copy of the model.

    Raises ValueError naming the first tensor that is unexpected, repeated, misshaped or has another hash, or all that
    did not arrive. The copy is what is hashed, so a tensor changed by its owner meanwhile is caught or kept out.
    """
    specs = {spec.name: spec for spec in manifest.tensors}
    staged: dict[str, Tensor] = {}
    for name, tensor in tensors:
        spec = specs.get(name)
        if spec is None:
            raise ValueError(f"weight update: tensor {name} is not in the manifest of version {manifest.version}")
        if name in staged:
            raise ValueError(f"weight update: tensor {name} arrived twice")
        if tuple(tensor.shape) != tuple(spec.shape) or dtype_name(tensor.dtype) != spec.dtype:
            raise ValueError(
                f"weight update: {name} arrived as {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
                f"the manifest says {spec.dtype} {list(spec.shape)}"
            )
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        found = tensor_hash(copy)
        if found != spec.hash:
            raise ValueError(
                f"weight update: {name} hashes to {found}, the manifest says {spec.hash}; the transfer is damaged, send it again"
            )
        staged[name] = copy
    missing = sorted(specs.keys() - staged.keys())
    if missing:
        raise ValueError(f"weight update: {len(missing)} tensors did not arrive: {_some(missing)}")
    return staged


def swap(held: Iterable[tuple[str, Tensor]], staged: dict[str, Tensor]) -> None:
    """Copy a complete staged model over the tensors held, freeing as it goes. Shapes and dtypes were checked before."""
    with torch.no_grad():
        for name, tensor in held:
            tensor.copy_(staged.pop(name))
    assert not staged, f"staged tensors without a place: {sorted(staged)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
