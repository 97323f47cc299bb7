"""Around every request: an id, a log line, a span."""

from __future__ import annotations

import logging
import re
import time
import uuid

from h11 import LocalProtocolError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miles_rollout.server.logs import request_id
from miles_rollout.server.tracing import current

logger = logging.getLogger("miles_rollout.access")
QUIET = (
    "/health",
    "/health_generate",
    "/health_live",
    "/metrics",
    "/get_model_info",
    "/model_info",
    "/get_server_info",
    "/server_info",
)
"""Polled; logged at debug level."""
_GOOD_ID = re.compile(r"[A-Za-z0-9._:/#-]{1,128}")


class Observed:
    """ASGI middleware. The id is the caller's `X-Request-Id` when it is a harmless one, else drawn; the reply repeats it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        found = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = found
        token = request_id.set(found)
        tracing = current()
        try:
            if tracing is None or scope["path"] in QUIET:
                await self._serve(scope, receive, send, found)
                return
            with tracing.request(f"{scope['method']} {scope['path']}", headers) as span:
                status = await self._serve(scope, receive, send, found)
                span.set_attribute("http.request.method", scope["method"])
                span.set_attribute("http.response.status_code", status)
                span.set_attribute("miles.request_id", found)
        finally:
            request_id.reset(token)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, found: str) -> int:
        started = time.perf_counter()
        status = 500

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", found.encode())]
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except (
            LocalProtocolError
        ) as error:  # the caller broke HTTP in mid-request; no reply can be sent, and it is nobody's bug here
            logger.debug("no reply to a broken request: %s", error)
        finally:
            level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
            if logger.isEnabledFor(level):
                ms = round((time.perf_counter() - started) * 1e3, 2)
                fields = {"method": scope["method"], "path": scope["path"], "status": status, "duration_ms": ms}
                if why := scope["state"].get("error"):
                    fields["error"] = why
                logger.log(level, "request", extra={"fields": fields})
        return status
