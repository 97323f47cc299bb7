"""The OpenAPI document, built from the structs that requests are parsed into."""

from __future__ import annotations

from typing import Any

import msgspec

from miles_rollout import __version__
from miles_rollout.server import admin, chat, completions, native, profile
from miles_rollout.server.params import Neutral

Body = tuple[type[msgspec.Struct], Neutral]
BODIES: dict[str, Body] = {
    "/generate": (native.NativeRequest, native.REQUEST_NEUTRAL),
    "/v1/completions": (completions.CompletionRequest, completions.NEUTRAL),
    "/v1/chat/completions": (chat.ChatRequest, chat.NEUTRAL),
    "/abort_request": (admin.AbortRequest, admin.ABORT_NEUTRAL),
    "/update_weights_from_disk": (admin.UpdateFromDisk, admin.UPDATE_NEUTRAL),
    "/start_profile": (profile.StartProfile, profile.START_NEUTRAL),
    "/pause_generation": (admin.Pause, {}),
    "/continue_generation": (admin.Continue, {}),
    "/release_memory_occupation": (admin.MemoryTags, {}),
    "/resume_memory_occupation": (admin.MemoryTags, {}),
}
STATUSES = {
    "400": "The request cannot be served as it stands; the message names the field.",
    "401": "The admin token is missing or wrong.",
    "403": "Without an admin token, callers on this machine only.",
    "404": "No such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "Too many requests are being served.",
    "502": "The worker was lost, as often as the request was tried.",
    "503": "Shutting down, paused, memory released, or no worker serves.",
    "504": "The deadline of the request has passed.",
}
ERROR: dict[str, Any] = {
    "type": "object",
    "description": "SGLang's two shapes: `{error: {message}}` and, under /v1, `{object: error, message, type, param, code}`.",
}


_AT_LEAST_1 = {"minimum": 1}
_SEED = {"minimum": 0, "maximum": 2**63 - 1}
BOUNDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_completion_tokens", "n"), _AT_LEAST_1),
    **dict.fromkeys(("min_new_tokens", "min_tokens"), {"minimum": 0}),
    **dict.fromkeys(("sampling_seed", "seed"), _SEED),
    "temperature": {"minimum": 0, "maximum": 1e6},
    "min_p": {"minimum": 0, "maximum": 0.999},
    "top_p": {"minimum": 1e-6, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
}
"""What the parameters' checks allow, wherever they stand."""


def document(routes: dict[str, tuple[list[str], str, bool]], *, title: str, statuses: tuple[str, ...] = ()) -> dict[str, Any]:
    """The document of `routes`: path to (methods, docstring, whether closed). `statuses` are further ones of any route."""
    types = [body for body, _ in BODIES.values()] + [native.NativeSampling]
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    bodies: list[Body] = [*BODIES.values(), (native.NativeSampling, native.SAMPLING_NEUTRAL)]
    for struct, neutral in bodies:
        _close(schemas[struct.__name__], neutral)
    sampling = {"$ref": "#/components/schemas/NativeSampling"}
    either = {"anyOf": [sampling, {"type": "array", "items": sampling}, {"type": "null"}]}
    schemas["NativeRequest"]["properties"]["sampling_params"] = either
    schemas["Error"] = ERROR
    paths: dict[str, Any] = {}
    for path, (methods, text, closed) in routes.items():
        shown = path.replace("{model:path}", "{model}")
        for method in methods:
            paths.setdefault(shown, {})[method.lower()] = _operation(shown, method, text, closed, statuses)
    security = {"token": {"type": "http", "scheme": "bearer", "description": "The admin token."}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
    }


def _close(schema: dict[str, Any], neutral: Neutral) -> None:
    """Nothing unknown passes; parameters that are known and not supported have the values at which they change nothing."""
    for name, found in schema["properties"].items():
        for part in [found, *found.get("anyOf", [])]:
            if part.get("type") in ("integer", "number"):
                part |= BOUNDS.get(name, {})
    for name, allowed in neutral.items():
        schema["properties"][name] = {"enum": [*allowed, None], "description": "Not supported: only where it changes nothing."}
    schema["additionalProperties"] = False


def _operation(path: str, method: str, text: str, closed: bool, statuses: tuple[str, ...]) -> dict[str, Any]:
    reads = path in BODIES and method != "GET"
    codes = ["200", *statuses]
    codes += ["401", "403"] if closed else []
    codes += ["400", "408", "413"] if reads or closed else []
    codes += ["429", "503", "504"] if path == "/generate" or path.startswith("/v1/c") else []
    codes += ["404"] if path.startswith("/v1/") else []
    codes += ["503"] if path.startswith("/health") else []
    responses: dict[str, Any] = {}
    for code in dict.fromkeys(codes):
        if code == "200":
            responses[code] = {"description": "Done."}
        else:
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            responses[code] = {"description": STATUSES[code]} | ({} if path.startswith("/health") else {"content": content})
    found: dict[str, Any] = {"summary": text.strip().splitlines()[0], "responses": responses}
    if reads:
        schema = {"$ref": f"#/components/schemas/{BODIES[path][0].__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if closed:
        found["security"] = [{"token": []}]
    return found
