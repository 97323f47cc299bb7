"""Endpoints for weights that come straight from a trainer: SGLang's names, Miles' records (`weights.offer`), no pickle.

The bytes never pass through HTTP; one request carries manifest and offer, and is answered when the weights are swapped or
refused. A refusal is a 400 that names the tensor; the old weights serve on.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from miles_rollout.server.admin import confined, guarded
from miles_rollout.server.errors import JSONResponse, RequestError, answers_errors, counted, scrub
from miles_rollout.server.service import Service
from miles_rollout.weights.offer import BroadcastOffer, DiskOffer, GroupInvitation, WeightUpdate
from miles_rollout.wire import EngineInfo, WireError, check_schema

logger = logging.getLogger("miles_rollout.server")
T = TypeVar("T")


class WeightSink(Protocol):
    """What stands behind the endpoints: `weights.receiver.WeightReceiver`."""

    async def update(self, update: WeightUpdate) -> EngineInfo:
        """Stage, verify, swap. Raises ValueError or TimeoutError with the old weights in place."""
        ...

    async def join(self, invitation: GroupInvitation) -> None:
        """Join a group for broadcasts."""
        ...

    async def leave(self, name: str) -> bool:
        """Leave it; False when it was not joined."""
        ...


class LeaveGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /destroy_weights_update_group."""

    group_name: str


def accept_weights(app: Starlette, sink: WeightSink) -> None:
    """Add the endpoints to an application made by `create_app`, as closed as its other admin endpoints."""
    service: Service = app.state.service
    for path, function in (
        ("/update_weights_from_tensor", update_from_tensor),
        ("/update_weights_from_distributed", update_from_distributed),
        ("/init_weights_update_group", init_group),
        ("/destroy_weights_update_group", destroy_group),
    ):
        handler = guarded(service.config.admin_token, functools.partial(function, service, sink))
        handler = counted(service.num_replies, path, answers_errors(handler, openai=False))
        app.routes.append(Route(path, handler, methods=["POST"]))
        service.weight_routes[path] = function.__doc__ or ""


async def update_from_tensor(service: Service, sink: WeightSink, request: Request) -> Response:
    """POST /update_weights_from_tensor: from shared memory, lent GPU memory or a folder of updates."""
    update = await _body(request, service, WeightUpdate)
    if isinstance(update.offer, BroadcastOffer):
        raise RequestError("a broadcast comes through /update_weights_from_distributed", param="offer")
    if isinstance(update.offer, DiskOffer):
        try:
            directory = confined(update.offer.directory, service.config.weight_roots)
        except ValueError as error:
            return _refused(error)
        update = msgspec.structs.replace(update, offer=msgspec.structs.replace(update.offer, directory=directory))
    return await _update(service, sink, update)


async def update_from_distributed(service: Service, sink: WeightSink, request: Request) -> Response:
    """POST /update_weights_from_distributed: by broadcast in a group this engine has joined."""
    update = await _body(request, service, WeightUpdate)
    if not isinstance(update.offer, BroadcastOffer):
        raise RequestError("only broadcasts come here; the others through /update_weights_from_tensor", param="offer")
    return await _update(service, sink, update)


async def init_group(service: Service, sink: WeightSink, request: Request) -> Response:
    """POST /init_weights_update_group: answered once all members have met."""
    invitation = await _body(request, service, GroupInvitation)
    try:
        await sink.join(invitation)
    except (ValueError, TimeoutError) as error:
        return _refused(error)
    return JSONResponse({"success": True, "message": f"Joined group {invitation.name}."})


async def destroy_group(service: Service, sink: WeightSink, request: Request) -> Response:
    """POST /destroy_weights_update_group."""
    name = (await _body(request, service, LeaveGroup)).group_name
    if not await sink.leave(name):
        return _refused(ValueError(f"this engine is in no group {name!r}"))
    return JSONResponse({"success": True, "message": f"Left group {name}."})


async def _update(service: Service, sink: WeightSink, update: WeightUpdate) -> Response:
    async with service.updating:
        before = service.engine.info().weight_version
        try:
            info = await sink.update(update)
        except (ValueError, OSError, TimeoutError) as error:
            logger.warning("weight version %d was refused, %d stays: %s", update.manifest.version, before, error)
            return _refused(error)
    logger.info("weight version %d, by %s, is served; before it %d", info.weight_version, type(update.offer).__name__, before)
    message = f"Succeeded to update model weights. Weight version updated to {info.weight_version}."
    return JSONResponse({"success": True, "message": message, "engine": msgspec.to_builtins(info)})


def _refused(error: Exception) -> Response:
    return JSONResponse(
        {"success": False, "message": scrub(str(error)), "timed_out": isinstance(error, TimeoutError)}, status_code=400
    )


async def _body(request: Request, service: Service, into: type[T]) -> T:
    body: dict[str, Any] = await service.read(request)
    if "serialized_named_tensors" in body:
        raise RequestError(
            "serialized_named_tensors is a pickle, which can run code; send manifest and offer (miles_rollout.weights)",
            param="serialized_named_tensors",
        )
    try:
        found = msgspec.convert(body, into)
        check_schema(found)
        return found
    except (msgspec.ValidationError, WireError) as error:
        raise RequestError(f"not a {into.__name__}: {error}") from None
