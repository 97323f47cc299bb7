"""The one protocol every rollout engine speaks. The heavy classes are named in their adapters only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol, runtime_checkable

from miles_rollout.wire import EngineInfo, GenerateChunk, GenerateRequest, GenerateResult, WeightManifest


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
