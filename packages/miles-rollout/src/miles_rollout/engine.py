"""The one protocol every rollout engine speaks. The heavy classes are named in their adapters only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from miles_rollout.wire import EngineInfo, GenerateChunk, GenerateRequest, GenerateResult, WeightManifest

PauseMode = Literal["abort", "retract", "in_place"]
"""abort: running requests end. retract: their keys and values are freed and computed again. in_place: both are kept."""
MEMORY_TAGS = ("weights", "kv_cache", "cuda_graph")


class EngineRefusal(ValueError):
    """A request the engine can never serve (too long, bad token id, bad sampling); says what to change."""


@runtime_checkable
class Engine(Protocol):
    """Generate, update weights, report. All methods may be called from one event loop, concurrently.

    Errors: `EngineRefusal` for a request that can never fit; it is raised before anything is queued.
    """

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request. Cancelling the call aborts the request."""
        ...

    def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """The same, token by token. Closing the iterator aborts the request."""
        ...

    async def abort(self, request_id: str) -> bool:
        """End a request now; its completions finish with reason "abort". False when it is not running."""
        ...

    async def update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        """Stage, verify, swap: after this returns, every new token is sampled under `manifest.version`.

        `tensors` yields (HF name, torch tensor). Raises ValueError and keeps the old weights when a tensor is missing,
        unexpected, misshaped or does not hash to what the manifest states, when the contract digests differ, or when
        the version does not grow. The prefix cache is dropped on success.
        """
        ...

    def info(self) -> EngineInfo:
        """Model, contract digest, weight version, limits."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counters and gauges since start, flat names ("num_generated_tokens", "kv_used_ratio", ...)."""
        ...

    async def close(self) -> None:
        """Abort what runs and release everything. Idempotent."""
        ...


@runtime_checkable
class PausableEngine(Protocol):
    """An engine that can hold running requests between two tokens. Without it a server can pause with mode abort only."""

    async def pause(self, mode: PauseMode) -> int:
        """No token is made after this returns; the number of requests that are held. Raises ValueError for a mode it lacks."""
        ...

    async def resume(self) -> None:
        """Go on. Harmless when not paused."""
        ...


@runtime_checkable
class MemoryEngine(Protocol):
    """An engine that can give device memory back while nothing runs."""

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Free what `tags` of MEMORY_TAGS name. Raises ValueError for an unknown or already released tag, or while busy."""
        ...

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it back; contents of "weights" are undefined until the next update. Raises ValueError for a tag not released."""
        ...


@runtime_checkable
class AwaitingEngine(Protocol):
    """An engine whose requests wait where its weights are undefined."""

    @property
    def awaits_weights(self) -> bool:
        """Whether "weights" were taken back and no update has come since: requests wait for one."""
        ...


@runtime_checkable
class ProfilableEngine(Protocol):
    """An engine that can record a trace of what it does."""

    async def start_profile(self, directory: str) -> None:
        """Record from now on. Raises ValueError when a profile is being recorded, or cannot be."""
        ...

    async def stop_profile(self) -> str:
        """Write the trace under the directory named at the start; its path. Raises ValueError when nothing is recorded."""
        ...


@runtime_checkable
class MortalEngine(Protocol):
    """An engine that knows when it can only be started anew."""

    @property
    def failure(self) -> str | None:
        """Why it will never generate again; None while it may."""
        ...


@runtime_checkable
class DiskUpdatableEngine(Protocol):
    """An engine that reads a directory of safetensors itself, in another process or on another device."""

    async def update_weights_from_disk(self, directory: str, version: int) -> None:
        """As `Engine.update_weights`, from files. Raises ValueError naming the tensor or file at fault; old weights stay."""
        ...
