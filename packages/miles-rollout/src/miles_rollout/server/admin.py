"""Endpoints that change what the server does: abort, flush, pause, memory, new weights. Closed to all but the operator."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from miles_rollout.engine import MEMORY_TAGS, DiskUpdatableEngine, MemoryEngine, PauseMode
from miles_rollout.server.errors import Handler, JSONResponse, RequestError, scrub
from miles_rollout.server.params import Neutral, parse
from miles_rollout.server.service import FlushableEngine, Service

logger = logging.getLogger("miles_rollout.server")
PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin")
"""Signs that the caller on loopback speaks for somebody else: a reverse proxy, or a web page in a browser."""


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /abort_request. An unknown id is no error: the request may just have ended."""

    rid: str = ""
    abort_all: bool = False


class UpdateFromDisk(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /update_weights_from_disk. Requests that run go on under the new weights, unless aborted."""

    model_path: str
    weight_version: str | int | None = None
    """An integer above the current version; one more than it when not given."""
    abort_all_requests: bool = False


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /pause_generation."""

    mode: PauseMode = "abort"


class Continue(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /continue_generation."""


class MemoryTags(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /release_memory_occupation and /resume_memory_occupation."""

    tags: list[str] = []
    """Of "weights", "kv_cache", "cuda_graph"; all when empty."""


ABORT_NEUTRAL: Neutral = {"abort_message": ()}
UPDATE_NEUTRAL: Neutral = {
    "load_format": ("auto", "safetensors"), "flush_cache": (True,), "keep_pause": (False,), "is_async": (False,),
    "token_step": (0,), "recapture_cuda_graph": (False,), "torch_empty_cache": (False,), "manifest": (),
}  # fmt: skip


def check_rights(token: str | None, request: Request, *, browser: bool = False) -> None:
    """Raise RequestError 401 or 403 unless the caller holds the admin token or, where there is none, sits on loopback.

    With `browser` the token may also be the password of HTTP Basic, which browsers ask for.
    """
    if token is not None:
        if not _holds(token, request.headers.get("authorization", ""), basic=browser):
            error = RequestError("this endpoint needs the admin token: send Authorization: Bearer TOKEN", status=401)
            error.challenge = 'Basic realm="miles-rollout", charset="UTF-8"' if browser else "Bearer"
            raise error
        return
    local = request.client is not None and _is_loopback(request.client.host)
    if not local or any(name in request.headers for name in PROXY_HEADERS):
        raise RequestError("this endpoint answers callers on this machine only; start the server with an admin token", status=403)


def _holds(token: str, header: str, *, basic: bool) -> bool:
    scheme, _, given = header.partition(" ")
    given = given.strip()
    if basic and scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def guarded(token: str | None, handler: Handler, *, browser: bool = False) -> Handler:
    """A route that checks rights before it reads anything."""

    async def endpoint(request: Request) -> Response:
        check_rights(token, request, browser=browser)
        return await handler(request)

    return endpoint


async def abort_request(service: Service, request: Request) -> Response:
    """POST /abort_request: the completions of a request, or of all, end with reason "abort"."""
    body = parse(await service.read(request), AbortRequest, ABORT_NEUTRAL)
    if body.abort_all:
        await service.abort_all()
    elif body.rid:
        await service.abort(body.rid)
    return PlainTextResponse("")


async def flush_cache(service: Service, request: Request) -> Response:
    """POST /flush_cache: forget cached prefixes. 400 while requests run, or when the engine cannot."""
    if not isinstance(service.engine, FlushableEngine):
        raise RequestError("this engine has no prefix cache that can be flushed on request; a weight update always drops it")
    if not await service.engine.flush_cache():
        return PlainTextResponse("Flush cache failed.\n", status_code=400)
    return PlainTextResponse("Cache flushed.\n")


async def update_weights_from_disk(service: Service, request: Request) -> Response:
    """POST /update_weights_from_disk: a directory of safetensors, verified, swapped in; the old weights stay on any error."""
    body = parse(await service.read(request), UpdateFromDisk, UPDATE_NEUTRAL)
    load, engine = service.load_weights, service.engine
    if load is None and not isinstance(engine, DiskUpdatableEngine):
        raise RequestError("this server's engine does not load weights from disk")
    async with service.updating:
        info = engine.info()
        version = _version(body.weight_version, info.weight_version)
        try:
            path = confined(body.model_path, service.config.weight_roots)
            if isinstance(engine, DiskUpdatableEngine):
                if body.abort_all_requests:
                    await service.abort_all()
                await engine.update_weights_from_disk(path, version)
            else:
                assert load is not None
                manifest, tensors = await asyncio.to_thread(load, path, version, info.contract_digest)
                if body.abort_all_requests:
                    await service.abort_all()
                await engine.update_weights(manifest, tensors)
        except (ValueError, OSError) as error:
            logger.warning("weight version %d was refused, %d stays: %s", version, info.weight_version, error)
            return JSONResponse({"success": False, "message": scrub(str(error)), "num_paused_requests": 0}, status_code=400)
    logger.info("weight version %d, from %s, is served; before it %d", version, path, info.weight_version)
    message = f"Succeeded to update model weights. Weight version updated to {version}."
    return JSONResponse({"success": True, "message": message, "num_paused_requests": 0})


def confined(path: str, roots: tuple[str, ...] | None) -> str:
    """`path` with links resolved; raises ValueError when it leads out of all `roots`. Says nothing of what exists outside."""
    if roots is None:
        return path
    if "\0" in path:
        raise ValueError("model_path holds a null byte")
    real = Path(path).resolve()
    if not any(real.is_relative_to(Path(root).resolve()) for root in roots):
        raise ValueError("model_path leads out of the directories this server reads weights from; add one with --weights-root")
    return str(real)


async def pause_generation(service: Service, request: Request) -> Response:
    """POST /pause_generation: new requests wait, running ones end (abort), or are held (retract, in_place)."""
    held = await service.pause(parse(await service.read(request), Pause, {}).mode)
    return JSONResponse({"message": "Generation paused successfully.", "status": "ok", "num_paused_requests": held})


async def continue_generation(service: Service, request: Request) -> Response:
    """POST /continue_generation. Harmless when nothing is paused."""
    parse(await service.read(request), Continue, {})
    await service.resume()
    return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})


