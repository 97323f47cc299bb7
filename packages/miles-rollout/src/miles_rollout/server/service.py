"""What all routes share: the engine, the requests that are running, and the door that closes when the server drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import msgspec
from starlette.requests import Request

from miles_rollout.engine import AwaitingEngine, Engine, PausableEngine, PauseMode
from miles_rollout.server.errors import RequestError
from miles_rollout.server.figures import Timings
from miles_rollout.server.gate import Gate, aborted_chunks, aborted_result
from miles_rollout.server.params import read_object
from miles_rollout.text import Tokenizer
from miles_rollout.wire import GenerateChunk, GenerateRequest, GenerateResult, WeightManifest

logger = logging.getLogger("miles_rollout.server")
WeightLoader = Callable[[str, int, str], tuple[WeightManifest, Iterable[tuple[str, Any]]]]
"""(directory, version, contract digest) to what `Engine.update_weights` takes; raises ValueError naming file and tensor."""


@runtime_checkable
class FlushableEngine(Protocol):
    """An engine whose prefix cache can be emptied between requests."""

    async def flush_cache(self) -> bool:
        """Forget all cached prefixes; False when requests are running and nothing was done."""
        ...


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and rights of the HTTP service.

    Example: ServerConfig(served_model_name="policy", admin_token="secret")
    """

    served_model_name: str | None = None
    """The name under /v1; the engine's own model name when not given."""
    admin_token: str | None = None
    """With a token, admin endpoints want `Authorization: Bearer TOKEN`; without, they answer callers on loopback only."""
    max_body_bytes: int = 32 << 20
    max_completions: int = 1024
    """Most completions one HTTP request may ask for, prompts times n."""
    max_requests: int = 4096
    """Prompts served at a time, waiting ones included; one more is answered 429."""
    max_tokens: int = 16 << 20
    """Most tokens one HTTP request may use: its prompts, and n times max_new_tokens of each."""
    request_s: float = 3600.0
    """Deadline of a request; then it is aborted and answered 504, or its stream ends with an error."""
    body_s: float = 60.0
    """How long the body of a request may take to arrive."""
    drain_s: float = 30.0
    """After SIGTERM or Ctrl-C: how long running requests may take to finish before they are aborted."""
    health_s: float = 20.0
    """How long /health_generate waits for its one token."""
    weight_roots: tuple[str, ...] | None = None
    """Directories that weight updates may be read from, with everything below them; None leaves it to `load_weights`."""
    profile_dir: str | None = None
    """Where traces of /start_profile go; None refuses them."""

    def validate(self) -> None:
        """Raise ValueError naming every setting outside its range."""
        low = {"max_body_bytes": 1, "max_completions": 1, "max_requests": 1, "max_tokens": 1}
        wrong = [
            f"{name}={getattr(self, name)} must be at least {least}" for name, least in low.items() if getattr(self, name) < least
        ]
        seconds = ("request_s", "body_s", "health_s")
        wrong += [f"{name}={getattr(self, name)} must be above 0" for name in seconds if not getattr(self, name) > 0]
        if not self.drain_s >= 0:
            wrong.append(f"drain_s={self.drain_s} must not be negative")
        if self.admin_token is not None and not self.admin_token.strip():
            wrong.append("admin_token is empty; leave it out, or give a secret")
        if wrong:
            raise ValueError("server: " + "; ".join(wrong))


