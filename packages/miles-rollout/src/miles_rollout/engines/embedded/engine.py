"""The asyncio front of the embedded engine: one thread steps, event loops enqueue and await."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_args

import torch

from miles_kernels.nn.decoder import Decoder
from miles_rollout.engine import EngineRefusal, PauseMode
from miles_rollout.engines.embedded.admission import Limits, check_request
from miles_rollout.engines.embedded.config import DRAFT_PREFIX, EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.profile import Profile
from miles_rollout.engines.embedded.reply import EngineFailure, Reply
from miles_rollout.engines.embedded.room import device_of, num_pages_of
from miles_rollout.engines.embedded.state import Delivery, Job
from miles_rollout.engines.embedded.weights import check_manifest, dtype_name, stage
from miles_rollout.text import Tokenizer
from miles_rollout.waits import expired
from miles_rollout.wire import EngineInfo, GenerateChunk, GenerateRequest, GenerateResult, WeightManifest
from miles_spec.draft import Draft
from miles_spec.models.base import DraftModel

Result = TypeVar("Result")
_REFUSALS = (ValueError, MemoryError, torch.OutOfMemoryError)
_LIVENESS_S = 2.0
"""How often a waiter looks whether the engine thread still lives."""
_GRACE_S = 30.0
"""How long a closing engine waits for its thread before it ends what the thread may be waiting for: other ranks."""
_CLOSE_S = 150.0
"""How long after that: a device gets `flight.DEADLINE_S` for a step."""


class EmbeddedEngine:
    """Paged, continuously batched generation inside this process.

    Implements `Engine`, `PausableEngine` and `MemoryEngine` of `miles_rollout.engine`.

    The decoder belongs to the engine from now on: weight updates are copied into it. Requests may come from several event
    loops; those queued before the loop's next turn (a whole `asyncio.gather`) enter the same step. Prompt log-probabilities
    are stated at the request's temperature, like those of its completions, and at 1 when it is 0. `draft` is used instead of
    the one that `config.draft` names.

    A model that no single device holds comes as a decoder on the meta device, where `tensor_parallel` divides it: `device` is the
    first rank's, and the (HF name, tensor) pairs `weights` are read once, a bucket at a time. Without them the weights are zero
    until the first update.

    Raises ValueError for settings out of range or a KV budget without room for a page.

    Example:
        async with EmbeddedEngine(decoder, tokenizer) as engine:
            result = await engine.generate(GenerateRequest(request_id="a", input_ids=(5, 9)))
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        config: EmbeddedConfig | None = None,
        *,
        model: str = "",
        weight_version: int = 0,
        eos_token_ids: tuple[int, ...] | None = None,
        draft: Draft | DraftModel | None = None,
        device: torch.device | str | None = None,
        weights: Iterable[tuple[str, Any]] | None = None,
    ) -> None:
        config = config or EmbeddedConfig()
        config.validate()
        where = device_of(decoder, config, device, weights)
        page_size = config.page_size_on(where.type)
        num_pages = num_pages_of(decoder, config, page_size, draft)
        max_context = min(config.max_context or decoder.config.max_position_embeddings, decoder.config.max_position_embeddings)
        eos = tuple(sorted({*decoder.config.eos_token_ids, *tokenizer.eos_token_ids})) if eos_token_ids is None else eos_token_ids
        self.config = config
        self.tokenizer = tokenizer
        records_experts = config.record_routed_experts or decoder.config.num_experts == 0
        self._limits = Limits(
            decoder.config.vocab_size, max_context, page_size, num_pages, records_experts, not config.draft_tree
        )
        self._held = {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in decoder.hf_state()}
        self._digest = decoder.contract.digest
        self._decoder = decoder
        self.device = where
        self._model = model
        self._version = weight_version
        self._eos = frozenset(eos)
        self._core: EngineCore | None = None
        if config.tensor_parallel == 1:
            self._core = EngineCore(decoder, tokenizer, config, num_pages=num_pages, weight_version=weight_version, draft=draft)
        else:
            from miles_rollout.engines.embedded.lead import lead

            core = lead(
                decoder, tokenizer, config, num_pages=num_pages, weight_version=weight_version, device=where, weights=weights
            )
            self._core, self._decoder, self._digest = core, core.decoder, core.decoder.contract.digest
        drafted = dict(self._core.draft_state())
        self._held_draft = {DRAFT_PREFIX + n: (tuple(t.shape), dtype_name(t.dtype)) for n, t in drafted.items()}
        self._metrics = self._core.metrics()
        self._arrivals = itertools.count()
        self._lock = threading.Condition()
        self._pending: list[Callable[[EngineCore], None]] = []
        self._inbox: deque[Callable[[EngineCore], None]] = deque()
        self._replies: dict[str, Reply] = {}
        self._waits: set[concurrent.futures.Future[None]] = set()
        self._updating = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._paused = False
        self._profile: Profile | None = None
        self._failure: BaseException | None = None

    async def __aenter__(self) -> EmbeddedEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request. Cancelling the call aborts the request.

        Raises EngineRefusal for what can never be served, EngineFailure when the engine has died or is closed.
        """
        with self._submitted(request, stream=False) as reply:
            result = await self._next(reply)
        assert isinstance(result, GenerateResult)
        return result

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """The same, token by token. Closing the iterator aborts the request. A slow reader never holds up the engine."""
        with self._submitted(request, stream=True) as reply:
            while isinstance(item := await self._next(reply), GenerateChunk):
                yield item

    async def abort(self, request_id: str) -> bool:
        """End a request now; its completions finish with reason "abort". False when it is not running."""
        with self._lock:
            if request_id not in self._replies:
                return False
        await self._command(lambda core: self._dispatch(core.abort(request_id)))
        return True

    async def update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        """Stage, verify, swap between two steps; see `Engine.update_weights` for what is refused.

        `tensors` is consumed one at a time in a worker thread; staging holds one copy of the model at most, of each rank's part
        and a bucket where the model is divided. Running requests
        go on under the new version after their keys and values have been computed again.
        """
        await asyncio.to_thread(self._update_weights, manifest, tensors)

    async def pause(self, mode: PauseMode = "in_place") -> int:
        """Make no token until `resume`; the number of requests held. New requests are taken and wait.

        "abort" ends what runs with what it has, "retract" frees its keys and values, "in_place" keeps them. Raises ValueError
        for another mode.
        """
        if mode not in get_args(PauseMode):
            raise ValueError(f"pause mode {mode!r} must be one of {', '.join(get_args(PauseMode))}")

        def hold(core: EngineCore) -> None:
            self._paused = True
            if mode == "abort":
                for request_id in list(self._replies):
                    self._dispatch(core.abort(request_id))
            self._dispatch(core.retract_all() if mode == "retract" else core.settle())

        await self._command(hold)
        return len(self._replies)

    async def resume(self) -> None:
        """Go on after `pause`. Harmless when not paused."""

        def go_on(core: EngineCore) -> None:
            self._paused = False

        await self._command(go_on)

    async def start_profile(self, directory: str) -> None:
        """Record what the engine thread and its device do from now on."""

        def start(core: EngineCore) -> None:
            if self._profile is not None:
                raise ValueError("a profile is being recorded; stop it first")
            self._profile = Profile(directory, self.device)

        await self._refusable(start)

    async def stop_profile(self) -> str:
        """Write the trace; its path."""
        found: list[str] = []

        def stop(core: EngineCore) -> None:
            if self._profile is None:
                raise ValueError("no profile is being recorded")
            profile, self._profile = self._profile, None
            found.append(profile.stop())

        await self._refusable(stop)
        return found[0]

    async def flush_cache(self) -> bool:
        """Forget cached prefixes; False, and nothing done, while any request is unfinished."""
        found: list[bool] = []
        await self._command(lambda core: found.append(core.flush()))
        return found[0]

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give back what `tags` of MEMORY_TAGS name; requests wait until it is there again.

        Raises ValueError for an unknown or already released tag, or while sequences hold keys and values.
        """
        await self._refusable(lambda core: core.release(tags))

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it back. After "weights" requests wait for the next update. Raises ValueError for a tag not released."""
        await self._refusable(lambda core: core.restore(tags))

    @property
    def awaits_weights(self) -> bool:
        """Whether "weights" were taken back and no update has come since: requests wait for one."""
        return self._core is not None and "new weights" in self._core.released

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of the weights held, a draft model's under "draft."; do not change them or keep them over an update.

        Raises ValueError where they are divided over several processes: those take whole updates only.
        """
        if self.config.tensor_parallel > 1:
            raise ValueError(f"the weights are divided over {self.config.tensor_parallel} processes; send a full update")
        for name, tensor in self._decoder.hf_state():
            yield name, tensor.detach()
        core = self._core
        for name, tensor in () if core is None else core.draft_state():
            yield DRAFT_PREFIX + name, tensor

    @property
    def failure(self) -> str | None:
        """Why it will never generate again; None while it may."""
        error = self._failure
        return None if error is None else f"{type(error).__name__}: {error}"

    def info(self) -> EngineInfo:
        """Model, contract digest, weight version, limits."""
        return EngineInfo(
            model=self._model,
            contract_digest=self._digest,
            weight_version=self._version,
            vocab_size=self._limits.vocab_size,
            max_context=self._limits.max_context,
            max_running=self.config.max_running,
            eos_token_ids=tuple(sorted(self._eos)),
        )

    @property
    def cache_pages(self) -> tuple[int, int]:
        """How many pages of keys and values there are, and the tokens of one."""
        return self._limits.num_pages, self._limits.page_size

    def metrics(self) -> dict[str, float]:
        """Counters and gauges since start; after `close`, the last ones."""
        core = self._core
        if core is not None:
            self._metrics = core.metrics()
        return dict(self._metrics)

    async def close(self) -> None:
        """Abort what runs, stop the thread, free the KV cache. Idempotent."""
        await asyncio.to_thread(self._close)
        await asyncio.sleep(0)  # lets waiters of this loop see their aborted results first

    # ------------------------------------------------------------------ event loop side

    @contextlib.contextmanager
    def _submitted(self, request: GenerateRequest, *, stream: bool) -> Iterator[Reply]:
        """Queue a request; leaving before its result has arrived aborts it."""
        check_request(request, self._limits)
        if self.config.verification == "greedy" and request.sampling.temperature != 0:
            raise EngineRefusal(
                f"temperature {request.sampling.temperature}: this engine verifies drafts greedily, which is for temperature 0; "
                "start it with verification gumbel"
            )
        reply = Reply(request.request_id, asyncio.get_running_loop())
        with self._lock:
            self._check_alive()
            if request.request_id in self._replies:
                raise EngineRefusal(f"request {request.request_id!r} is running already; give every request an id of its own")
            self._replies[request.request_id] = reply
            job = Job(request, next(self._arrivals), self._eos, stream)
            self._pending.append(lambda core: core.add(job))
        reply.loop.call_soon(self._wake)  # after everything that is ready to run in this loop has queued its requests
        try:
            yield reply
        finally:
            with self._lock:
                unfinished = self._replies.get(reply.request_id) is reply
            if unfinished:
                self._post(lambda core: self._dispatch(core.abort(reply.request_id)))

    async def _next(self, reply: Reply) -> GenerateResult | GenerateChunk:
        """What arrives next for a request; a dead engine thread is noticed."""
        while (item := await reply.next(_LIVENESS_S)) is None:
            if self._is_dead() and (item := await reply.next(0.1)) is None:
                raise EngineFailure("the engine thread has ended without a word") from self._failure
        return item

    async def _command(self, command: Callable[[EngineCore], None]) -> None:
        """Run something on the engine thread, between steps, and wait for it."""
        await asyncio.to_thread(self._run_command, command)

    async def _refusable(self, command: Callable[[EngineCore], None]) -> None:
        """`_command` for something that may refuse, or find no memory, which must not end the engine."""
        await asyncio.to_thread(self._ask, command)

    # ------------------------------------------------------------------ any thread

    def _post(self, command: Callable[[EngineCore], None]) -> None:
        with self._lock:
            self._pending.append(command)
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if not self._pending or self._closing or self._failure is not None:
                return
            self._inbox.extend(self._pending)
            self._pending.clear()
            self._start_thread()
            self._lock.notify()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
            self._thread.start()

    def _is_dead(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def _ask(self, command: Callable[[Any], Result], kinds: tuple[type[Exception], ...] = _REFUSALS) -> Result:
        """Run something on the engine thread that may refuse, or find no memory, which must not end the engine."""
        found: list[Result] = []
        refusal: list[Exception] = []

        def run(core: EngineCore) -> None:
            try:
                found.append(command(core))
            except kinds as error:
                refusal.append(error)

        self._run_command(run)
        if refusal:
            raise refusal[0]
        return found[0]

    def _run_command(self, command: Callable[[EngineCore], None]) -> None:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run(core: EngineCore) -> None:
            try:
                command(core)
            except BaseException as error:
                done.set_exception(error)
                raise
            done.set_result(None)

        with self._lock:
            self._check_alive()
            self._waits.add(done)
        try:
            self._post(run)
            while not done.done():
                concurrent.futures.wait([done], timeout=_LIVENESS_S)
                if not done.done() and self._is_dead():
                    raise EngineFailure("the engine thread has ended") from self._failure
            done.result()
        finally:
            self._waits.discard(done)

    def _update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        with self._updating:
            with_draft = any(spec.name.startswith(DRAFT_PREFIX) for spec in manifest.tensors)
            held = self._held | (self._held_draft if with_draft else {})
            check_manifest(manifest, held, version=self._version, contract_digest=self._digest)
            bring = self._staged(manifest, tensors) if self.config.tensor_parallel == 1 else self._fed(manifest, tensors)

            def swap(core: EngineCore) -> None:
                self._dispatch(core.settle())  # first: a refusal below must not take finished requests with it
                self._dispatch(bring(core))
                self._version = manifest.version

            self._ask(swap, (ValueError,))  # another rank got other bytes; nothing has changed

    def _staged(self, manifest: WeightManifest, tensors: Any) -> Callable[[Any], list[Delivery]]:
        """Stage the whole model here; what swaps it in."""
        staged = stage(manifest, tensors, self.device)
        return lambda core: core.swap_weights(staged, manifest.version)

    def _fed(self, manifest: WeightManifest, tensors: Any) -> Callable[[Any], list[Delivery]]:
        """Have every rank stage its part, a bucket at a time, between steps; what swaps it in."""
        from miles_rollout.engines.embedded.feed import feed

        stated = feed(manifest, tensors, self._ask)
        return lambda core: core.finish_update(stated)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineFailure(f"the engine has failed: {self._failure}") from self._failure
        if self._closing:
            raise EngineFailure("the engine is closed")

    def _close(self) -> None:
        with self._lock:
            self._closing = True
            self._inbox.extend(self._pending)
            self._pending.clear()
            if self._inbox and self._failure is None:
                self._start_thread()  # so that whoever waits is told
            self._lock.notify()
            thread = self._thread
        if thread is not None:
            self._join(thread)
        with self._lock:
            self._finish_closing()

    def _join(self, thread: threading.Thread) -> None:
        """Wait for the engine thread to leave its step; raises WaitExpired when it stays, other ranks gone or not."""
        core = self._core
        thread.join(_GRACE_S)
        if thread.is_alive() and core is not None:
            core.interrupt()
            thread.join(_CLOSE_S)
        if thread.is_alive():
            raise expired("the embedded engine's thread to leave its step", _GRACE_S + _CLOSE_S)

    # ------------------------------------------------------------------ engine thread

    def _run(self) -> None:
        core = self._core
        assert core is not None
        try:
            with torch.inference_mode():
                while self._next_commands(core):
                    self._dispatch(core.step())
                for request_id in list(self._replies):
                    self._dispatch(core.abort(request_id))
        except BaseException as error:
            self._fail(error)

    def _next_commands(self, core: EngineCore) -> bool:
        """Wait for something to do and carry out what was posted; False when the engine is to stop."""
        while True:
            with self._lock:
                while not (self._inbox or self._closing or (core.has_work and not self._paused)):
                    self._lock.wait()
                commands = list(reversed(self._inbox))
                self._inbox.clear()
            while commands:
                commands.pop()(core)  # not kept while waiting for the next: it may hold weights
            if self._closing:
                return False
            if core.has_work and not self._paused:
                return True

    def _dispatch(self, deliveries: list[Delivery]) -> None:
        """Hand results over, one wake-up per event loop."""
        if not deliveries:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Reply, Any]]] = {}
        with self._lock:
            for job, item in deliveries:
                request_id = job.request.request_id
                last = not isinstance(item, GenerateChunk)
                reply = self._replies.pop(request_id) if last else self._replies[request_id]
                by_loop.setdefault(reply.loop, []).append((reply, item))
        for loop, items in by_loop.items():
            Reply.deliver(loop, items)

    def _fail(self, error: BaseException) -> None:
        """The engine is broken: everybody who waits is told why."""
        with self._lock:
            self._failure = error
            replies, self._replies = list(self._replies.values()), {}
            waits = list(self._waits)
        for reply in replies:
            Reply.deliver(reply.loop, [(reply, EngineFailure(f"the engine has failed: {type(error).__name__}: {error}", error))])
        for done in waits:
            if not done.done():
                done.set_exception(EngineFailure(f"the engine has failed: {error}", error))

    def _finish_closing(self) -> None:
        if self._core is not None:
            self._metrics = self._core.metrics()
            self._core.close()
        self._core = None
