"""Checks of refusals, of requests that must not kill a server, and of the admin API."""

from __future__ import annotations

from typing import Any

from miles_rollout.conformance.native import GREEDY, generated
from miles_rollout.conformance.shapes import Generated, ModelInfo, Updated
from miles_rollout.conformance.target import JSON, Target, Unsupported, demand, shaped

SHORT = GREEDY | {"max_new_tokens": 2}
GUARDED = ("/abort_request", "/flush_cache", "/update_weights_from_disk", "/pause_generation", "/continue_generation")


async def malformed(target: Target) -> None:
    """A body that is no JSON object is refused."""
    for raw in (b"{", b"", b"[1,2]"):
        await target.refused("/generate", raw=raw)


async def bad_prompts(target: Target) -> None:
    """No prompt, an empty or wrongly typed one and one that fills the context are refused."""
    fill = [5] * target.context_length
    for prompt in ({}, {"text": 5}, {"input_ids": ["a", "b"]}, {"input_ids": []}, {"text": ""}, {"input_ids": fill}):
        await target.refused("/generate", prompt | {"sampling_params": SHORT})
    ids = target.options.prompt_ids
    body = {"input_ids": ids, "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 100}
    await target.refused("/generate", body)


async def bad_sampling(target: Target) -> None:
    """Sampling parameters outside their range are refused."""
    text = target.options.texts[0]
    for wrong in ({"temperature": -1}, {"top_p": 2}, {"top_p": 0}, {"min_p": 2}, {"max_new_tokens": -1}, {"min_new_tokens": 9}):
        await target.refused("/generate", {"text": text, "sampling_params": SHORT | wrong})
    await target.refused("/generate", {"text": text, "sampling_params": 3})


async def bad_types(target: Target) -> None:
    """Wrong types and unknown names among the sampling parameters are refused. SGLang answers 500 to them."""
    also = () if target.is_miles else (500,)
    for wrong in ({"temperature": "hot"}, {"max_new_tokens": "x"}, {"stop": 5}, {"no_such_param": 1}):
        await target.refused("/generate", {"text": target.options.texts[0], "sampling_params": SHORT | wrong}, also=also)


async def killers(target: Target) -> None:
    """Requests that end an SGLang 0.5.17 process are refused, and the server goes on. Not sent to SGLang."""
    if not target.is_miles:
        raise Unsupported("not sent: these requests are known to end an SGLang server")
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/generate", {"input_ids": [5, -1], "sampling_params": SHORT}),
        ("/generate", {"input_ids": [5, 2**31 - 1], "sampling_params": SHORT}),
        ("/generate", {"text": target.options.texts[0], "return_logprob": True, "logprob_start_len": -5}),
        ("/resume_memory_occupation", {"tags": ["kv_cache"]}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["aGVsbG8="]}),
        ("/update_weights_from_distributed", {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "none"}),
    )
    for path, body in cases:
        response = await target.send("POST", path, body)
        demand(400 <= response.status_code < 500, f"POST {path} {body}: HTTP {response.status_code}, expected 4xx")
    generated(await target.ask("/generate", {"input_ids": target.options.prompt_ids, "sampling_params": SHORT}))


async def abort(target: Target) -> None:
    """An abort ends a running request with reason "abort"; an unknown id is no error."""
    response = await target.send("POST", "/abort_request", {"rid": "nobody"})
    demand(response.status_code == 200, f"/abort_request of an unknown id: HTTP {response.status_code}")
    limit = max(target.context_length - 248, target.context_length // 2)
    body = {"rid": "victim2", "text": target.options.texts[0], "stream": True}
    sampling = GREEDY | {"max_new_tokens": limit}
    last: Generated | None = None
    sent = False
    async for event in target.events("/generate", body | {"sampling_params": sampling}):
        last = shaped(event, Generated, "a stream event")
        if not sent:
            sent = True
            response = await target.send("POST", "/abort_request", {"rid": "victim2"})
            demand(response.status_code == 200, f"/abort_request: HTTP {response.status_code}")
    finish = last.meta_info.finish_reason if last is not None else None
    demand(finish is not None and finish.type == "abort", f"the aborted request ended with {finish}")


async def flush(target: Target) -> None:
    """An idle server flushes its prefix cache."""
    response = await target.send("POST", "/flush_cache")
    if response.status_code in (404, 405) or (response.status_code == 400 and "no prefix cache" in response.text):
        raise Unsupported("no prefix cache to flush on request")
    demand(response.status_code == 200, f"/flush_cache: HTTP {response.status_code}: {response.text[:100]}")


async def pause(target: Target) -> None:
    """Pause and continue answer 200, a mode that does not exist and a missing body 400."""
    await target.optional("/pause_generation", {"mode": "abort"})
    await target.optional("/continue_generation", {})
    await target.refused("/pause_generation", {"mode": "sleep"})
    await target.refused("/pause_generation", raw=b"")
    generated(await target.ask("/generate", {"input_ids": target.options.prompt_ids, "sampling_params": GREEDY}))


async def bad_update(target: Target) -> None:
    """A weight update that cannot be read is refused and changes nothing."""
    before = shaped(await target.ask("/model_info", method="GET"), ModelInfo, "/model_info").weight_version
    await target.refused("/update_weights_from_disk", {})
    response = await target.send("POST", "/update_weights_from_disk", {"model_path": "/does/not/exist"})
    demand(response.status_code == 400, f"HTTP {response.status_code}, expected 400")
    body = response.json()
    if "success" not in body and "does not load weights" in response.text:
        raise Unsupported("this server's engine does not load weights from disk")
    demand(not shaped(body, Updated, "/update_weights_from_disk").success, "success for a directory that does not exist")
    after = shaped(await target.ask("/model_info", method="GET"), ModelInfo, "/model_info").weight_version
    demand(before == after, f"weight_version was {before}, is {after}")


async def update(target: Target) -> None:
    """After an update the version is told by the model report and by every completion."""
    if target.options.weights is None:
        raise Unsupported("no weights directory given")
    before = shaped(await target.ask("/model_info", method="GET"), ModelInfo, "/model_info").weight_version
    version = str(int(before) + 1) if before.isdigit() else "1"
    body = {"model_path": target.options.weights, "weight_version": version}
    demand(shaped(await target.ask("/update_weights_from_disk", body), Updated, "update").success, "success is false")
    after = shaped(await target.ask("/model_info", method="GET"), ModelInfo, "/model_info").weight_version
    demand(after == version, f"/model_info says {after}, the update was to {version}")
    reply = generated(await target.ask("/generate", {"input_ids": target.options.prompt_ids, "sampling_params": SHORT}))
    demand(reply.meta_info.weight_version == version, f"a token was sampled under {reply.meta_info.weight_version}")


async def authorisation(target: Target) -> None:
    """With an admin token, endpoints that change something refuse callers without it."""
    if target.options.admin_token is None:
        raise Unsupported("no admin token given")
    for path in GUARDED:
        for headers in (JSON, JSON | {"authorization": "Bearer wrong"}):
            response = await target.send("POST", path, {}, headers=headers)
            if response.status_code == 404 and path not in GUARDED[:3]:
                continue
            demand(response.status_code in (401, 403), f"POST {path} without the token: HTTP {response.status_code}")


CHECKS = (malformed, bad_prompts, bad_sampling, bad_types, killers, abort, flush, pause, bad_update, update, authorisation)
