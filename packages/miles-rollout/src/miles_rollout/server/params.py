"""From a JSON body to a checked struct: nothing unknown, mistyped or unsupported passes in silence."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from miles_rollout.server.errors import RequestError

S = TypeVar("S", bound=msgspec.Struct)
Neutral = Mapping[str, tuple[Any, ...]]
"""Parameters we know but do not implement, with the values at which they change nothing. null is always one."""


async def read_body(request: Request, max_bytes: int, timeout_s: float = 60.0) -> bytes:
    """The body; raises RequestError 413 for more than `max_bytes`, 408 when it takes longer than `timeout_s`."""
    declared = request.headers.get("content-length", "0")
    too_large = RequestError(f"the request body is larger than this server's limit of {max_bytes} bytes", status=413)
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise RequestError(f"the request body did not arrive within {timeout_s:g} s", status=408) from None
    except ClientDisconnect:
        raise RequestError("the connection closed before the body was complete") from None
    return b"".join(chunks)


async def read_object(request: Request, max_bytes: int, timeout_s: float = 60.0) -> dict[str, Any]:
    """The JSON object in the body; raises RequestError 400 for anything else, and those of `read_body`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"content-type is {kind or 'missing'}; send application/json", param="content-type")
    body = await read_body(request, max_bytes, timeout_s)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {_json_name(value)}; an object is needed")
    return value


def parse(data: Any, into: type[S], neutral: Neutral, *, where: str = "") -> S:
    """Build `into` from a JSON object. null means "not given".

    Raises RequestError naming the field: unknown (with the nearest known name), of the wrong type, or known to the API
    but not to this server and not at a value where it does nothing.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(data, dict):
        raise RequestError(f"{where or 'body'} is a JSON {_json_name(data)}; an object is needed", param=where or None)
    known = frozenset(into.__struct_encode_fields__)  # `structs.fields` evaluates annotations anew at every call
    kept = {}
    for name, value in data.items():
        if value is None and (name in known or name in neutral):
            continue
        if name in known:
            kept[name] = value
        elif name in neutral:
            _check_neutral(name, value, neutral[name], prefix)
        else:
            near = difflib.get_close_matches(name, [*known, *neutral], n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(sorted(known))}"
            raise RequestError(f'unknown parameter "{prefix}{name}"{hint}', param=prefix + name)
    try:
        return msgspec.convert(kept, into)
    except msgspec.ValidationError as error:
        raise _type_error(str(error), prefix) from None


def _check_neutral(name: str, value: Any, allowed: tuple[Any, ...], prefix: str) -> None:
    if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
        return
    only = f" (only {' or '.join(msgspec.json.encode(each).decode() for each in allowed)})" if allowed else ""
    raise RequestError(f'parameter "{prefix}{name}" is not supported by this server{only}', param=prefix + name)


def _type_error(message: str, prefix: str) -> RequestError:
    """msgspec says "Expected `int`, got `str` - at `$.n`"; say it with the field first."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, flags=re.DOTALL)
    if found is not None:
        what, path = found.group(1), prefix + found.group(2).replace("[...]", "")
        return RequestError(f'parameter "{path}": {what[0].lower()}{what[1:]}', param=path)
    missing = re.search(r"missing required field `(.*?)`", message)
    return RequestError(message, param=prefix + missing.group(1) if missing else None)


def _json_name(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
