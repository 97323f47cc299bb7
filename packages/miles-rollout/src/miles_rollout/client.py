"""A rollout engine somewhere else: the Engine protocol's requests over a Miles server's native HTTP API. No torch."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar

import httpx
import msgspec

from miles_rollout.engine import EngineRefusal
from miles_rollout.wire import (
    Completion,
    EngineInfo,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    RoutedExperts,
    TopLogprobs,
    WeightSpan,
    check_schema,
)

LOG = logging.getLogger("miles_rollout.client")
R = TypeVar("R")
NOT_DELIVERED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""Failures of the connection. They are retried while no token has been delivered; tokens are keyed, so a retry gives the same."""


class ServerError(RuntimeError):
    """The server cannot be reached, failed, refused rights, or answered something that is not a Miles reply."""


class _Unavailable(Exception):
    """503: the server is shutting down or not ready; another attempt may meet its successor."""


class _Finish(msgspec.Struct, frozen=True):
    type: FinishReason
    matched: int | str | None = None


class _Meta(msgspec.Struct, frozen=True):
    """The part of `meta_info` the client reads. Miles' extensions among it."""

    finish_reason: _Finish | None
    output_token_logprobs: list[tuple[float, int, str | None]]
    output_token_sampling_logprobs: list[float]
    sample_id: int
    weight_spans: list[WeightSpan]
    cached_tokens: int | None = None
    input_token_logprobs: list[tuple[float | None, int, str | None]] = []
    output_top_logprobs: list[list[tuple[float, int, str | None]]] = []
    contract_digest: str = ""
    routed_experts: str | None = None
    routed_experts_shape: tuple[int, int, int] | None = None


class _Reply(msgspec.Struct, frozen=True):
    text: str
    output_ids: list[int]
    meta_info: _Meta
    index: int = 0


class _ServerInfo(msgspec.Struct, frozen=True):
    engine: EngineInfo
    metrics: dict[str, float] = {}


class _Updated(msgspec.Struct, frozen=True):
    success: bool
    message: str
    workers: dict[str, str | None] = {}


