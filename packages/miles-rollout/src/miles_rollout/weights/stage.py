"""Weight updates: staged, each tensor verified on arrival, copied in only when everything is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from msgspec.structs import replace
from torch import Tensor

from miles_kernels.checksum import as_hex, as_numbers, dtype_name, tensor_hashes
from miles_kernels.mover import Mover, copy_hashed, idle_movers
from miles_rollout.weights.offer import Layout, layout
from miles_rollout.wire import TensorSpec, WeightManifest

_GROUP_BYTES = 1 << 30
"""Tensors that come one by one are copied and hashed in groups: one kernel launch each on a GPU."""


@runtime_checkable
class StreamSource(Protocol):
    """Tensors that arrive as one stream of bytes (`weights.offer.layout`), written where they are to be."""

    def into(self, stream: Tensor) -> Iterator[int]:
        """Fill the flat uint8 `stream` from its start; yields how many bytes are there now: multiples of `WINDOW`, and all."""
        ...


@runtime_checkable
class WindowSource(Protocol):
    """Tensors that arrive as one stream of bytes, window by window, in memory of the source."""

    def windows(self) -> Iterator[tuple[int, Tensor]]:
        """(place in the stream, bytes) of every window in turn; valid until the next one is asked for."""
        ...


def make_manifest(tensors: Iterable[tuple[str, Tensor]], *, version: int, contract_digest: str) -> WeightManifest:
    """The manifest of (HF name, tensor) pairs, hashing each tensor once; one launch per group of tensors on a GPU."""
    specs: list[TensorSpec] = []
    for group in grouped(tensors):
        for (name, tensor), found in zip(group, tensor_hashes([tensor for _, tensor in group]), strict=True):
            specs.append(TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), hash=found))
    return WeightManifest(version=version, tensors=tuple(specs), contract_digest=contract_digest)


def outline(tensors: Iterable[tuple[str, Tensor]], *, version: int, contract_digest: str) -> WeightManifest:
    """The same without checksums, which then come behind the bytes: `seal`."""
    specs = [
        TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), hash="") for name, tensor in tensors
    ]
    return WeightManifest(version=version, tensors=tuple(specs), contract_digest=contract_digest)


def seal(manifest: WeightManifest, checksums: Tensor) -> WeightManifest:
    """An outline with its checksums, int64 [n]."""
    specs = [replace(spec, hash=each) for spec, each in zip(manifest.tensors, as_hex(checksums), strict=True)]
    return replace(manifest, tensors=tuple(specs))


def matching(manifest: WeightManifest, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """The tensors, which must be those of the manifest, in its order. Raises ValueError naming the first that is not."""
    given = iter(tensors)
    for spec in manifest.tensors:
        name, tensor = next(given, (None, None))
        if name != spec.name or tensor is None:
            raise ValueError(f"the trainer's export gives {name or 'nothing more'} where it gave {spec.name} before")
        if tuple(tensor.shape) != spec.shape or dtype_name(tensor.dtype) != spec.dtype:
            now = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ValueError(f"the trainer's export gives {name} as {now}, before as {spec.dtype} {list(spec.shape)}")
        yield tensor
    if (more := next(given, None)) is not None:
        raise ValueError(f"the trainer's export gives {more[0]} behind all that it gave before")


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
            wrong.append(f"tensors {label}: {some_names(group)}")
    for spec in manifest.tensors:
        if spec.name in held and (tuple(spec.shape), spec.dtype) != held[spec.name]:
            shape, dtype = held[spec.name]
            wrong.append(f"{spec.name} is {spec.dtype} {list(spec.shape)}, the engine holds {dtype} {list(shape)}")
    if wrong:
        raise ValueError("weight update refused: " + "; ".join(wrong))


@runtime_checkable
class SpanSource(Protocol):
    """Tensors that lie in memory of one device, as addresses."""

    device: torch.device

    def addresses(self) -> tuple[int, ...]:
        """Of every tensor of the manifest, in its order; valid as long as the source is."""
        ...


@runtime_checkable
class Sealed(Protocol):
    """A source that brings the publisher's checksums itself, because they are only known when the bytes have been sent."""

    def seals(self) -> Tensor:
        """int64 [n], one per tensor of the manifest, in its order; called when all bytes are there. May wait."""
        ...


