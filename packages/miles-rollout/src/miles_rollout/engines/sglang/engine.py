"""`Engine` over a real SGLang server: what SGLang cannot promise is refused here, what it does wrong never reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.child import Child
from miles_rollout.engine import MEMORY_TAGS, EngineRefusal, PauseMode
from miles_rollout.engines.sglang import replies, weights
from miles_rollout.engines.sglang.config import SglangConfig
from miles_rollout.engines.sglang.cursor import Cursor, by_hand, joined, number
from miles_rollout.engines.sglang.model import model_shape
from miles_rollout.engines.sglang.process import start
from miles_rollout.engines.sglang.replies import Reply, ServerInfo, SglangFailure, decoded, events, message_of, refusal
from miles_rollout.upstream import Upstream, UpstreamError
from miles_rollout.waits import gather_all
from miles_rollout.wire import (
    MAX_TOP_LOGPROBS,
    Completion,
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    WeightManifest,
    WeightSpan,
)

JSON = "Content-Type: application/json\r\n"


class SglangEngine:
    """Implements `Engine`, `PausableEngine`, `MemoryEngine` and `DiskUpdatableEngine`; make one with `start`.

    Differences from SGLang itself: completions of one request have seeds of their own, keyed by sample id, and with
    `config.seeds` they hold; `stop_token_ids` hold with `ignore_eos` too; token ids outside the vocabulary, which end an SGLang
    process, are refused; a weight update is checked against the shapes the server holds before it sees a file.
    """

    def __init__(self, config: SglangConfig, url: str, child: Child | None, raw: dict[str, Any]) -> None:
        self.config = config
        self.url = url
        server = msgspec.convert(raw, ServerInfo)
        if config.seeds and not server.deterministic:
            raise ValueError(
                f"the SGLang server at {url} ignores sampling_seed; start it with --enable-deterministic-inference, "
                "or accept that requests cannot be repeated (--no-seeds)"
            )
        self._server = server
        self._digest = replies.digest(raw)
        self._child = child
        self._http = Upstream(url, token=config.token)
        model = Path(config.model or server.model_path)
        self._shape = model_shape(model)
        self._held = self._policy_shapes(model) if any(model.glob("*.safetensors")) else {}
        self._version = int(version) if (version := str(raw.get("weight_version"))).isdigit() else 0
        self._live: dict[str, list[str]] = {}
        self._released: set[str] = set()
        self._paused: PauseMode | None = None
        self._profiles: str | None = None
        self._broken = ""
        self._updating = asyncio.Lock()
        self._counts = dict.fromkeys(("num_prompt_tokens", "num_generated_tokens", "num_cached_tokens", "num_requests"), 0)

    @classmethod
    async def start(cls, config: SglangConfig) -> SglangEngine:
        """Start a server, or attach to one.

        Raises ValueError for bad settings or a server that does not answer, MissingExtraError where there is no SGLang.
        """
        config.validate()
        child, url = (None, config.url) if config.url else await start(config)
        probe = Upstream(url, token=config.token)
        try:
            status, body = await probe.request("GET", "/get_server_info", timeout_s=30.0)
            if status != 200:
                raise ValueError(f"{url}/get_server_info: HTTP {status}")
            return cls(config, url, child, msgspec.json.decode(body, type=dict[str, Any]))
        except (UpstreamError, msgspec.MsgspecError) as error:
            if child is not None:
                await child.stop()
            raise ValueError(f"{url} does not answer as an SGLang server does: {error}") from None
        except BaseException:
            if child is not None:
                await child.stop()
            raise
        finally:
            probe.abort_all()

    # ------------------------------------------------------------------ generating

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request, each a request of its own to SGLang."""
        with self._running(request) as rids:
            if by_hand(request):
                parts: dict[int, list[GenerateChunk]] = {}
                async with contextlib.aclosing(self._chunks(request, rids)) as chunks:
                    async for chunk in chunks:
                        parts.setdefault(chunk.index, []).append(chunk)
                return GenerateResult(
                    request_id=request.request_id,
                    completions=tuple(joined(parts[index]) for index in sorted(parts)),
                    contract_digest=self._digest,
                )
            found = await gather_all(self._ask(request, i, rid) for i, rid in enumerate(rids))
        first = found[0].meta_info
        prompt = tuple(0.0 if each[0] is None else each[0] for each in first.input_token_logprobs)
        return GenerateResult(
            request_id=request.request_id,
            completions=tuple(self._completion(request, i, reply) for i, reply in enumerate(found)),
            prompt_logprobs=prompt if request.return_prompt_logprobs else None,
            cached_tokens=first.cached_tokens,
            contract_digest=self._digest,
        )

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """The same, chunk by chunk. Closing the iterator aborts the request."""
        with self._running(request) as rids:
            async with contextlib.aclosing(self._chunks(request, rids)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def abort(self, request_id: str) -> bool:
        """End a request now. False when it is not running."""
        rids = self._live.get(request_id)
        if rids is None:
            return False
        await asyncio.gather(*(self._control("POST", "/abort_request", {"rid": rid}) for rid in rids))
        return True

    def _check(self, request: GenerateRequest) -> None:
        """Raise EngineRefusal for what SGLang refuses, cuts short or dies of."""
        try:
            request.sampling.validate()
        except ValueError as error:
            raise EngineRefusal(str(error)) from None
        if self.config.seeds and request.sampling.min_p > 0 and request.sampling.temperature > 0:
            raise EngineRefusal("min_p does not come with seeds on SGLang, whose process would end; ask without, or use top_p")
        if not 0 <= request.num_top_logprobs <= MAX_TOP_LOGPROBS:
            raise EngineRefusal(f"num_top_logprobs={request.num_top_logprobs} must lie in 0..{MAX_TOP_LOGPROBS}")
        if not request.input_ids:
            raise EngineRefusal("the prompt is empty; it needs at least one token")
        vocab = self._shape.vocab_size
        bad = next((i for i in request.input_ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise EngineRefusal(f"token id {bad} is outside the vocabulary of {vocab}")
        size, most = len(request.input_ids) + request.sampling.max_new_tokens, self.info().max_context
        if size > most:
            raise EngineRefusal(f"prompt and max_new_tokens are {size} tokens; the context holds {most}")
        if by_hand(request) and request.return_prompt_logprobs:
            raise EngineRefusal(
                "prompt logprobs do not come with stop_token_ids under ignore_eos on SGLang; ask one or the other"
            )
        if request.request_id in self._live:
            raise EngineRefusal(f"request {request.request_id!r} is running already; give every request an id of its own")

    @contextlib.contextmanager
    def _running(self, request: GenerateRequest) -> Iterator[list[str]]:
        self._check_alive()
        self._check(request)
        n = request.sampling.n
        rids = [request.request_id if n == 1 else f"{request.request_id}#{i}" for i in range(n)]
        self._live[request.request_id] = rids
        self._counts["num_requests"] += 1
        self._counts["num_prompt_tokens"] += len(request.input_ids)
        try:
            yield rids
        finally:
            del self._live[request.request_id]

    def _check_alive(self) -> None:
        if (why := self.failure) is not None:
            raise SglangFailure(why)
        if self._released:
            raise SglangFailure(f"the memory of {', '.join(sorted(self._released))} is released; resume it first")

    async def _ask(self, request: GenerateRequest, index: int, rid: str) -> Reply:
        body = replies.body(request, index, rid, seeds=self.config.seeds, stop_ids_by_hand=False)
        try:
            async with asyncio.timeout(self.config.request_s):
                response = await self._http.open("POST", "/generate", msgspec.json.encode(body), JSON)
                content = await response.read()
        except UpstreamError as error:
            raise SglangFailure(f"SGLang was lost: {error}") from error
        except TimeoutError:
            await self._give_up(rid)
            raise SglangFailure(f"SGLang did not finish within {self.config.request_s:g} s") from None
        except BaseException:
            await self._give_up(rid)
            raise
        if response.status != 200:
            raise refusal(response.status, content)
        reply = decoded(content)
        self._count(len(reply.output_ids), reply.meta_info.cached_tokens)
        return reply

    async def _give_up(self, rid: str) -> None:
        """The caller has left: free what its request holds."""
        with contextlib.suppress(UpstreamError, SglangFailure):
            await asyncio.shield(asyncio.ensure_future(self._control("POST", "/abort_request", {"rid": rid})))

    def _count(self, tokens: int, cached: int) -> None:
        self._counts["num_generated_tokens"] += tokens
        self._counts["num_cached_tokens"] += cached

    async def _chunks(self, request: GenerateRequest, rids: list[str]) -> AsyncGenerator[GenerateChunk, None]:
        if len(rids) == 1:
            async with contextlib.aclosing(self._one_stream(request, 0, rids[0])) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        queue: asyncio.Queue[GenerateChunk | Exception | None] = asyncio.Queue(maxsize=4 * len(rids))

        async def pump(index: int, rid: str) -> None:
            end: Exception | None = None
            try:
                async with contextlib.aclosing(self._one_stream(request, index, rid)) as chunks:
                    async for chunk in chunks:
                        await queue.put(chunk)
            except Exception as error:  # carried over to whoever reads the queue
                end = error
            await queue.put(end)

        tasks = [asyncio.ensure_future(pump(i, rid)) for i, rid in enumerate(rids)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one_stream(self, request: GenerateRequest, index: int, rid: str) -> AsyncGenerator[GenerateChunk, None]:
        manual = by_hand(request)
        body = replies.body(request, index, rid, seeds=self.config.seeds, stop_ids_by_hand=manual) | {"stream": True}
        cursor = Cursor(request, index, manual)
        response = None
        done = False
        deadline = asyncio.get_running_loop().time() + self.config.request_s  # per wait: a generator may change tasks
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._http.open("POST", "/generate", msgspec.json.encode(body), JSON)
                if response.status != 200:
                    raise refusal(response.status, await response.read())
            stream = events(response.chunks())
            while not done:
                async with asyncio.timeout_at(deadline):
                    event = await anext(stream, None)
                if event is None:
                    break
                if event.startswith(b'{"error"'):
                    raise refusal(400, event)
                chunk = cursor.advance(decoded(event))
                if chunk is not None:
                    self._count(len(chunk.token_ids), 0)
                    done = chunk.finish_reason is not None
                    yield chunk
            if not done:
                raise SglangFailure("SGLang ended a stream without a finish_reason")
        except UpstreamError as error:
            raise SglangFailure(f"SGLang was lost: {error}") from error
        except TimeoutError:
            raise SglangFailure(f"SGLang did not finish within {self.config.request_s:g} s") from None
        finally:
            if response is not None:
                response.close()
            if not done or manual:
                await self._give_up(rid)

    def _completion(self, request: GenerateRequest, index: int, reply: Reply) -> Completion:
        meta = reply.meta_info
        finish = meta.finish_reason
        if finish is None:
            raise SglangFailure("SGLang answered a completion without finish_reason")
        count = len(reply.output_ids)
        routed = None
        if request.return_routed_experts and meta.routed_experts is not None:
            fed = len(request.input_ids) + count - 1
            routed = replies.experts(meta.routed_experts, fed, self._shape.num_moe_layers, self._shape.experts_top_k)
        return Completion(
            sample_id=replies.sample_id(request, index),
            index=index,
            token_ids=tuple(reply.output_ids),
            logprobs=tuple(each[0] for each in meta.output_token_logprobs),
            sampled_logprobs=replies.sampled(request, reply),
            text=reply.text,
            finish_reason=finish.type,
            matched_stop=finish.matched if isinstance(finish.matched, int | str) else None,
            weight_spans=(WeightSpan(version=number(meta.weight_version), start=0, stop=count),) if count else (),
            top_logprobs=replies.top(meta.output_top_logprobs),
            routed_experts=routed,
        )

    # ------------------------------------------------------------------ weights, pauses, memory

    async def update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        """Verify every tensor, put them on disk (memory-backed where there is /dev/shm), let SGLang load them."""
        self._need_shapes()
        directory = await asyncio.to_thread(
            weights.put_on_disk, manifest, tensors, self._held, version=self._version, digest=self._digest,
            root=self.config.staging,
        )  # fmt: skip
        try:
            await self.update_weights_from_disk(str(directory), manifest.version)
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def update_weights_from_disk(self, directory: str, version: int) -> None:
        """A directory of safetensors. SGLang first finishes what runs, so no completion mixes two versions."""
        async with self._updating:
            self._check_alive()
            self._need_shapes()
            if version <= self._version:
                raise ValueError(f"version {version} does not grow, the server holds {self._version}")
            if self._paused in ("retract", "in_place") and self._live:
                raise ValueError(
                    f"{len(self._live)} requests are held by a pause with mode {self._paused}; an SGLang process ends when "
                    "its weights change then. Continue, or pause with mode abort, and send the update again"
                )
            weights.check_shapes(await asyncio.to_thread(self._policy_shapes, directory), self._held)
            body = {"model_path": directory, "weight_version": str(version), "flush_cache": True}
            await self._swap("/update_weights_from_disk", body, version)

    def _policy_shapes(self, directory: str | Path) -> weights.Shapes:
        """The tensors of a directory that are the policy's; a draft's beside them take no part in updates."""
        found = weights.read_shapes(directory)
        return {name: shape for name, shape in found.items() if not name.startswith(self._shape.draft_prefixes)}

    async def _swap(self, path: str, body: dict[str, Any], version: int) -> None:
        """Send an update. What is left after a failure half-way nobody knows, so the engine then serves nothing more."""
        why = ""
        try:
            async with asyncio.timeout(self.config.update_s):
                status, content = await self._control("POST", path, body, timeout_s=self.config.update_s)
                told = await self._told()
                if status == 200 and told == str(version):
                    self._version = version
                    return
                why = message_of(content)
        except (TimeoutError, SglangFailure) as error:
            why = str(error) or f"no reply within {self.config.update_s:g} s"
        self._broken = f"a weight update to version {version} failed half-way ({why}); restart the engine"
        raise SglangFailure(self._broken)

    async def _told(self) -> str:
        _, content = await self._control("GET", "/model_info")
        return str(msgspec.json.decode(content, type=dict[str, Any]).get("weight_version"))

    def _need_shapes(self) -> None:
        if not self._held:
            raise ValueError(
                "this engine knows no tensor shapes to check an update against; give it the model directory (model=)"
            )

    async def flush_cache(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        status, _ = await self._control("POST", "/flush_cache")
        return status == 200

    async def pause(self, mode: PauseMode) -> int:
        """Hold, retract or abort what runs."""
        await self._must("/pause_generation", {"mode": mode})
        self._paused = mode
        return 0 if mode == "abort" else len(self._live)

    async def resume(self) -> None:
        """Go on."""
        await self._must("/continue_generation", {})
        self._paused = None

    async def start_profile(self, directory: str) -> None:
        """SGLang's own profiler."""
        await self._must("/start_profile", {"output_dir": directory})
        self._profiles = directory

    async def stop_profile(self) -> str:
        """The directory: SGLang names the file."""
        if self._profiles is None:
            raise ValueError("no profile is being recorded")
        directory, self._profiles = self._profiles, None
        await self._must("/stop_profile", {})
        return directory

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Free weights, KV cache or graphs; the server needs --enable-memory-saver."""
        chosen = _tags(tags)
        again = chosen & self._released
        if again:
            raise ValueError(f"already released: {', '.join(sorted(again))}")
        if self._live:
            raise ValueError(f"{len(self._live)} requests are running; pause with mode abort first")
        self._released |= chosen
        try:
            await self._must("/release_memory_occupation", {"tags": sorted(chosen)})
        except BaseException:
            self._released -= chosen
            raise

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take memory back."""
        chosen = _tags(tags)
        never = chosen - self._released
        if never:
            raise ValueError(f"not released: {', '.join(sorted(never))}")
        await self._must("/resume_memory_occupation", {"tags": sorted(chosen)})
        self._released -= chosen

    # ------------------------------------------------------------------ reports and the end

    @property
    def failure(self) -> str | None:
        """Why it will never generate again; None while it may."""
        if self._child is not None and not self._child.running:
            return f"the SGLang process has ended with exit code {self._child.exit_code}"
        return self._broken or None

    def info(self) -> EngineInfo:
        """Model, contract digest, weight version, limits."""
        running = next((s.get("effective_max_running_requests_per_dp") for s in self._server.internal_states), None)
        return EngineInfo(
            model=self._server.model_path,
            contract_digest=self._digest,
            weight_version=self._version,
            vocab_size=self._shape.vocab_size,
            max_context=min(self._server.max_context, self._shape.max_position_embeddings),
            max_running=int(running or 256),
            eos_token_ids=self._shape.eos_token_ids,
        )

    def metrics(self) -> dict[str, float]:
        """Counters since start, as seen from here; SGLang's own are on its /metrics."""
        return {**self._counts, "num_running": len(self._live), "weight_version": self._version}

    async def close(self) -> None:
        """Abort what runs; end the server when it is ours. Idempotent."""
        self._http.abort_all()
        if self._child is not None and self._child.running:
            await self._child.stop()

    async def _control(self, method: str, path: str, body: Any = None, *, timeout_s: float = 60.0) -> tuple[int, bytes]:
        try:
            content = b"" if body is None else msgspec.json.encode(body)
            return await self._http.request(method, path, content, timeout_s=timeout_s)
        except UpstreamError as error:
            raise SglangFailure(f"SGLang was lost: {error}") from error

    async def _must(self, path: str, body: Any) -> None:
        status, content = await self._control("POST", path, body)
        if status != 200:
            raise ValueError(f"SGLang refused {path}: {message_of(content)}")


def _tags(tags: Sequence[str]) -> set[str]:
    unknown = [tag for tag in tags if tag not in MEMORY_TAGS]
    if unknown:
        raise ValueError(f"unknown memory tag {unknown[0]!r}; known are {', '.join(MEMORY_TAGS)}")
    return set(tags) or set(MEMORY_TAGS)