class RolloutClient:
    """Requests to one server. `generate`, `stream`, `abort`, `info`, `metrics` and `close` are those of `Engine`.

    Every call has a deadline of `timeout_s` seconds and raises TimeoutError after it. A request is sent again, at most
    `retries` times, only while no token was delivered and only after a failed connection or a 503. Refusals (4xx) raise
    EngineRefusal, everything else ServerError. Cancelling a call closes its connection, which aborts the request.

    Example:
        async with RolloutClient("http://127.0.0.1:30000") as client:
            result = await client.generate(GenerateRequest(request_id="a", input_ids=(5, 9)))
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout_s: float = 600.0,
        connect_s: float = 5.0,
        retries: int = 2,
        backoff_s: float = 0.2,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers={} if token is None else {"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self._state: _ServerInfo | None = None
        self._lacking: set[str] = set()

    async def __aenter__(self) -> RolloutClient:
        try:
            await self.refresh()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def refresh(self) -> EngineInfo:
        """Ask the server what it is now; `info` and `metrics` then answer from that."""

        async def attempt() -> _ServerInfo:
            response = await self._http.get("/get_server_info")
            _raise_for_status(response.status_code, response.content)
            state = self._decode(response.content, _ServerInfo)
            check_schema(state.engine)
            return state

        self._state = await self._try(attempt)
        return self._state.engine

    def info(self) -> EngineInfo:
        """What the server last said about itself; raises ServerError before the first `refresh` or `async with`."""
        return self._known().engine

    def metrics(self) -> dict[str, float]:
        """The engine's figures as of the last `refresh`."""
        return dict(self._known().metrics)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request."""
        body = _body(request) | {"logprob_start_len": 0 if request.return_prompt_logprobs else -1}

        async def attempt() -> GenerateResult:
            response = await self._http.post("/generate", content=msgspec.json.encode(body), headers=_JSON)
            _raise_for_status(response.status_code, response.content)
            content = response.content
            if request.sampling.n == 1 and content[:1] == b"{":
                content = b"[" + content + b"]"
            return self._result(request, self._decode(content, list[_Reply]))

        return await self._try(attempt)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """The same, chunk by chunk. Prompt log-probabilities do not come with a stream."""
        body = msgspec.json.encode(_body(request) | {"stream": True, "stream_incremental": True})
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        async with contextlib.AsyncExitStack() as stack:

            async def attempt() -> tuple[httpx.Response, AsyncGenerator[bytes, None]]:
                sent = self._http.build_request("POST", "/generate", content=body, headers=_JSON)
                response = await self._http.send(sent, stream=True)
                try:
                    if response.status_code != 200:
                        _raise_for_status(response.status_code, await response.aread())
                except BaseException:
                    await response.aclose()
                    raise
                return response, _events(response)

            response, events = await self._try(attempt)
            stack.push_async_callback(response.aclose)
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        event = await anext(events, None)
                except TimeoutError:
                    raise self._too_late() from None
                except httpx.TransportError as error:
                    raise ServerError(f"{self.base_url}: the stream of {request.request_id} broke off: {error!r}") from error
                if event is None:
                    raise ServerError(f"{self.base_url}: the stream of {request.request_id} ended without [DONE]")
                if event == b"[DONE]":
                    return
                yield self._chunk(request, event)

    async def abort(self, request_id: str) -> bool:
        """Ask the server to end a request. The native API does not say whether it was running, so the answer is True."""

        async def attempt() -> bool:
            response = await self._http.post("/abort_request", content=msgspec.json.encode({"rid": request_id}), headers=_JSON)
            _raise_for_status(response.status_code, response.content)
            return True

        return await self._try(attempt)

    async def update_weights_from_disk(
        self, directory: str, version: int | None = None, *, all_workers: bool = True
    ) -> EngineInfo:
        """Let the server, every worker behind a router, load a directory of safetensors; the next version when none is given.

        Sent once. Raises EngineRefusal naming file or tensor when nothing was changed, ServerError when the server fails or,
        unless not `all_workers`, some worker lacks the update; such a one serves nothing until the router has brought it there.
        """
        body = {"model_path": directory} if version is None else {"model_path": directory, "weight_version": version}
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.post("/update_weights_from_disk", content=msgspec.json.encode(body), headers=_JSON)
        except TimeoutError:
            raise self._too_late() from None
        except httpx.TransportError as error:
            raise ServerError(f"{self.base_url}: the weight update was cut off: {error!r}") from error
        if response.status_code == 503:
            raise ServerError(f"HTTP 503: {_message(response.content)}")
        _raise_for_status(response.status_code, response.content)
        reply = self._decode(response.content, _Updated)
        lacking = {worker: why for worker, why in reply.workers.items() if why is not None}
        if lacking.keys() != self._lacking:
            self._lacking = set(lacking)
            if lacking and not all_workers:
                names = ", ".join(sorted(lacking))
                LOG.warning("%s: %s lack the weights and serve nothing until they have them", self.base_url, names)
        if lacking and all_workers:
            raise ServerError(
                f"{self.base_url}: " + "; ".join(f"{worker} lacks the update: {why}" for worker, why in lacking.items())
            )
        return await self.refresh()

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        await self._http.aclose()

    async def _try(self, attempt: Callable[[], Awaitable[R]]) -> R:
        """Run `attempt` until it succeeds, fails for good, has failed `retries` + 1 times, or the deadline has passed."""
        try:
            async with asyncio.timeout(self._timeout_s):
                for number in range(self._retries + 1):
                    try:
                        return await attempt()
                    except (*NOT_DELIVERED, _Unavailable) as error:
                        failure = error
                    if number < self._retries:
                        await asyncio.sleep(self._backoff_s * 2**number)
        except TimeoutError:
            raise self._too_late() from None
        reason = str(failure) or type(failure).__name__
        raise ServerError(f"{self.base_url} did not serve the request in {self._retries + 1} attempts: {reason}") from failure

    def _too_late(self) -> TimeoutError:
        return TimeoutError(f"{self.base_url} did not answer within {self._timeout_s:g} s")

    def _known(self) -> _ServerInfo:
        if self._state is None:
            raise ServerError('the server has not been asked yet: use "async with RolloutClient(...)" or await refresh()')
        return self._state

    def _decode(self, content: bytes, into: type[R]) -> R:
        try:
            return msgspec.json.decode(content, type=into)
        except msgspec.MsgspecError as error:
            raise ServerError(f"{self.base_url} does not answer as a Miles rollout server does: {error}") from error

    def _result(self, request: GenerateRequest, replies: list[_Reply]) -> GenerateResult:
        if len(replies) != request.sampling.n:
            raise ServerError(f"{self.base_url}: {len(replies)} completions for n={request.sampling.n}")
        first = replies[0].meta_info
        prompt = [logprob for logprob, _, _ in first.input_token_logprobs]
        completions = [self._completion(i, reply) for i, reply in enumerate(replies)]
        return GenerateResult(
            request_id=request.request_id,
            completions=tuple(completions),
            prompt_logprobs=tuple(0.0 if each is None else each for each in prompt) or None,
            cached_tokens=first.cached_tokens or 0,
            contract_digest=first.contract_digest,
        )

    def _completion(self, index: int, reply: _Reply) -> Completion:
        meta = reply.meta_info
        if meta.finish_reason is None:
            raise ServerError(f"{self.base_url}: a completion without finish_reason")
        routed = None
        if meta.routed_experts is not None and meta.routed_experts_shape is not None:
            tokens, layers, top_k = meta.routed_experts_shape
            data = base64.b64decode(meta.routed_experts)
            routed = RoutedExperts(num_tokens=tokens, num_layers=layers, top_k=top_k, data=data)
            routed.validate()
        return Completion(
            sample_id=meta.sample_id,
            index=index,
            token_ids=tuple(reply.output_ids),
            logprobs=tuple(logprob for logprob, _, _ in meta.output_token_logprobs),
            sampled_logprobs=tuple(meta.output_token_sampling_logprobs),
            text=reply.text,
            finish_reason=meta.finish_reason.type,
            matched_stop=meta.finish_reason.matched,
            weight_spans=tuple(meta.weight_spans),
            top_logprobs=_top(meta),
            routed_experts=routed,
        )

    def _chunk(self, request: GenerateRequest, event: bytes) -> GenerateChunk:
        if event.startswith(b'{"error"'):
            raise ServerError(f"{self.base_url}: the stream of {request.request_id} failed: {_message(event)}")
        reply = self._decode(event, _Reply)
        meta = reply.meta_info
        return GenerateChunk(
            request_id=request.request_id,
            sample_id=meta.sample_id,
            index=reply.index,
            token_ids=tuple(reply.output_ids),
            logprobs=tuple(logprob for logprob, _, _ in meta.output_token_logprobs),
            sampled_logprobs=tuple(meta.output_token_sampling_logprobs),
            text=reply.text,
            weight_version=meta.weight_spans[-1].version,
            finish_reason=None if meta.finish_reason is None else meta.finish_reason.type,
            matched_stop=None if meta.finish_reason is None else meta.finish_reason.matched,
            top_logprobs=_top(meta),
        )


_JSON = {"content-type": "application/json"}


def _top(meta: _Meta) -> TopLogprobs:
    return tuple(tuple((token_id, logprob) for logprob, token_id, _ in each) for each in meta.output_top_logprobs)


def _body(request: GenerateRequest) -> dict[str, Any]:
    sampling = msgspec.structs.asdict(request.sampling)
    seed = sampling.pop("seed")
    body: dict[str, Any] = {"rid": request.request_id, "input_ids": request.input_ids, "return_logprob": True}
    body["sampling_params"] = sampling | {"sampling_seed": seed}
    if request.return_routed_experts:
        body["return_routed_experts"] = True
    if request.num_top_logprobs:
        body["top_logprobs_num"] = request.num_top_logprobs
    return body | {"sample_ids": request.sample_ids} if request.sample_ids else body


def _raise_for_status(status: int, content: bytes) -> None:
    if status == 200:
        return
    message = _message(content)
    if status == 503:
        raise _Unavailable(message)
    if status in (400, 413):
        raise EngineRefusal(message)
    raise ServerError(f"HTTP {status}: {message}")


def _message(content: bytes) -> str:
    """The message of an error reply, or the start of whatever was sent instead."""
    try:
        reply = msgspec.json.decode(content)
    except msgspec.MsgspecError:
        return content[:200].decode(errors="replace")
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event. Split on newline bytes only: text may hold other line separators."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line[6:]
