"""Checks of SGLang's native API: reports, /generate, streams."""

from __future__ import annotations

from typing import Any

from miles_rollout.conformance.shapes import Generated, ModelInfo
from miles_rollout.conformance.target import CheckFailed, Target, Unsupported, demand, shaped

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def generated(reply: Any, what: str = "/generate") -> Generated:
    """One finished completion, with counts that agree with its token ids."""
    found = shaped(reply, Generated, what)
    demand(found.meta_info.finish_reason is not None, f"{what}: finish_reason is null in a finished reply")
    count = found.meta_info.completion_tokens
    demand(count == len(found.output_ids), f"{what}: completion_tokens is {count}, output_ids has {len(found.output_ids)}")
    return found


def many(reply: Any, count: int) -> list[Generated]:
    """A list of `count` finished completions."""
    demand(isinstance(reply, list) and len(reply) == count, f"/generate: expected a list of {count} replies")
    return [generated(each) for each in reply]


async def greedy_text(target: Target) -> Generated:
    """The reply the checks of stops and streams compare with."""
    return generated(await target.ask("/generate", {"text": target.options.texts[0], "sampling_params": GREEDY}))


async def health(target: Target) -> None:
    """GET /health and /health_generate answer 200."""
    for path in ("/health", "/health_generate"):
        status = (await target.send("GET", path)).status_code
        demand(status == 200, f"GET {path}: HTTP {status}")


async def health_head(target: Target) -> None:
    """A HEAD is refused with 405, as SGLang does."""
    status = (await target.send("HEAD", "/health")).status_code
    demand(status == 405, f"HEAD /health: HTTP {status}, expected 405")


async def model_info(target: Target) -> None:
    """Both names of the model report, with the fields trainers read."""
    for path in ("/model_info", "/get_model_info"):
        info = shaped(await target.ask(path, method="GET"), ModelInfo, path)
        demand(info.is_generation, f"{path}: is_generation is false")


async def server_info(target: Target) -> None:
    """The server report is an object that names the model."""
    info = await target.ask("/get_server_info", method="GET")
    demand(isinstance(info, dict) and isinstance(info.get("model_path"), str), "/get_server_info: no model_path")


async def unknown_route(target: Target) -> None:
    """404 with `detail`."""
    response = await target.send("GET", "/no_such_route")
    demand(response.status_code == 404, f"HTTP {response.status_code}, expected 404")
    demand(response.json() == {"detail": "Not Found"}, f"expected detail, got {response.text[:80]}")


async def wrong_method(target: Target) -> None:
    """405 with `detail`."""
    response = await target.send("GET", "/generate")
    demand(response.status_code == 405, f"HTTP {response.status_code}, expected 405")
    demand("detail" in response.json(), f"expected detail, got {response.text[:80]}")


async def token_ids_in(target: Target) -> None:
    """Token ids in, eight greedy token ids out, ended by length."""
    ids = target.options.prompt_ids
    reply = generated(await target.ask("/generate", {"input_ids": ids, "sampling_params": GREEDY}))
    demand(len(reply.output_ids) == 8, f"{len(reply.output_ids)} tokens for max_new_tokens 8 with ignore_eos")
    finish = reply.meta_info.finish_reason
    demand(finish is not None and finish.type == "length" and finish.length == 8, f"finish_reason is {finish}")
    demand(reply.meta_info.prompt_tokens == len(ids), f"prompt_tokens is {reply.meta_info.prompt_tokens} for {len(ids)} ids")


async def text_in(target: Target) -> None:
    """Text in, text out; the same greedy request gives the same tokens, by PUT too."""
    first, second = await greedy_text(target), await greedy_text(target)
    demand(first.output_ids == second.output_ids, f"greedy twice: {first.output_ids} and {second.output_ids}")
    put = await target.ask("/generate", {"text": target.options.texts[0], "sampling_params": GREEDY}, method="PUT")
    demand(generated(put).output_ids == first.output_ids, "PUT answers other tokens than POST")


async def explicit_rid(target: Target) -> None:
    """The caller's request id comes back."""
    body = {"rid": "my-rid-1", "text": target.options.texts[0], "sampling_params": GREEDY}
    reply = generated(await target.ask("/generate", body))
    demand(reply.meta_info.id == "my-rid-1", f"id is {reply.meta_info.id!r}, sent my-rid-1")