class Service:
    """The engine as the routes see it. `num_replies[(route, status)]` counts for /metrics."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, config: ServerConfig, load_weights: WeightLoader | None = None
    ) -> None:
        config.validate()
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.load_weights = load_weights
        self.draining = False
        self.updating = asyncio.Lock()
        self.num_replies: Counter[tuple[str, int]] = Counter()
        self.weight_routes: dict[str, str] = {}
        """Path to summary of the endpoints that `transfer.accept_weights` adds."""
        self.timings = Timings()
        self.paused: PauseMode | None = None
        self.profile_end: asyncio.TimerHandle | None = None
        """When the profile that is being recorded ends by itself."""
        self.profile_task: asyncio.Future[None] | None = None
        self.released: set[str] = set()
        self.gate = Gate()
        self._running: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model_name(self) -> str:
        """The name this server gives its model under /v1."""
        return self.config.served_model_name or self.engine.info().model

    @property
    def resting(self) -> str:
        """Why no token is made, where that is meant to be; empty when one should be."""
        if self.draining:
            return "it is shutting down"
        if self.paused is not None:
            return "it is paused"
        if self.released:
            return f"the memory of {', '.join(sorted(self.released))} is released"
        if isinstance(self.engine, AwaitingEngine) and self.engine.awaits_weights:
            return "its weights were released and it waits for a weight update"
        return ""

    @property
    def running(self) -> frozenset[str]:
        """Ids of the requests that are being served."""
        return frozenset(self._running)

    def need_tokenizer(self, field: str) -> Tokenizer:
        """The tokenizer; raises RequestError naming `field` when this server has none."""
        if self.tokenizer is None:
            raise RequestError(f'"{field}" is text and this server has no tokenizer; send input_ids', param=field)
        return self.tokenizer

    async def read(self, request: Request) -> dict[str, Any]:
        """The JSON object in a request's body. Raises RequestError 400, 408 when it comes too slowly, 413 for too much."""
        return await read_object(request, self.config.max_body_bytes, self.config.body_s)

    def check_size(self, num_prompts: int, n: int) -> None:
        """Raise RequestError when one HTTP request asks for too many completions."""
        if num_prompts * n > self.config.max_completions:
            limit = self.config.max_completions
            raise RequestError(f"{num_prompts} prompts times n={n} is over this server's limit of {limit}", param="n")

    def _need_memory(self) -> None:
        if self.released:
            raise RequestError(f"the memory of {', '.join(sorted(self.released))} is released; resume it first", status=503)

    @contextlib.contextmanager
    def admit(self, requests: Iterable[GenerateRequest]) -> Iterator[None]:
        """Hold the requests' ids while they are served. Raises RequestError for an id in use and while draining."""
        if self.draining:
            raise RequestError("this server is shutting down and takes no new requests", status=503)
        self._need_memory()
        requests = list(requests)
        if len(self._running) + len(requests) > self.config.max_requests:
            raise RequestError(f"this server is serving {len(self._running)} requests already; try again later", status=429)
        size = sum(len(each.input_ids) + each.sampling.n * each.sampling.max_new_tokens for each in requests)
        if size > self.config.max_tokens:
            raise RequestError(f"prompts and completions are {size} tokens; this server's limit is {self.config.max_tokens}")
        ids: set[str] = set()
        for request in requests:
            check_ranges(request)
            if request.request_id in ids or request.request_id in self._running:
                raise RequestError(f'request id "{request.request_id}" is already in use', param="rid")
            ids.add(request.request_id)
        self._running |= ids
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= ids
            if not self._running:
                self._idle.set()

    async def generate(self, requests: list[GenerateRequest]) -> list[GenerateResult]:
        """All results, in order. The first failure, and cancelling the call, abort the others. Raises RequestError 504."""
        started = time.perf_counter()
        with self.admit(requests):
            tasks: list[asyncio.Future[GenerateResult]] = []
            try:
                async with asyncio.timeout(self.config.request_s):
                    if len(requests) == 1:  # by far the commonest: no task of its own
                        results = [await self._one(requests[0])]
                    else:
                        tasks += [asyncio.ensure_future(self._one(request)) for request in requests]
                        results = list(await asyncio.gather(*tasks))
            except TimeoutError:
                raise self._too_late() from None
            finally:
                await cancel_all(tasks)
        self.timings.whole(time.perf_counter() - started, len(requests))
        return results

    async def stream(self, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
        """(request number, chunk) of all requests as they come. Closing the iterator aborts what still runs."""
        with self.admit(requests):
            clock = self.timings.stream(len(requests))
            deadline = asyncio.get_running_loop().time() + self.config.request_s
            source = self._merged(requests) if len(requests) > 1 else self._single(requests[0])
            async with contextlib.aclosing(source) as chunks:
                try:
                    while True:
                        # One deadline per wait: a generator may be resumed by another task than began it.
                        async with asyncio.timeout_at(deadline):
                            item = await anext(chunks, None)
                        if item is None:
                            break
                        clock.token(len(item[1].token_ids))
                        yield item
                except TimeoutError:
                    raise self._too_late() from None
            clock.end()

    async def _begins(self, request: GenerateRequest) -> bool:
        """Wait while generation is paused; False when the request was aborted meanwhile. Raises RequestError without memory."""
        if not await self.gate.passes(request.request_id):
            return False
        self._need_memory()
        return True

    async def _one(self, request: GenerateRequest) -> GenerateResult:
        if await self._begins(request):
            return await self.engine.generate(request)
        return aborted_result(request, self.engine.info().contract_digest)

    async def _single(self, request: GenerateRequest) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
        if not await self._begins(request):
            for chunk in aborted_chunks(request, self.engine.info().weight_version):
                yield 0, chunk
            return
        async with contextlib.aclosing(_generator(self.engine.stream(request))) as chunks:
            async for chunk in chunks:
                yield 0, chunk

    async def _merged(self, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
        queue: asyncio.Queue[tuple[int, GenerateChunk | Exception | None]] = asyncio.Queue(maxsize=4 * len(requests))

        async def pump(number: int, request: GenerateRequest) -> None:
            end = None
            try:
                async with contextlib.aclosing(self._single(request)) as chunks:
                    async for _, chunk in chunks:
                        await queue.put((number, chunk))
            except Exception as error:  # carried over to whoever reads the queue
                end = error
            await queue.put((number, end))

        tasks = [asyncio.ensure_future(pump(i, request)) for i, request in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                number, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield number, item
        finally:
            await cancel_all(tasks)

    def _too_late(self) -> RequestError:
        why = f"; {self.resting}" if self.resting else ""
        return RequestError(f"not done within this server's limit of {self.config.request_s:g} s{why}", status=504)

    async def pause(self, mode: PauseMode) -> int:
        """Hold new requests, and what runs as `mode` says; the number held. Raises RequestError for a mode it lacks."""
        if isinstance(self.engine, PausableEngine):
            try:
                held = await self.engine.pause(mode)
            except ValueError as error:
                raise RequestError(str(error), param="mode") from None
        elif mode == "abort":
            held = 0
        else:
            raise RequestError(f'this engine cannot pause with mode "{mode}"; it can with "abort"', param="mode")
        self.paused = mode
        self.gate.shut()
        if mode == "abort":
            # what waits at the gate was told that it would go on, also by a pause before this one
            await asyncio.gather(*(self.engine.abort(i) for i in self._running))
        logger.info("generation is paused with mode %s; new requests wait", mode)
        return held

    async def resume(self) -> None:
        """Let requests go on. Harmless when not paused."""
        if isinstance(self.engine, PausableEngine):
            await self.engine.resume()
        if self.paused is not None:
            logger.info("generation goes on")
        self.paused = None
        self.gate.open()

    async def abort(self, request_id: str) -> None:
        """End a request, wherever it is. Harmless for an unknown one."""
        if not self.gate.abort(request_id):
            await self.engine.abort(request_id)

    async def abort_all(self) -> None:
        """Abort everything that runs or waits."""
        await asyncio.gather(*(self.abort(i) for i in self._running))

    async def close(self) -> None:
        """Close the engine."""
        await self.engine.close()

    async def drain(self) -> None:
        """Take nothing new, let running requests finish for `drain_s`, then abort them."""
        self.draining = True
        try:
            async with asyncio.timeout(self.config.drain_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests did not finish within %g s and are aborted", len(self._running), self.config.drain_s)
            await self.abort_all()


MAX_STOPS = 64
MAX_STOP_IDS = 4096


def check_ranges(request: GenerateRequest) -> None:
    """Raise RequestError for numbers no engine can hold: JSON has no largest integer, tensors do."""
    sampling = request.sampling
    for name, values, limit in (
        ("sample_ids", request.sample_ids, 2**63),
        ("stop_token_ids", sampling.stop_token_ids, 2**31),
        ("input_ids", request.input_ids, 2**31),
    ):
        if values and (min(values) < 0 or max(values) >= limit):
            wrong = min(values) if min(values) < 0 else max(values)
            raise RequestError(f"{name} holds {wrong}; values lie in 0..{limit - 1}", param=name)
    if len(sampling.stop) > MAX_STOPS or len(sampling.stop_token_ids) > MAX_STOP_IDS:
        raise RequestError(f"at most {MAX_STOPS} stop strings and {MAX_STOP_IDS} stop token ids", param="stop")
    if sampling.top_k >= 2**31:
        raise RequestError(f"top_k={sampling.top_k} is too large; -1 keeps all tokens", param="top_k")
    if sampling.temperature != 0.0 and not 1e-6 <= sampling.temperature <= 1e6:
        raise RequestError(f"temperature={sampling.temperature} must be 0 or lie in 1e-6..1e6", param="temperature")
    if sampling.top_p < 1e-6:
        raise RequestError(f"top_p={sampling.top_p} must be at least 1e-6", param="top_p")


def new_id() -> str:
    """A request id for a caller who gave none."""
    return uuid.uuid4().hex


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have let go of what they hold."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _generator(source: AsyncIterator[GenerateChunk]) -> Any:
    """An async generator over any async iterator, so that closing it reaches the engine's own cleanup."""
    try:
        async for chunk in source:
            yield chunk
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
