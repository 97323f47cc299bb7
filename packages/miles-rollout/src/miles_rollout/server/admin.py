"""Endpoints that change what the server does: abort, flush, new weights. Closed to everybody but the operator."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from miles_rollout.server.errors import Handler, JSONResponse, RequestError
from miles_rollout.server.params import Neutral, parse, read_object
from miles_rollout.server.service import FlushableEngine, Service

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


ABORT_NEUTRAL: Neutral = {"abort_message": ()}
UPDATE_NEUTRAL: Neutral = {
    "load_format": ("auto", "safetensors"), "flush_cache": (True,), "keep_pause": (False,), "is_async": (False,),
    "token_step": (0,), "recapture_cuda_graph": (False,), "torch_empty_cache": (False,), "manifest": (),
}  # fmt: skip


def check_rights(token: str | None, request: Request) -> None:
    """Raise RequestError 401 or 403 unless the caller holds the admin token or, where there is none, sits on loopback."""
    if token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError("this endpoint needs the admin token: send Authorization: Bearer TOKEN", status=401)
        return
    local = request.client is not None and _is_loopback(request.client.host)
    if not local or any(name in request.headers for name in PROXY_HEADERS):
        raise RequestError("this endpoint answers callers on this machine only; start the server with an admin token", status=403)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def guarded(token: str | None, handler: Handler) -> Handler:
    """A route that checks rights before it reads anything."""

    async def endpoint(request: Request) -> Response:
        check_rights(token, request)
        return await handler(request)

    return endpoint


async def abort_request(service: Service, request: Request) -> Response:
    """POST /abort_request: the completions of a request, or of all, end with reason "abort"."""
    body = parse(await read_object(request, service.config.max_body_bytes), AbortRequest, ABORT_NEUTRAL)
    if body.abort_all:
        await service.abort_all()
    elif body.rid:
        await service.engine.abort(body.rid)
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
    body = parse(await read_object(request, service.config.max_body_bytes), UpdateFromDisk, UPDATE_NEUTRAL)
    if service.load_weights is None:
        raise RequestError("this server's engine does not load weights from disk")
    async with service.updating:
        info = service.engine.info()
        version = _version(body.weight_version, info.weight_version)
        try:
            manifest, tensors = await asyncio.to_thread(service.load_weights, body.model_path, version, info.contract_digest)
            if body.abort_all_requests:
                await service.abort_all()
            await service.engine.update_weights(manifest, tensors)
        except (ValueError, OSError) as error:
            return JSONResponse({"success": False, "message": str(error), "num_paused_requests": 0}, status_code=400)
    message = f"Succeeded to update model weights. Weight version updated to {version}."
    return JSONResponse({"success": True, "message": message, "num_paused_requests": 0})


def _version(given: str | int | None, current: int) -> int:
    if given is None:
        return current + 1
    text = str(given)
    if not text.isascii() or not text.isdigit():
        raise RequestError(f"weight_version is {text!r}; versions are integers that grow", param="weight_version")
    if int(text) <= current:
        raise RequestError(f"weight_version {text} does not grow; this server holds {current}", param="weight_version")
    return int(text)