async def prompt_logprobs(target: Target) -> None:
    """logprob_start_len k gives len-k prompt entries of [logprob, id, text]; the first is null; each output token has one."""
    ids = list(target.options.prompt_ids)
    for start in (0, 3):
        body = {"input_ids": ids, "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": start}
        reply = generated(await target.ask("/generate", body))
        given, made = reply.meta_info.input_token_logprobs, reply.meta_info.output_token_logprobs
        if given is None or made is None:
            raise CheckFailed("return_logprob: no input_token_logprobs or output_token_logprobs")
        demand([entry[1] for entry in given] == ids[start:], f"start {start}: prompt entries name {[e[1] for e in given]}")
        demand(given[0][0] is None, f"start {start}: the first prompt entry is {given[0][0]}, expected null")
        demand(all(e[0] is not None and e[0] <= 0 for e in given[1:]), f"start {start}: a prompt logprob is null or positive")
        demand([entry[1] for entry in made] == reply.output_ids, "output_token_logprobs and output_ids name other tokens")
        demand(all(e[0] is not None and e[0] <= 0 for e in made), "an output logprob is null or positive")


async def seed_repeats(target: Target) -> None:
    """The same sampling_seed gives the same tokens."""
    sampling = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True, "sampling_seed": 42}
    body = {"input_ids": target.options.prompt_ids, "sampling_params": sampling}
    first, second = [generated(await target.ask("/generate", body)) for _ in range(2)]
    if first.output_ids != second.output_ids and not target.seeds_hold:
        raise Unsupported("sampling_seed is ignored: SGLang needs --enable-deterministic-inference")
    demand(first.output_ids == second.output_ids, f"seed 42 twice: {first.output_ids} and {second.output_ids}")


async def several_completions(target: Target) -> None:
    """n=2 gives two replies whose ids share a beginning and differ."""
    sampling = {"n": 2, "temperature": 1.0, "max_new_tokens": 4, "ignore_eos": True}
    replies = many(await target.ask("/generate", {"text": target.options.texts[0], "sampling_params": sampling}), 2)
    ids = [reply.meta_info.id for reply in replies]
    starts = {each.rpartition("_")[0] for each in ids}
    demand(len(set(ids)) == 2 and len(starts) == 1 and "" not in starts, f"ids are {ids}, expected RID_x and RID_y")


async def batch(target: Target) -> None:
    """A list of prompts gives a list of replies in order; a string rid is numbered, lists apply one by one."""
    params = GREEDY | {"max_new_tokens": 3}
    many(await target.ask("/generate", {"text": target.options.texts, "sampling_params": params}), 2)
    prompts = [target.options.prompt_ids, target.options.prompt_ids[:3]]
    body: dict[str, Any] = {"input_ids": prompts, "rid": "pre", "sampling_params": GREEDY | {"max_new_tokens": 2}}
    replies = many(await target.ask("/generate", body), 2)
    demand([r.meta_info.id for r in replies] == ["pre_0", "pre_1"], f"ids are {[r.meta_info.id for r in replies]}")
    demand([r.meta_info.prompt_tokens for r in replies] == [len(p) for p in prompts], "replies are not in request order")
    each = [GREEDY | {"max_new_tokens": 2}, GREEDY | {"max_new_tokens": 4}]
    body = {"input_ids": prompts, "rid": ["b0", "b1"], "sampling_params": each, "return_logprob": [True, False]}
    replies = many(await target.ask("/generate", body), 2)
    demand([len(r.output_ids) for r in replies] == [2, 4], "sampling_params given as a list are not applied one by one")
    demand(bool(replies[0].meta_info.output_token_logprobs), "return_logprob [true, false]: the first has no logprobs")
    demand(not replies[1].meta_info.output_token_logprobs, "return_logprob [true, false]: the second has logprobs")