async def release_memory(service: Service, request: Request) -> Response:
    """POST /release_memory_occupation: give device memory back; requests are answered 503 until it is resumed."""
    tags, engine = await _tags(service, request)
    again = [tag for tag in tags if tag in service.released]
    if again:
        raise RequestError(f"already released: {', '.join(again)}", param="tags")
    if busy := len(service.running) - service.gate.num_held:
        raise RequestError(f"{busy} requests are running; pause with mode abort first")
    service.released |= set(tags)  # before the engine begins, so that nothing new reaches it
    try:
        await engine.release_memory(tags)
    except ValueError as error:
        service.released -= set(tags)
        raise RequestError(str(error), param="tags") from None
    except BaseException:
        service.released -= set(tags)
        raise
    logger.info("memory of %s is released", ", ".join(tags))
    return JSONResponse(None)


async def resume_memory(service: Service, request: Request) -> Response:
    """POST /resume_memory_occupation: take it back; a tag that was not released is a 400 (it ends an SGLang process)."""
    tags, engine = await _tags(service, request)
    never = [tag for tag in tags if tag not in service.released]
    if never:
        raise RequestError(f"not released: {', '.join(never)}", param="tags")
    try:
        await engine.resume_memory(tags)
    except ValueError as error:
        raise RequestError(str(error), param="tags") from None
    service.released -= set(tags)
    logger.info("memory of %s is taken again%s", ", ".join(tags), f"; {service.resting}" if service.resting else "")
    return JSONResponse(None)


async def _tags(service: Service, request: Request) -> tuple[list[str], MemoryEngine]:
    body = parse(await service.read(request), MemoryTags, {})
    unknown = [tag for tag in body.tags if tag not in MEMORY_TAGS]
    if unknown:
        raise RequestError(f"unknown tag {unknown[0]!r}; known are {', '.join(MEMORY_TAGS)}", param="tags")
    if not isinstance(service.engine, MemoryEngine):
        raise RequestError("this engine cannot release its memory")
    return list(dict.fromkeys(body.tags)) or list(MEMORY_TAGS), service.engine


def _version(given: str | int | None, current: int) -> int:
    if given is None:
        return current + 1
    text = str(given)
    if not text.isascii() or not text.isdigit():
        raise RequestError(f"weight_version is {text!r}; versions are integers that grow", param="weight_version")
    if int(text) >= 2**63:
        raise RequestError(f"weight_version {text} is too large; versions lie below 2^63", param="weight_version")
    if int(text) <= current:
        raise RequestError(f"weight_version {text} does not grow; this server holds {current}", param="weight_version")
    return int(text)