class Staged(Mapping[str, Tensor]):
    """A staged model: one flat stretch of memory, and the tensors in it by name, made when they are asked for."""

    def __init__(self, manifest: WeightManifest, where: Layout, stream: Tensor) -> None:
        self.stream, self.where = stream, where
        self._places = {
            spec.name: (spec, start, size) for spec, start, size in zip(manifest.tensors, where.offsets, where.sizes, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        spec, start, size = self._places[name]
        return self.stream[start : start + size].view(getattr(torch, spec.dtype)).view(spec.shape)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def keys(self) -> KeysView[str]:
        """The names, compared as fast as those of a dict."""
        return self._places.keys()


def stage(
    manifest: WeightManifest,
    tensors: Iterable[tuple[str, Tensor]] | StreamSource | WindowSource | SpanSource,
    device: torch.device | str = "cpu",
) -> Staged:
    """Copy and verify every tensor of a checked manifest; the result is one copy of the model on `device`.

    Raises ValueError naming the first tensor that is unexpected, repeated, misshaped or has another hash, or all that
    did not arrive. The copy is what is hashed, so a tensor changed by its owner meanwhile is caught or kept out.
    """
    where = layout(manifest)
    device = _indexed(device)
    spans = isinstance(tensors, SpanSource) and tensors.device == device
    if not spans and not isinstance(tensors, (WindowSource, StreamSource)):
        staged = Staged(manifest, where, torch.empty(where.total_bytes, dtype=torch.uint8, device=device))
        _stage_tensors(manifest, tensors, staged)  # type: ignore[arg-type]
        return staged
    mover = idle_movers.take(where.sizes, device, where.offsets)  # its sums go to zero: a device that slept wakes up meanwhile
    stream = torch.empty(where.total_bytes, dtype=torch.uint8, device=device)
    if spans:
        mover.move(mover.places(tensors.addresses()), mover.places_in(stream.data_ptr()))  # type: ignore[union-attr]
    else:
        _move_windows(mover, tensors, stream)  # type: ignore[arg-type]
    staged = Staged(manifest, where, stream)  # while the device is at work
    stated = _stated(manifest, tensors)
    arrived = mover.expecting(stated)
    if not arrived():  # the first wait for the device
        _verify_all(manifest.tensors, mover.checksums(), stated)
    idle_movers.keep(mover)
    return staged


def _move_windows(mover: Mover, source: StreamSource | WindowSource, stream: Tensor) -> None:
    """Give the device all that a source brings piece by piece, to be copied into the stream and summed."""
    target = mover.places_in(stream.data_ptr())
    if isinstance(source, StreamSource):
        done = 0
        for there in source.into(stream):
            mover.move(target, start=done, stop=there)
            done = there
    else:
        for start, window in source.windows():
            here = window.to(stream.device)
            mover.move(mover.places_in(here.data_ptr() - start), target, start=start, stop=start + here.numel())


def _indexed(device: torch.device | str) -> torch.device:
    """With its number: "cuda" is the current one."""
    made = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if made.type == "cuda" and made.index is None else made


def _stated(manifest: WeightManifest, source: object) -> Tensor:
    """The checksums that the publisher states: in the manifest, or behind the bytes. int64 [n]."""
    if all(spec.hash for spec in manifest.tensors):
        return as_numbers([spec.hash for spec in manifest.tensors])
    if not isinstance(source, Sealed):
        first = next(spec.name for spec in manifest.tensors if not spec.hash)
        raise ValueError(f"weight update: the manifest states no checksum of {first}, and the transport brings none")
    return source.seals()


def _verify_all(specs: Sequence[TensorSpec], found: Tensor, stated: Tensor) -> None:
    """Raise ValueError naming the first tensor whose checksum is not the one stated."""
    if not torch.equal(found, stated):
        number = int((found != stated).nonzero()[0])
        _verify(specs[number].name, as_hex(found[number : number + 1])[0], as_hex(stated[number : number + 1])[0])


def stream_views(manifest: WeightManifest, where: Layout, stream: Tensor) -> dict[str, Tensor]:
    """The tensors of a manifest as views of the stream they arrive in."""
    views = {}
    for spec, start, size in zip(manifest.tensors, where.offsets, where.sizes, strict=True):
        views[spec.name] = stream[start : start + size].view(getattr(torch, spec.dtype)).view(spec.shape)
    return views


def check_arrival(manifest: WeightManifest, spec: TensorSpec | None, name: str, tensor: Tensor, again: bool) -> None:
    """Raise ValueError when a tensor that arrived by name is not in the manifest (no `spec`), came before, or does not fit it."""
    if spec is None:
        raise ValueError(f"weight update: tensor {name} is not in the manifest of version {manifest.version}")
    if again:
        raise ValueError(f"weight update: tensor {name} arrived twice")
    if tuple(tensor.shape) != tuple(spec.shape) or dtype_name(tensor.dtype) != spec.dtype:
        raise ValueError(
            f"weight update: {name} arrived as {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
            f"the manifest says {spec.dtype} {list(spec.shape)}"
        )


def _stage_tensors(manifest: WeightManifest, tensors: Iterable[tuple[str, Tensor]], views: Staged) -> None:
    specs = {spec.name: spec for spec in manifest.tensors}
    at_once = all(spec.hash for spec in manifest.tensors)
    found: dict[str, str] = {}
    for group in grouped(tensors):
        for name, tensor in group:
            check_arrival(manifest, specs.get(name), name, tensor, name in found)
            found[name] = ""
        hashes = copy_hashed([tensor for _, tensor in group], [views[name] for name, _ in group])
        for (name, _), each in zip(group, hashes, strict=True):
            found[name] = each
            if at_once:
                _verify(name, each, specs[name].hash)
    missing = sorted(specs.keys() - found.keys())
    if missing:
        raise ValueError(f"weight update: {len(missing)} tensors did not arrive: {some_names(missing)}")
    if not at_once:
        _verify_all(manifest.tensors, as_numbers([found[name] for name in specs]), _stated(manifest, tensors))


def _verify(name: str, found: str, stated: str) -> None:
    if found != stated:
        raise ValueError(
            f"weight update: {name} hashes to {found}, the publisher states {stated}; the transfer is damaged, send it again"
        )


def swap(held: Iterable[tuple[str, Tensor]], staged: Staged) -> None:
    """Copy a complete staged model over the tensors held. Shapes and dtypes were checked before."""
    targets = dict(held)
    assert targets.keys() == staged.keys(), "staged tensors are not those held"
    ordered = [targets[name] for name in staged]
    addresses = tuple(tensor.data_ptr() for tensor in ordered)
    device = staged.stream.device
    with torch.no_grad():
        if all(tensor.is_contiguous() and tensor.device == device for tensor in ordered) and not any(a % 8 for a in addresses):
            mover = idle_movers.take(staged.where.sizes, device, staged.where.offsets)
            mover.move(mover.places_in(staged.stream.data_ptr()), mover.places(addresses), hashed=False)
            idle_movers.keep(mover)
        else:
            torch._foreach_copy_(ordered, list(staged.values()))


def some_names(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
