"""A rollout engine without a model, for tests of servers, clients, producers and plug-ins. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

from miles_rollout.engine import EngineRefusal
from miles_rollout.text import IncrementalDecoder, Tokenizer
from miles_rollout.wire import (
    Completion,
    EngineInfo,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    TopLogprobs,
    WeightManifest,
    WeightSpan,
)

if TYPE_CHECKING:
    from miles_rollout.engine import Engine
    from miles_rollout.server import ServerConfig
    from miles_rollout.server.service import WeightLoader


class ScriptedEngine:
    """Implements `Engine`. A token is a hash of (seed, sample id, position), its logprob an fp32 value below 0.

    At temperature 0 the seed counts for nothing, as it does in a real engine.

    `hold()` stops all requests before their next token, `release()` lets them go on: the moment of an abort, a
    disconnect or a weight update is then the test's choice. `finished` and `aborted` list request ids.

    Example: ScriptedEngine(CharTokenizer("0123456789"))
    """

    def __init__(
        self, tokenizer: Tokenizer, *, max_context: int = 512, model: str = "scripted", fail_after: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.model = model
        self.fail_after = fail_after
        """Raise RuntimeError after this many tokens of a completion."""
        self.version = 0
        self.started: list[str] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.closed = False
        self._hold_at: int | None = None
        self._live: set[str] = set()
        self._dropped: set[str] = set()
        self._go = asyncio.Event()
        self._go.set()
        self._changed = asyncio.Condition()

    def hold(self) -> None:
        """Let no request make another token."""
        self._go.clear()

    def hold_after(self, num_tokens: int) -> None:
        """Hold once `num_tokens` more tokens have been made."""
        self._hold_at = self.num_tokens + num_tokens

    async def release(self) -> None:
        """Let requests go on."""
        self._hold_at = None
        self._go.set()
        await self._tick()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until `condition()` holds; it is looked at whenever the engine has done something. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    def token(self, request: GenerateRequest, sample_id: int, position: int) -> tuple[int, float]:
        """(token id, logprob) at an absolute position: never a special id below 4, except eos now and then."""
        seed = request.sampling.seed if request.sampling.temperature else 0
        key = struct.pack("<QQQ", seed, sample_id % 2**64, position)
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        value = struct.unpack("<f", struct.pack("<f", -(digest % 9973) / 997.0 - 0.001))[0]
        eos = self.tokenizer.eos_token_ids
        if eos and digest % 23 == 0 and not request.sampling.ignore_eos:
            return eos[0], value
        return 4 + digest % (self.tokenizer.vocab_size - 4), value

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request."""
        parts: dict[int, list[GenerateChunk]] = {}
        async for chunk in self.stream(request):
            parts.setdefault(chunk.index, []).append(chunk)
        prompt = [0.0, *(self.token(request, -1, i)[1] for i in range(1, len(request.input_ids)))]
        return GenerateResult(
            request_id=request.request_id,
            completions=tuple(_join(parts[index]) for index in sorted(parts)),
            prompt_logprobs=tuple(prompt) if request.return_prompt_logprobs else None,
            cached_tokens=(len(request.input_ids) - 1) // 16 * 16,
            contract_digest=self.info().contract_digest,
        )

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Token by token, completion by completion in turn."""
        self._check(request)
        self._live.add(request.request_id)
        self.started.append(request.request_id)
        self.num_prompt_tokens += len(request.input_ids)
        ids = request.sample_ids or tuple(range(request.sampling.n))
        open_ = {i: _Growing(i, sample_id, self.tokenizer, request) for i, sample_id in enumerate(ids)}
        done = False
        try:
            for position in range(len(request.input_ids), len(request.input_ids) + request.sampling.max_new_tokens):
                await self._tick()
                await self._turn(request.request_id)
                for i in list(open_):
                    chunk = self._step(request, open_[i], position)
                    if chunk.finish_reason is not None:
                        del open_[i]
                    done = not open_
                    yield chunk
                if done:
                    return
        finally:
            self._live.discard(request.request_id)
            self._dropped.discard(request.request_id)
            (self.finished if done else self.aborted).append(request.request_id)
            await self._tick()

    def _step(self, request: GenerateRequest, growing: _Growing, position: int) -> GenerateChunk:
        if self.fail_after is not None and growing.count >= self.fail_after:
            raise RuntimeError("scripted failure")
        if request.request_id in self._dropped:
            return growing.end(self.version)
        token_id, logprob = self.token(request, growing.sample_id, position)
        self.num_tokens += 1
        if self.num_tokens == self._hold_at:
            self.hold()
        return growing.add(token_id, logprob, self.version)

    async def abort(self, request_id: str) -> bool:
        """End a request, held or not."""
        if request_id not in self._live:
            return False
        self._dropped.add(request_id)
        await self._tick()
        return True

    async def update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        """Take the version; the tensors are only counted against the manifest."""
        names = [name for name, _ in tensors]
        if manifest.version <= self.version:
            raise ValueError(f"version {manifest.version} does not grow, the engine holds {self.version}")
        if names != [spec.name for spec in manifest.tensors]:
            raise ValueError("tensors and manifest differ")
        self.version = manifest.version

    def info(self) -> EngineInfo:
        """Fixed but for the weight version."""
        return EngineInfo(
            model=self.model,
            contract_digest="mk1-scripted",
            weight_version=self.version,
            vocab_size=self.tokenizer.vocab_size,
            max_context=self.max_context,
            max_running=256,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )

    def metrics(self) -> dict[str, float]:
        """Counters."""
        return {
            "num_running": len(self._live),
            "num_generated_tokens": self.num_tokens,
            "num_prompt_tokens": self.num_prompt_tokens,
            "weight_version": self.version,
        }

    async def close(self) -> None:
        """Abort what runs."""
        self.closed = True
        for request_id in list(self._live):
            await self.abort(request_id)

    def _check(self, request: GenerateRequest) -> None:
        try:
            request.sampling.validate()
        except ValueError as error:
            raise EngineRefusal(str(error)) from None
        size = len(request.input_ids) + request.sampling.max_new_tokens
        if size > self.max_context:
            raise EngineRefusal(f"{size} tokens with max_new_tokens; the context holds {self.max_context}")
        bad = [i for i in request.input_ids if not 0 <= i < self.tokenizer.vocab_size]
        if bad:
            raise EngineRefusal(f"token id {bad[0]} is outside the vocabulary of {self.tokenizer.vocab_size}")

    async def _turn(self, request_id: str) -> None:
        """Give way to others, and wait while held."""
        await asyncio.sleep(0)
        if not self._go.is_set() and request_id not in self._dropped:
            async with self._changed:
                await self._changed.wait_for(lambda: self._go.is_set() or request_id in self._dropped)

    async def _tick(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _Growing:
    """One completion in the making."""

    def __init__(self, index: int, sample_id: int, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        self.index = index
        self.sample_id = sample_id
        self.count = 0
        self._request = request
        self._stops = frozenset(request.sampling.stop_token_ids) | (
            frozenset() if request.sampling.ignore_eos else frozenset(tokenizer.eos_token_ids)
        )
        self._decoder = IncrementalDecoder(tokenizer, request.sampling.stop)
        self._vocab = tokenizer.vocab_size

    def add(self, token_id: int, logprob: float, version: int) -> GenerateChunk:
        sampling = self._request.sampling
        self.count += 1
        may_stop = self.count >= sampling.min_new_tokens
        text = self._decoder.push((token_id,), can_stop=may_stop)
        reason: FinishReason | None = None
        matched: int | str | None = None
        if self._decoder.matched is not None:
            reason, matched = "stop", self._decoder.matched
        elif may_stop and token_id in self._stops:
            reason, matched = "stop", token_id
        elif self.count == sampling.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += self._decoder.finish()
        return self._chunk((token_id,), (logprob,), text, version, reason, matched, self._top(token_id, logprob))

    def _top(self, token_id: int, logprob: float) -> TopLogprobs:
        """Where asked for: the sampled token itself and ids after it."""
        count = self._request.num_top_logprobs
        return (tuple(((token_id + i) % self._vocab, logprob - i) for i in range(count)),) if count else ()

    def end(self, version: int) -> GenerateChunk:
        return self._chunk((), (), self._decoder.finish(), version, "abort", None, ())

    def _chunk(
        self, ids: Any, logprobs: Any, text: str, version: int, reason: FinishReason | None, matched: Any, top: TopLogprobs
    ) -> GenerateChunk:
        return GenerateChunk(
            request_id=self._request.request_id,
            sample_id=self.sample_id,
            index=self.index,
            token_ids=ids,
            logprobs=logprobs,
            sampled_logprobs=tuple(each / 2 for each in logprobs),
            text=text,
            weight_version=version,
            finish_reason=reason,
            matched_stop=matched,
            top_logprobs=top,
        )


def _join(chunks: list[GenerateChunk]) -> Completion:
    """The chunks of one completion, put together."""
    ids = [i for chunk in chunks for i in chunk.token_ids]
    versions = [chunk.weight_version for chunk in chunks for _ in chunk.token_ids]
    cuts = [0, *(i for i in range(1, len(versions)) if versions[i] != versions[i - 1]), len(versions)]
    return Completion(
        sample_id=chunks[0].sample_id,
        index=chunks[0].index,
        token_ids=tuple(ids),
        logprobs=tuple(each for chunk in chunks for each in chunk.logprobs),
        sampled_logprobs=tuple(each for chunk in chunks for each in chunk.sampled_logprobs),
        text="".join(chunk.text for chunk in chunks),
        finish_reason=chunks[-1].finish_reason or "abort",
        matched_stop=chunks[-1].matched_stop,
        weight_spans=tuple(
            WeightSpan(version=versions[a], start=a, stop=b) for a, b in zip(cuts, cuts[1:], strict=False) if b > a
        ),
        top_logprobs=tuple(each for chunk in chunks for each in chunk.top_logprobs),
    )


@contextlib.asynccontextmanager
async def serving(
    engine: Engine,
    tokenizer: Tokenizer | None = None,
    config: ServerConfig | None = None,
    *,
    load_weights: WeightLoader | None = None,
    timeout_s: float = 30.0,
) -> AsyncIterator[str]:
    """The HTTP service over `engine` on a free port of 127.0.0.1, as a URL; drained and closed, engine too, on leaving."""
    from miles_rollout.server import bind, create_app, listen, serve

    sock = bind("127.0.0.1", 0)
    listen(sock)
    stop = asyncio.Event()
    app = create_app(engine, tokenizer, config, load_weights=load_weights)
    server = asyncio.ensure_future(serve(app, sock, stop=stop, log_level="error"))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        stop.set()
        await asyncio.wait_for(server, timeout_s)
