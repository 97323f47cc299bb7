"""Weight updates on a disk that publisher and engines share: a full one now and then, deltas between, chained by hashes.

    STORE/000007-full/update.json   what it is: manifest, digest of the weights, files with sizes and hashes
                     /data.bin      the stream of all tensors (`weights.offer.layout`)
    STORE/000008-delta/update.json  the same, with the version and digest of the weights it applies to
                      /data.bin     compressed chunks of the tensors that changed

A folder appears whole, by rename, or not at all. A reader holds some version, or none, and applies every link after it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import torch
import xxhash
from torch import Tensor

from miles_rollout.weights import delta
from miles_rollout.weights.offer import layout, window_bytes
from miles_rollout.weights.pack import Packer
from miles_rollout.wire import SCHEMA, WeightManifest, Wire, check_schema

_LINK = re.compile(r"(\d{6,})-(full|delta)")
_FACTS, _DATA = "update.json", "data.bin"


class ChangedTensor(Wire, frozen=True, kw_only=True):
    """Where the compressed chunks of one tensor lie in the file."""

    name: str
    chunks: tuple[tuple[int, int], ...]
    """(offset, bytes) of each."""


class DiskUpdate(Wire, frozen=True, kw_only=True):
    """One link of the chain."""

    manifest: WeightManifest
    digest: str
    """Of the weights after it: `weights_digest`."""
    size_bytes: int
    data_hash: str
    """xxh3-128 of data.bin."""
    base_version: int | None = None
    """None for a full update."""
    base_digest: str = ""
    changed: tuple[ChangedTensor, ...] = ()
    schema: int = SCHEMA


def weights_digest(manifest: WeightManifest) -> str:
    """SHA-256 over names, dtypes, shapes and checksums of all tensors, sorted by name; the version does not enter."""
    total = hashlib.sha256()
    for spec in sorted(manifest.tensors, key=lambda spec: spec.name):
        total.update(f"{spec.name}|{spec.dtype}|{','.join(map(str, spec.shape))}|{spec.hash}\n".encode())
    return total.hexdigest()


class WeightStore:
    """The folder, for writing and reading. Nothing is touched until a method is called."""

    def __init__(self, directory: str | Path) -> None:
        self.root = Path(directory)

    def links(self) -> dict[int, Path]:
        """Version to folder of the whole updates, ascending. A full one is preferred where both are there."""
        found: dict[int, Path] = {}
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            match = _LINK.fullmatch(path.name)
            if match and (int(match[1]) not in found or match[2] == "full"):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def read(self, version: int) -> DiskUpdate:
        """The facts of one link. Raises ValueError naming the file when it is missing or damaged."""
        path = self.links().get(version)
        if path is None:
            raise ValueError(f"{self.root}: no weight update of version {version}; there are {sorted(self.links()) or 'none'}")
        try:
            facts = msgspec.json.decode((path / _FACTS).read_bytes(), type=DiskUpdate)
        except (OSError, msgspec.MsgspecError) as error:
            raise ValueError(f"{path / _FACTS}: cannot be read: {error}") from None
        check_schema(facts)
        return facts

    # ---- writing

    def write_full(self, manifest: WeightManifest, stream: Tensor) -> Path:
        """All tensors. `stream` is the flat uint8 CPU tensor of the manifest's layout."""

        def everything(file: _Hashed) -> tuple[ChangedTensor, ...]:
            for start in range(0, stream.numel(), delta.CHUNK_BYTES):
                file.write(stream[start : start + delta.CHUNK_BYTES].numpy())
            return ()

        return self._write(manifest, "full", everything)

    def write_delta(self, manifest: WeightManifest, stream: Tensor, base: WeightManifest, old: Tensor) -> Path:
        """What changed since `base`, whose stream is `old`."""
        if [(s.name, s.dtype, s.shape) for s in base.tensors] != [(s.name, s.dtype, s.shape) for s in manifest.tensors]:
            raise ValueError("a delta needs the tensors of its base, by name, dtype and shape; write a full update")

        def changes(file: _Hashed) -> tuple[ChangedTensor, ...]:
            zstd, where, found = delta.compressor(), layout(manifest), []
            for spec, start, size in zip(manifest.tensors, where.offsets, where.sizes, strict=True):
                chunks = []
                for chunk in delta.encode(old[start : start + size], stream[start : start + size], spec.dtype, zstd):
                    chunks.append((file.size, len(chunk)))
                    file.write(chunk)
                if chunks:
                    found.append(ChangedTensor(name=spec.name, chunks=tuple(chunks)))
            return tuple(found)

        return self._write(manifest, "delta", changes, base)

    def _write(
        self, manifest: WeightManifest, kind: str, fill: Callable[[_Hashed], tuple[ChangedTensor, ...]],
        base: WeightManifest | None = None,
    ) -> Path:  # fmt: skip
        final = self.root / f"{manifest.version:06d}-{kind}"
        if final.exists():
            raise ValueError(f"{final}: there already; versions grow, or use a new folder")
        temporary = self.root / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            with (temporary / _DATA).open("wb") as handle:
                file = _Hashed(handle)
                changed = fill(file)
                handle.flush()
                os.fsync(handle.fileno())
            facts = DiskUpdate(
                manifest=manifest, digest=weights_digest(manifest), size_bytes=file.size, data_hash=file.hexdigest(),
                changed=changed, base_version=None if base is None else base.version,
                base_digest="" if base is None else weights_digest(base),
            )  # fmt: skip
            with (temporary / _FACTS).open("wb") as handle:
                handle.write(msgspec.json.format(msgspec.json.encode(facts), indent=1))
                handle.flush()
                os.fsync(handle.fileno())
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def prune(self, keep_from: int) -> None:
        """Delete links that no reader at `keep_from` or later needs: those before the last full update not after it."""
        links = self.links()
        full = [version for version, path in links.items() if path.name.endswith("-full") and version <= keep_from]
        for version, path in links.items():
            if full and version < full[-1]:
                doomed = path.with_name(f".tmp-{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)

    # ---- reading

    def chain(self, version: int, held: int | None) -> list[int]:
        """The versions to apply, in order, to come from `held` (None: from nothing) to `version`.

        Raises ValueError when the chain has a gap.
        """
        steps: list[int] = []
        at: int | None = version
        while at is not None and at != held:
            steps.append(at)
            facts = self.read(at)
            if facts.base_version is not None and facts.base_version >= at:
                raise ValueError(f"{self.root}: version {at} is based on {facts.base_version}, which is no chain")
            at = facts.base_version
        return steps[::-1]

    def load(
        self, version: int, held_version: int, held: Mapping[str, Tensor] | None, held_digest: str
    ) -> tuple[WeightManifest, Tensor]:
        """The manifest of `version` and its stream on the CPU.

        `held` are the weights of the reader, whose digest is `held_digest`; deltas are applied to them where the chain leads
        there. Every file is checked against its hash, every link against the digest of what it is applied to. Raises
        ValueError naming the link at fault: a stale base, a gap, a damaged file.
        """
        steps = self.chain(version, held_version if held is not None else None)
        first = self.read(steps[0])
        stream, digest = torch.empty(0, dtype=torch.uint8), held_digest
        if first.base_version is not None:
            if held is None:
                raise ValueError(f"{self.root}: version {version} is a delta and this engine cannot show what it holds")
            if first.base_digest != held_digest:
                raise ValueError(
                    f"{self.root}: the delta of version {steps[0]} applies to other weights of version {first.base_version} than "
                    f"this engine holds (a stale base: {first.base_digest[:12]}, held {held_digest[:12]}); publish a full update"
                )
            stream = _stream_of(first.manifest, held)
        for step in steps:
            facts = self.read(step)
            if facts.base_version is not None and facts.base_digest != digest:
                raise ValueError(
                    f"{self.root}: the delta of version {step} applies to other weights than version {facts.base_version} has"
                )
            stream = self._apply(facts, step, stream)
            digest = facts.digest
        return self.read(version).manifest, stream

    def _apply(self, facts: DiskUpdate, version: int, stream: Tensor) -> Tensor:
        file = self.links()[version] / _DATA
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        if len(data) != facts.size_bytes or xxhash.xxh3_128_hexdigest(data) != facts.data_hash:
            raise ValueError(f"{file}: damaged: {len(data)} bytes, its hash is not the one stated; publish again")
        where = layout(facts.manifest)
        if facts.base_version is None:
            if len(data) != where.total_bytes:
                raise ValueError(f"{file}: {len(data)} bytes, its tensors take {where.total_bytes}")
            return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        zstd, places = delta.decompressor(), {spec.name: number for number, spec in enumerate(facts.manifest.tensors)}
        for changed in facts.changed:
            if changed.name not in places:
                raise ValueError(f"{file}: changes {changed.name}, which is not in its manifest")
            spec = facts.manifest.tensors[places[changed.name]]
            start, size = where.offsets[places[changed.name]], where.sizes[places[changed.name]]
            wanted, step = delta.num_chunks(size, spec.dtype), delta.chunk_bytes(spec.dtype)
            if len(changed.chunks) != wanted:
                raise ValueError(f"{file}: {changed.name} has {len(changed.chunks)} chunks, not {wanted}")
            for number, (offset, length) in enumerate(changed.chunks):
                at = number * step
                part = stream[start + at : start + min(size, at + step)]
                try:
                    part.copy_(delta.decode(data[offset : offset + length], part, spec.dtype, zstd))
                except ValueError as error:
                    raise ValueError(f"{file}: {changed.name}: {error}") from None
        return stream


class _Hashed:
    """A file being written, its size and hash so far."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: Any) -> None:
        self._handle.write(data)
        self._digest.update(data)
        self.size += memoryview(data).nbytes

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())


def to_stream(manifest: WeightManifest, tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The stream of a manifest's tensors, given in its order, on the CPU, and their checksums, int64 [n]."""
    where = layout(manifest)
    stream = torch.zeros(where.total_bytes, dtype=torch.uint8)
    packer = Packer(where, tensors, window_bytes(where.total_bytes), "cpu")
    for _ in packer.windows(lambda number: stream):
        pass
    return stream, packer.checksums()


def _stream_of(manifest: WeightManifest, held: Mapping[str, Tensor]) -> Tensor:
    missing = sorted(spec.name for spec in manifest.tensors if spec.name not in held)
    if missing:
        raise ValueError(f"weight update: the engine does not hold {', '.join(missing[:5])}")
    return to_stream(manifest, (held[spec.name] for spec in manifest.tensors))[0]
