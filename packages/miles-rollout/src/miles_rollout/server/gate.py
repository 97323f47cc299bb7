"""Where requests wait while generation is paused, and how one ends that is aborted there."""

from __future__ import annotations

import asyncio

from miles_rollout.wire import Completion, GenerateChunk, GenerateRequest, GenerateResult


class Gate:
    """Open or shut. Requests that wait before it are no engine's yet: they hold nothing and are aborted here."""

    def __init__(self) -> None:
        self._go = asyncio.Event()
        self._go.set()
        self._held: dict[str, asyncio.Future[None]] = {}

    @property
    def num_held(self) -> int:
        """Requests that wait."""
        return len(self._held)

    def shut(self) -> None:
        """Let nothing pass."""
        self._go.clear()

    def open(self) -> None:
        """Let everything pass."""
        self._go.set()

    async def passes(self, request_id: str) -> bool:
        """Wait until the gate is open; False when the request was aborted first."""
        if self._go.is_set():
            return True
        turn = self._held[request_id] = asyncio.get_running_loop().create_future()
        go = asyncio.ensure_future(self._open())
        try:
            await asyncio.wait({turn, go}, return_when=asyncio.FIRST_COMPLETED)
            return not turn.done()
        finally:
            go.cancel()
            del self._held[request_id]

    async def _open(self) -> None:
        while not self._go.is_set():  # it may be shut again before we run
            await self._go.wait()

    def abort(self, request_id: str) -> bool:
        """End a request that waits here; False when none of that id does."""
        turn = self._held.get(request_id)
        if turn is not None and not turn.done():
            turn.set_result(None)
        return turn is not None


def aborted_result(request: GenerateRequest, contract_digest: str) -> GenerateResult:
    """What a request is answered that was aborted before it began."""
    completions = tuple(
        Completion(
            sample_id=sample_id, index=index, token_ids=(), logprobs=(), sampled_logprobs=(), text="", finish_reason="abort"
        )
        for index, sample_id in enumerate(_sample_ids(request))
    )  # fmt: skip
    return GenerateResult(request_id=request.request_id, completions=completions, contract_digest=contract_digest)


def aborted_chunks(request: GenerateRequest, weight_version: int) -> list[GenerateChunk]:
    """The same for a stream."""
    return [
        GenerateChunk(
            request_id=request.request_id, sample_id=sample_id, index=index, token_ids=(), logprobs=(), sampled_logprobs=(),
            text="", weight_version=weight_version, finish_reason="abort",
        )
        for index, sample_id in enumerate(_sample_ids(request))
    ]  # fmt: skip


def _sample_ids(request: GenerateRequest) -> tuple[int, ...]:
    return request.sample_ids or tuple(range(request.sampling.n))
