"""From whatever brings a weight update to the first rank of a tensor-parallel engine into the buckets that all ranks take.

Here the tensors are whole, and never more of them than a bucket: what `weights.stage` does for an engine of one process at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from miles_kernels.checksum import as_hex
from miles_kernels.mover import Mover
from miles_rollout.engines.embedded.staging import Staging, wrong_hashes
from miles_rollout.weights.offer import layout, size_bytes
from miles_rollout.weights.stage import Sealed, SpanSource, WindowSource, check_arrival, some_names
from miles_rollout.wire import WeightManifest

Result = TypeVar("Result")


@runtime_checkable
class PieceSource(Protocol):
    """Tensors that arrive as one stream of bytes, which can be looked at piece by piece in memory of the source."""

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """As `WindowSource.windows`."""
        ...


def feed(
    manifest: WeightManifest,
    source: Any,
    call: Callable[[Callable[[Any], Result]], Result],
    *,
    seals_itself: bool = False,
) -> tuple[str, ...]:
    """Bring all tensors of a checked manifest to all ranks, who stage their parts; the hashes that are stated of them.

    `call` runs a function of the leader's core where and when that may be done, a bucket at a time; steps may be made in between.
    With `seals_itself` what the leader found is what is stated: of weights that were made or read here. Raises what `stage` does;
    nothing is staged any more then.
    """
    specs = manifest.tensors
    stated = None if seals_itself or not all(spec.hash for spec in specs) else tuple(spec.hash for spec in specs)
    staging: Any = call(lambda core: core.begin_update(manifest))
    try:
        for numbers in buckets(manifest, source, staging):
            call(lambda core, numbers=numbers: core.take_bucket(numbers))  # type: ignore[misc]
            if stated is not None:
                _require(manifest, numbers, staging.found, stated)
        missing = sorted(spec.name for spec, found in zip(specs, staging.found, strict=True) if not found)
        if missing:
            raise ValueError(f"weight update: {len(missing)} tensors did not arrive: {some_names(missing)}")
        if seals_itself:
            stated = tuple(staging.found)
        elif stated is None:
            if not isinstance(source, Sealed):
                first = next(spec.name for spec in specs if not spec.hash)
                raise ValueError(f"weight update: the manifest states no checksum of {first}, and the transport brings none")
            stated = tuple(as_hex(source.seals()))
            _require(manifest, range(len(specs)), staging.found, stated)
    except BaseException:
        call(lambda core: core.drop_update())
        raise
    return stated


def buckets(manifest: WeightManifest, source: Any, staging: Staging) -> Iterator[tuple[int, ...]]:
    """Fill the room of `staging` with whole tensors, again and again; yields their numbers in the manifest."""
    if isinstance(source, SpanSource) and torch.device(source.device) == staging.room.device:
        return _from_spans(manifest, source, staging)
    if isinstance(source, WindowSource):
        return _from_windows(manifest, source.windows(), staging)
    if isinstance(source, PieceSource):
        return _from_windows(manifest, source.pieces(), staging)
    return _from_tensors(manifest, source, staging)


def _from_tensors(manifest: WeightManifest, tensors: Iterable[tuple[str, Tensor]], staging: Staging) -> Iterator[tuple[int, ...]]:
    """Tensors that come one by one, in any order."""
    specs = {spec.name: spec for spec in manifest.tensors}
    number_of = {name: number for number, name in enumerate(specs)}
    seen: set[str] = set()
    bucket: list[int] = []
    held = 0
    for name, tensor in tensors:
        check_arrival(manifest, specs.get(name), name, tensor, name in seen)
        number = number_of[name]
        seen.add(name)
        if held + staging.sizes[number] > staging.room_bytes:
            yield tuple(bucket)
            bucket, held = [], 0
        staging.view(number, held).copy_(tensor)
        bucket.append(number)
        held += staging.sizes[number]
    if bucket:
        yield tuple(bucket)


def _runs(staging: Staging) -> list[range]:
    """The numbers of all tensors in runs that fit the room."""
    runs, first, held = [], 0, 0
    for number in range(len(staging.manifest.tensors)):
        size = staging.sizes[number]
        if held + size > staging.room_bytes:
            runs.append(range(first, number))
            first, held = number, 0
        held += size
    return [*runs, range(first, len(staging.manifest.tensors))]


def _from_spans(manifest: WeightManifest, source: SpanSource, staging: Staging) -> Iterator[tuple[int, ...]]:
    """Tensors that lie on this device."""
    addresses, base = [int(address) for address in source.addresses()], staging.room.data_ptr()
    for run in _runs(staging):
        places = staging.places_of(run)[:-1]
        mover = Mover([size_bytes(manifest.tensors[number]) for number in run], staging.room.device, places)
        mover.move(mover.places(addresses[run.start : run.stop]), mover.places_in(base), hashed=False)
        yield tuple(run)


def _from_windows(manifest: WeightManifest, windows: Iterator[tuple[int, Tensor]], staging: Staging) -> Iterator[tuple[int, ...]]:
    """Tensors that arrive as one stream, cut anywhere at a multiple of `WINDOW`."""
    where, base, device = layout(manifest), staging.room.data_ptr(), staging.room.device
    runs = iter(_runs(staging))
    run = next(runs)
    mover, target, end = _run_of(where, run, staging, base)
    for start, window in windows:
        stop, at = start + window.numel(), start
        here = window.to(device)
        while at < stop:
            until = min(stop, end)
            mover.move(mover.places_in(here.data_ptr() - start), target, start=at, stop=until, hashed=False)
            at = until
            if until == end:
                yield tuple(run)
                if end == where.total_bytes:
                    break
                run = next(runs)
                mover, target, end = _run_of(where, run, staging, base)


def _run_of(where: Any, run: range, staging: Staging, base: int) -> tuple[Mover, Any, int]:
    """What moves the tensors of a run from the stream to the room, where they go, and where the next run begins."""
    mover = Mover(where.sizes[run.start : run.stop], staging.room.device, where.offsets[run.start : run.stop])
    target = mover.places([base + place for place in staging.places_of(run)[:-1]])
    return mover, target, where.offsets[run.stop] if run.stop < len(where.offsets) else where.total_bytes


def _require(manifest: WeightManifest, numbers: Iterable[int], found: list[str], stated: tuple[str, ...]) -> None:
    wrong = wrong_hashes(manifest, numbers, found, stated)
    if wrong:
        raise ValueError(f"weight update: {'; '.join(wrong[:3])}; the transfer is damaged, send it again")
