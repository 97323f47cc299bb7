"""The server under test as checks see it: requests with a deadline, replies with a shape, and what is known of the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import httpx
import msgspec

T = TypeVar("T")
JSON = {"content-type": "application/json"}


class CheckFailed(AssertionError):
    """The server does not do what the check demands; the message says what it did instead."""


class Unsupported(Exception):
    """The check does not apply to this server; the message says why."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. The defaults suit every tokenizer that knows digits; ids must lie inside the vocabulary.

    Example: Options(texts=("the quick brown fox", "a lazy dog"), admin_token="secret")
    """

    prompt_ids: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11)
    """At least five token ids."""
    texts: tuple[str, str] = ("1+1=", "2+2=")
    chat: tuple[dict[str, str], ...] = ({"role": "user", "content": "1+1="},)
    admin_token: str | None = None
    weights: str | None = None
    """A directory, on the server's machine, with weights to update to; without it updates that succeed are not tried."""
    timeout_s: float = 60.0
    """Deadline of each request."""


class Target:
    """One server. `refresh` must have run before anything else is asked of it."""

    def __init__(self, url: str, options: Options, http: httpx.AsyncClient) -> None:
        self.url = url
        self.options = options
        self.is_miles = False
        self.context_length = 0
        self.seeds_hold = False
        """False for an SGLang that says it runs without deterministic inference."""
        self._http = http

    async def refresh(self) -> None:
        """Learn flavour and context length. Raises ValueError when nothing there answers like a rollout server."""
        replies = []
        for path in ("/get_model_info", "/get_server_info"):
            try:
                response = await self._http.get(self.url + path)
                replies.append(msgspec.json.decode(response.content, type=dict[str, Any]))
            except (httpx.HTTPError, msgspec.MsgspecError) as error:
                raise ValueError(f"{self.url}{path} does not answer as a rollout server does: {error!r}") from None
        model, server = replies
        self.is_miles = "contract_digest" in model
        self.context_length = int(server.get("context_length") or server.get("max_total_num_tokens") or 2048)
        self.seeds_hold = self.is_miles or bool(server.get("enable_deterministic_inference"))

    async def send(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """One request, the reply whole. The admin token goes along unless `headers` say otherwise."""
        content = raw if raw is not None else None if body is None else msgspec.json.encode(body)
        try:
            try:
                return await self._http.request(method, self.url + path, content=content, headers=self._headers(headers))
            except (
                httpx.ReadError,
                httpx.RemoteProtocolError,
            ):  # SGLang drops the connection after a 500; a dead server stays so
                return await self._http.request(method, self.url + path, content=content, headers=self._headers(headers))
        except httpx.TimeoutException:
            raise CheckFailed(f"{method} {path}: no reply within {self.options.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise CheckFailed(f"{method} {path}: {error!r}") from None

    async def ask(self, path: str, body: Any = None, *, method: str = "POST") -> Any:
        """The JSON of a 200 reply."""
        response = await self.send(method, path, body)
        if response.status_code != 200:
            raise CheckFailed(f"{method} {path}: HTTP {response.status_code}, expected 200: {response.text[:200]}")
        return decode(path, response.content)

    async def optional(self, path: str, body: Any = None, *, method: str = "POST") -> Any:
        """The same, of a route a server may lack."""
        response = await self.send(method, path, body)
        if response.status_code in (404, 405, 501):
            raise Unsupported(f"{method} {path} is not there (HTTP {response.status_code})")
        if response.status_code != 200:
            raise CheckFailed(f"{method} {path}: HTTP {response.status_code}, expected 200: {response.text[:200]}")
        return response

    async def refused(self, path: str, body: Any = None, *, raw: bytes | None = None, also: tuple[int, ...] = ()) -> str:
        """The message of a 4xx reply in one of SGLang's error shapes; `also` are further statuses that count as refusals."""
        response = await self.send("POST", path, body, raw=raw)
        status = response.status_code
        if not 400 <= status < 500 and status not in also:
            raise CheckFailed(f"POST {path}: HTTP {status}, expected a refusal: {response.text[:200]}")
        if status in also:
            return response.text
        message = error_message(decode(path, response.content))
        if not message:
            raise CheckFailed(f"POST {path}: the error reply has no message: {response.text[:200]}")
        return message

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The events of a stream that must be 200, be server-sent events and end with [DONE]."""
        try:
            sent = self._http.stream("POST", self.url + path, content=msgspec.json.encode(body), headers=self._headers(None))
            async with asyncio.timeout(self.options.timeout_s), sent as response:
                if response.status_code != 200:
                    raise CheckFailed(f"POST {path}: HTTP {response.status_code}, expected a stream")
                kind = response.headers.get("content-type", "")
                if not kind.startswith("text/event-stream"):
                    raise CheckFailed(f"POST {path}: content-type {kind!r}, expected text/event-stream")
                rest = b""
                async for part in response.aiter_bytes():
                    *lines, rest = (rest + part).split(b"\n")
                    for line in lines:
                        if line.strip() == b"data: [DONE]":
                            return
                        if line.startswith(b"data: "):
                            yield decode(path, line[6:])
        except TimeoutError:
            raise CheckFailed(f"POST {path}: the stream did not end within {self.options.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise CheckFailed(f"POST {path}: the stream broke off: {error!r}") from None
        raise CheckFailed(f"POST {path}: the stream ended without [DONE]")

    def _headers(self, given: dict[str, str] | None) -> dict[str, str]:
        if given is not None:
            return given
        token = self.options.admin_token
        return JSON if token is None else JSON | {"authorization": f"Bearer {token}"}


def decode(path: str, content: bytes) -> Any:
    """JSON or a failed check."""
    try:
        return msgspec.json.decode(content)
    except msgspec.MsgspecError:
        raise CheckFailed(f"{path}: the reply is not JSON: {content[:120]!r}") from None


def shaped(value: Any, type_: type[T], what: str) -> T:
    """`value` as a struct; a failed check names the field that does not fit."""
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise CheckFailed(f"{what}: {error}") from None


def demand(condition: bool, message: str) -> None:
    """A failed check unless `condition`."""
    if not condition:
        raise CheckFailed(message)


def error_message(reply: Any) -> str:
    """The message in `{"error": {"message"}}` or `{"object": "error", "message"}`, else ""."""
    if not isinstance(reply, dict):
        return ""
    error = reply.get("error", reply)
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else ""