async def stop_token(target: Target) -> None:
    """A stop token ends the completion, is named in finish_reason and kept in the ids."""
    ids = (await greedy_text(target)).output_ids
    fresh = [i for i in range(1, len(ids)) if ids[i] not in ids[:i]]
    at = fresh[0] if fresh else 0
    sampling = {"temperature": 0, "max_new_tokens": 8, "stop_token_ids": [ids[at]]}
    reply = generated(await target.ask("/generate", {"text": target.options.texts[0], "sampling_params": sampling}))
    finish = reply.meta_info.finish_reason
    demand(reply.output_ids == ids[: at + 1], f"tokens are {reply.output_ids}, expected {ids[: at + 1]}")
    demand(finish is not None and (finish.type, finish.matched) == ("stop", ids[at]), f"finish_reason is {finish}")


async def stop_string(target: Target) -> None:
    """A stop string ends the completion, is cut from the text and named; the ids are kept."""
    first = await greedy_text(target)
    body = {"text": target.options.texts[0], "sampling_params": GREEDY | {"max_new_tokens": 5}, "stream": True}
    pieces = [shaped(event, Generated, "a stream event").text async for event in target.events("/generate", body)]
    piece = pieces[0] if pieces else ""
    if not piece.strip("\ufffd"):
        raise Unsupported("the first greedy token has no text of its own to stop at")
    sampling = GREEDY | {"stop": [piece]}
    reply = generated(await target.ask("/generate", {"text": target.options.texts[0], "sampling_params": sampling}))
    finish = reply.meta_info.finish_reason
    demand(reply.text == "", f"text is {reply.text!r}, the stop string {piece!r} was its beginning")
    demand(reply.output_ids == first.output_ids[:1], f"ids are {reply.output_ids}, expected {first.output_ids[:1]}")
    demand(finish is not None and (finish.type, finish.matched) == ("stop", piece), f"finish_reason is {finish}")


async def _grow(target: Target, body: dict[str, Any]) -> dict[int | None, Generated]:
    """The last event of each completion of a stream, every event checked to hold all the one before it held."""
    last: dict[int | None, Generated] = {}
    async for event in target.events("/generate", body):
        found = shaped(event, Generated, "a stream event")
        ids, counted = found.output_ids, found.meta_info.completion_tokens
        demand(counted == len(ids), f"a stream event has {len(ids)} ids and completion_tokens {counted}")
        before = last[found.index].output_ids if found.index in last else []
        demand(ids[: len(before)] == before, f"events are not cumulative: {before} then {ids}")
        last[found.index] = found
    return last


async def stream(target: Target) -> None:
    """Events are cumulative, end with [DONE] and say at last what the plain reply says."""
    whole = (await greedy_text(target)).output_ids[:5]
    sampling = GREEDY | {"max_new_tokens": 5}
    ended = await _grow(target, {"text": target.options.texts[0], "sampling_params": sampling, "stream": True})
    demand(list(ended) == [None], f"indices are {list(ended)}, a single completion has none")
    demand(ended[None].output_ids == whole, f"streamed {ended[None].output_ids}, in one piece {whole}")
    demand(ended[None].meta_info.finish_reason is not None, "the last event has no finish_reason")


async def stream_batch(target: Target) -> None:
    """A batch streams its replies side by side, told apart by `index`."""
    params = GREEDY | {"max_new_tokens": 2}
    ended = await _grow(target, {"text": target.options.texts, "sampling_params": params, "stream": True})
    counts = {i: len(r.output_ids) for i, r in ended.items() if r.meta_info.finish_reason is not None}
    demand(counts == {0: 2, 1: 2}, f"completions that ended, by index: {counts}")


async def metrics(target: Target) -> None:
    """GET /metrics is Prometheus text with SGLang's names."""
    response = await target.optional("/metrics", method="GET")
    kind = response.headers.get("content-type", "")
    demand(kind.startswith("text/plain"), f"content-type is {kind!r}")
    for name in ("sglang:prompt_tokens_total", "sglang:generation_tokens_total"):
        demand(f"# TYPE {name} counter" in response.text, f"no counter {name}")


CHECKS = (
    health, health_head, model_info, server_info, unknown_route, wrong_method, token_ids_in, text_in, explicit_rid,
    prompt_logprobs, seed_repeats, several_completions, batch, stop_token, stop_string, stream, stream_batch, metrics,
)  # fmt: skip
