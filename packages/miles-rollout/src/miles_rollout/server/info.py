"""Endpoints that only report: health, model, server, metrics."""

from __future__ import annotations

import asyncio
import logging
import re

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from miles_rollout import __version__
from miles_rollout.server.errors import JSONResponse
from miles_rollout.server.openai_common import check_model, model_card
from miles_rollout.server.service import Service, new_id
from miles_rollout.server.status import table_page
from miles_rollout.wire import GenerateRequest, SamplingParams

logger = logging.getLogger("miles_rollout.server")

SGLANG_NAMES = {
    "num_running": ("sglang:num_running_reqs", "gauge"),
    "num_queued": ("sglang:num_queue_reqs", "gauge"),
    "kv_used_ratio": ("sglang:token_usage", "gauge"),
    "num_prompt_tokens": ("sglang:prompt_tokens_total", "counter"),
    "num_generated_tokens": ("sglang:generation_tokens_total", "counter"),
    "num_cached_tokens": ("sglang:cached_tokens_total", "counter"),
}
"""Our names of engine figures that mean the same as a metric of SGLang, which existing dashboards show."""


async def health(service: Service, request: Request) -> Response:
    """GET /health and /health_generate: 200 when the engine makes a token, or visibly works on others', within `health_s`."""
    if service.resting:
        return Response(status_code=503)  # as SGLang: a paused engine makes no token
    before = _progress(service)
    token_id = min(service.engine.info().eos_token_ids, default=0)
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    probe = GenerateRequest(request_id=f"health-{new_id()}", input_ids=(token_id,), sampling=sampling)
    try:
        async with asyncio.timeout(service.config.health_s):
            await service.engine.generate(probe)
    except TimeoutError:
        if _progress(service) == before:
            logger.error("the engine made no token and no progress in %g s", service.config.health_s)
            return Response(status_code=503)
    except Exception:  # whatever it is, the engine does not generate
        logger.exception("the health check failed")
        return Response(status_code=503)
    return Response(status_code=200)


async def live(service: Service, request: Request) -> Response:
    """GET /health_live: as /health, but 200 while there is a reason not to generate.

    Paused, asleep, without weights, updating, shutting down.
    """
    if service.resting or service.updating.locked():
        return Response(status_code=200)
    response = await health(service, request)
    if service.resting or service.updating.locked():
        return Response(status_code=200)  # the reason came meanwhile
    return response


def _progress(service: Service) -> list[float | None]:
    """Figures that grow whenever the engine works, and not when a request is merely queued."""
    figures = service.engine.metrics()
    return [figures.get(name) for name in ("num_generated_tokens", "num_computed_tokens")]


async def model_info(service: Service, request: Request) -> Response:
    """GET /model_info and /get_model_info."""
    info = service.engine.info()
    return JSONResponse(
        {
            "model_path": info.model,
            "tokenizer_path": info.model if service.tokenizer is not None else None,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": str(info.weight_version),
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "contract_digest": info.contract_digest,
            "vocab_size": info.vocab_size,
            "eos_token_ids": info.eos_token_ids,
        }
    )


async def server_info(service: Service, request: Request) -> Response:
    """GET /get_server_info and /server_info. `engine` is the EngineInfo record, `metrics` the engine's figures."""
    info = service.engine.info()
    return JSONResponse(
        {
            "model_path": info.model,
            "served_model_name": service.model_name,
            "context_length": info.max_context,
            "max_running_requests": info.max_running,
            "weight_version": str(info.weight_version),
            "version": __version__,
            "server": "miles-rollout",
            "draining": service.draining,
            "paused": service.paused,
            "memory_released": sorted(service.released),
            "resting": service.resting,
            "num_requests": len(service.running),
            "engine": info,
            "metrics": service.engine.metrics(),
        }
    )


async def status(service: Service, request: Request) -> Response:
    """GET /status: a page for people."""
    info = service.engine.info()
    facts = {
        "model": service.model_name, "weight version": info.weight_version, "contract": info.contract_digest,
        "running": len(service.running), "draining": service.draining, "paused": service.paused or False,
    }  # fmt: skip
    rows = [{"figure": name, "value": f"{value:g}"} for name, value in service.engine.metrics().items()]
    return table_page("miles-rollout server", facts, rows)


async def models(service: Service, request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [model_card(service)]})


async def model(service: Service, request: Request) -> Response:
    """GET /v1/models/{model}."""
    check_model(service, request.path_params["model"])
    return JSONResponse(model_card(service))


async def metrics(service: Service, request: Request) -> Response:
    """GET /metrics, Prometheus text format. Engine figures appear as `miles_rollout_NAME`, known ones also as SGLang's."""
    label = f'{{model_name="{_escape(service.model_name)}"}}'
    lines: list[str] = []
    for name, value in service.engine.metrics().items():
        lines += _family(f"miles_rollout_{re.sub('[^a-zA-Z0-9_]', '_', name)}", "untyped", label, value)
        if name in SGLANG_NAMES:
            theirs, kind = SGLANG_NAMES[name]
            lines += _family(theirs, kind, label, value)
    lines += service.timings.lines(label[1:-1])
    lines += _family("miles_rollout_http_requests_active", "gauge", label, len(service.running))
    lines.append("# TYPE miles_rollout_http_responses_total counter")
    for (path, status), count in sorted(service.num_replies.items()):
        lines.append(f'miles_rollout_http_responses_total{{path="{_escape(path)}",status="{status}"}} {count}')
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _family(name: str, kind: str, label: str, value: float) -> list[str]:
    return [f"# TYPE {name} {kind}", f"{name}{label} {float(value)!r}"]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
