"""Weight updates: staged, each tensor verified on arrival, copied in only when everything is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from miles_kernels.checksum import (
    as_hex,
    as_numbers,
    copy_hashed,
    copy_spans,
    device_spans,
    dtype_name,
    span_hashes,
    tensor_hash,
    tensor_hashes,
    triton_available,
)
from miles_rollout.weights.offer import Layout, layout
from miles_rollout.wire import TensorSpec, WeightManifest

_GROUP_BYTES = 1 << 30
"""Tensors that come one by one are copied and hashed in groups: one kernel launch each on a GPU."""


@runtime_checkable
class StreamSource(Protocol):
    """Tensors that arrive as one stream of bytes (`weights.offer.layout`)."""

    def into(self, stream: Tensor) -> Iterator[int]:
        """Fill the flat uint8 `stream` from its start; yields how many bytes are there now, ending with all of them."""
        ...


def make_manifest(tensors: Iterable[tuple[str, Tensor]], *, version: int, contract_digest: str) -> WeightManifest:
    """The manifest of (HF name, tensor) pairs, hashing each tensor once; one launch per group of tensors on a GPU."""
    specs: list[TensorSpec] = []
    for group in grouped(tensors):
        for (name, tensor), found in zip(group, tensor_hashes([tensor for _, tensor in group]), strict=True):
            specs.append(TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), hash=found))
    return WeightManifest(version=version, tensors=tuple(specs), contract_digest=contract_digest)


def grouped(tensors: Iterable[tuple[str, Tensor]], limit_bytes: int = _GROUP_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
    """Lists of consecutive tensors of about `limit_bytes`; on a CPU, where it gains nothing, of one tensor."""
    group: list[tuple[str, Tensor]] = []
    held = 0
    for name, tensor in tensors:
        group.append((name, tensor))
        held += tensor.nbytes
        if held >= limit_bytes or not tensor.is_cuda:
            yield group
            group, held = [], 0
    if group:
        yield group


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


@runtime_checkable
class SpanSource(Protocol):
    """Tensors that lie in memory of the engine's own device, as addresses."""

    def spans(self) -> list[tuple[int, int]]:
        """(address, bytes) of every tensor of the manifest, in its order; valid as long as the source is."""
        ...


class Staged:
    """A staged model: one flat stretch of memory, and the tensors in it by name, made when they are asked for."""

    def __init__(self, manifest: WeightManifest, where: Layout, stream: Tensor) -> None:
        self.stream = stream
        self._places = {
            spec.name: (spec, start, size)
            for spec, start, size in zip(manifest.tensors, where.offsets, where.sizes, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        spec, start, size = self._places[name]
        return self.stream[start : start + size].view(getattr(torch, spec.dtype)).view(spec.shape)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def address(self, name: str) -> tuple[int, int]:
        """Where a tensor starts in memory, and its bytes."""
        _, start, size = self._places[name]
        return self.stream.data_ptr() + start, size


def stage(
    manifest: WeightManifest,
    tensors: Iterable[tuple[str, Tensor]] | StreamSource | SpanSource,
    device: torch.device | str = "cpu",
) -> Staged:
    """Copy and verify every tensor of a checked manifest; the result is one copy of the model on `device`.

    Raises ValueError naming the first tensor that is unexpected, repeated, misshaped or has another hash, or all that
    did not arrive. The copy is what is hashed, so a tensor changed by its owner meanwhile is caught or kept out.
    """
    where = layout(manifest)
    stream = torch.empty(where.total_bytes, dtype=torch.uint8, device=device)
    staged = Staged(manifest, where, stream)
    if isinstance(tensors, SpanSource) and stream.is_cuda and triton_available():
        base = stream.data_ptr()
        found = span_hashes(tensors.spans(), stream.device, [base + start for start in where.offsets])
        _verify_all(manifest.tensors, found)
    elif isinstance(tensors, StreamSource):
        _stage_stream(manifest, where, tensors, stream)
    else:
        assert not isinstance(tensors, SpanSource) or isinstance(tensors, Iterable)
        _stage_tensors(manifest, tensors, staged)  # type: ignore[arg-type]
    return staged


def _verify_all(specs: Sequence[TensorSpec], found: Tensor) -> None:
    """The same as `_verify`, for many at once and fast when all is well."""
    if not torch.equal(found, as_numbers([spec.hash for spec in specs])):
        for spec, each in zip(specs, as_hex(found), strict=True):
            _verify(spec, each)


def stream_views(manifest: WeightManifest, where: Layout, stream: Tensor) -> dict[str, Tensor]:
    """The tensors of a manifest as views of the stream they arrive in."""
    views = {}
    for spec, start, size in zip(manifest.tensors, where.offsets, where.sizes, strict=True):
        views[spec.name] = stream[start : start + size].view(getattr(torch, spec.dtype)).view(spec.shape)
    return views


def _stage_stream(manifest: WeightManifest, where: Layout, source: StreamSource, stream: Tensor) -> None:
    done = 0
    fast = stream.is_cuda and triton_available()
    for there in source.into(stream):
        first = done
        while done < len(where.offsets) and where.offsets[done] + where.sizes[done] <= there:
            done += 1
        arrived = manifest.tensors[first:done]
        places = list(zip(where.offsets[first:done], where.sizes[first:done], strict=True))
        if fast:
            _verify_all(arrived, span_hashes([(stream.data_ptr() + start, size) for start, size in places], stream.device))
        else:
            for spec, (start, size) in zip(arrived, places, strict=True):
                _verify(spec, tensor_hash(stream[start : start + size]))
    assert done == len(where.offsets), f"the stream ended after {done} of {len(where.offsets)} tensors"


def _stage_tensors(manifest: WeightManifest, tensors: Iterable[tuple[str, Tensor]], views: Staged) -> None:
    specs = {spec.name: spec for spec in manifest.tensors}
    staged: set[str] = set()
    for group in grouped(tensors):
        for name, tensor in group:
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
            staged.add(name)
        hashes = copy_hashed([tensor for _, tensor in group], [views[name] for name, _ in group])
        for (name, _), found in zip(group, hashes, strict=True):
            _verify(specs[name], found)
    missing = sorted(specs.keys() - staged)
    if missing:
        raise ValueError(f"weight update: {len(missing)} tensors did not arrive: {_some(missing)}")


def _verify(spec: TensorSpec, found: str) -> None:
    if found != spec.hash:
        raise ValueError(
            f"weight update: {spec.name} hashes to {found}, the manifest says {spec.hash}; the transfer is damaged, send it again"
        )


def swap(held: Iterable[tuple[str, Tensor]], staged: Staged) -> None:
    """Copy a complete staged model over the tensors held. Shapes and dtypes were checked before."""
    names, targets = [], []
    for name, tensor in held:
        names.append(name)
        targets.append(tensor)
    assert len(names) == len(staged) and set(names) == set(staged), "staged tensors are not those held"
    spans = device_spans(targets) if staged.stream.is_cuda else None
    with torch.no_grad():
        if spans is None:
            torch._foreach_copy_(targets, [staged[name] for name in names])
        else:
            copy_spans([(staged.address(name), place) for name, place in zip(names, spans, strict=True)], staged.stream.device)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
