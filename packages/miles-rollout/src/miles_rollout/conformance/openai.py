"""Checks of OpenAI's /v1 routes."""

from __future__ import annotations

from typing import Any

from miles_rollout.conformance.shapes import ChatEvent, ChatReply, ModelList, TextReply
from miles_rollout.conformance.target import CheckFailed, Target, Unsupported, demand, shaped

FIXED: dict[str, Any] = {"model": "default", "temperature": 0, "ignore_eos": True}


def _counted(reply: TextReply | ChatReply, completion_tokens: int, what: str) -> None:
    usage = reply.usage
    if usage is None:
        raise CheckFailed(f"{what}: no usage")
    demand(usage.completion_tokens == completion_tokens, f"{what}: completion_tokens is {usage.completion_tokens}")
    demand(usage.total_tokens == usage.prompt_tokens + completion_tokens, f"{what}: total_tokens is {usage.total_tokens}")
    demand(reply.metadata is not None and reply.metadata.weight_version is not None, f"{what}: no metadata.weight_version")


async def models(target: Target) -> None:
    """The list of models, each of them alone, and 404 for another name."""
    cards = shaped(await target.ask("/v1/models", method="GET"), ModelList, "/v1/models").data
    demand(bool(cards), "/v1/models: empty")
    alone = await target.ask(f"/v1/models/{cards[0].id}", method="GET")
    demand(alone.get("id") == cards[0].id, f"/v1/models/{cards[0].id}: id is {alone.get('id')!r}")
    response = await target.send("GET", "/v1/models/nope")
    demand(response.status_code == 404, f"/v1/models/nope: HTTP {response.status_code}, expected 404")
    demand("message" in response.json().get("error", {}), "/v1/models/nope: no error.message")


async def completion(target: Target) -> None:
    """Text or token ids in, four or three greedy tokens out."""
    for prompt, count in ((target.options.texts[0], 4), (target.options.prompt_ids, 3)):
        body = FIXED | {"prompt": prompt, "max_tokens": count}
        reply = shaped(await target.ask("/v1/completions", body), TextReply, "/v1/completions")
        demand([c.finish_reason for c in reply.choices] == ["length"], f"choices are {reply.choices}")
        _counted(reply, count, "/v1/completions")


async def completion_batch(target: Target) -> None:
    """Two prompts times n=2 give four choices, numbered."""
    body = {"model": "default", "prompt": target.options.texts, "n": 2, "max_tokens": 2, "temperature": 1, "seed": 3}
    reply = shaped(await target.ask("/v1/completions", body | {"ignore_eos": True}), TextReply, "/v1/completions")
    demand([c.index for c in reply.choices] == [0, 1, 2, 3], f"indices are {[c.index for c in reply.choices]}")
    _counted(reply, 8, "/v1/completions")


async def completion_logprobs(target: Target) -> None:
    """Log-probabilities of the tokens, prompt included with echo; the first is null."""
    body = FIXED | {"prompt": target.options.texts[0], "max_tokens": 3, "logprobs": 2, "echo": True}
    response = await target.send("POST", "/v1/completions", body)
    if response.status_code == 400:  # without alternatives to the sampled tokens
        response = await target.send("POST", "/v1/completions", body | {"logprobs": 0})
    demand(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:200]}")
    choice = shaped(response.json(), TextReply, "/v1/completions").choices[0]
    if choice.logprobs is None:
        raise CheckFailed("the choice has no logprobs")
    values = choice.logprobs.token_logprobs
    demand(len(values) == len(choice.logprobs.tokens) > 3, f"{len(values)} logprobs, {len(choice.logprobs.tokens)} tokens")
    demand(values[0] is None and all(v is not None and v <= 0 for v in values[1:]), f"token_logprobs are {values}")
    demand(choice.text.startswith(target.options.texts[0]), "echo: the text does not begin with the prompt")


async def completion_stream(target: Target) -> None:
    """Events add text, the last with choices ends, and usage comes when asked for."""
    body = FIXED | {"prompt": target.options.texts[0], "max_tokens": 3}
    whole = shaped(await target.ask("/v1/completions", body | {"max_tokens": 4}), TextReply, "/v1/completions").choices[0].text
    text, reasons, usage = "", [], None
    async for event in target.events("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}):
        found = shaped(event, TextReply, "a stream event")
        text += "".join(choice.text for choice in found.choices)
        reasons += [choice.finish_reason for choice in found.choices if choice.finish_reason is not None]
        usage = found.usage or usage
    demand(reasons == ["length"], f"finish reasons are {reasons}")
    demand(whole.startswith(text.rstrip("\ufffd")), f"streamed {text!r}, in one piece {whole!r}")
    demand(usage is not None and usage.completion_tokens == 3, f"usage is {usage}")


async def chat(target: Target) -> None:
    """A chat's reply, by both names of the limit."""
    for limit, count in (("max_tokens", 4), ("max_completion_tokens", 2)):
        body = FIXED | {"messages": target.options.chat, limit: count}
        reply = shaped(await target.ask("/v1/chat/completions", body), ChatReply, "/v1/chat/completions")
        demand([c.finish_reason for c in reply.choices] == ["length"], f"choices are {reply.choices}")
        _counted(reply, count, "/v1/chat/completions")


async def chat_logprobs(target: Target) -> None:
    """Log-probabilities of a chat's tokens, n=2."""
    body = FIXED | {"messages": target.options.chat, "max_tokens": 2, "n": 2, "logprobs": True, "top_logprobs": 2}
    response = await target.send("POST", "/v1/chat/completions", body)
    if response.status_code == 400:  # without alternatives to the sampled tokens
        response = await target.send("POST", "/v1/chat/completions", body | {"top_logprobs": 0})
    demand(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:200]}")
    reply = shaped(response.json(), ChatReply, "/v1/chat/completions")
    counts = [None if c.logprobs is None else len(c.logprobs.content) for c in reply.choices]
    demand(counts == [2, 2], f"logprobs per choice: {counts}, expected two each")


async def alternatives(target: Target) -> None:
    """Top log-probabilities, where a server computes them."""
    body = FIXED | {"messages": target.options.chat, "max_tokens": 2, "n": 2, "logprobs": True, "top_logprobs": 2}
    response = await target.send("POST", "/v1/chat/completions", body)
    if response.status_code == 400:
        raise Unsupported("alternatives to the sampled token are not computed (top_logprobs)")
    demand(response.status_code == 200, f"HTTP {response.status_code}")
    first = response.json()["choices"][0]["logprobs"]["content"][0]
    demand(len(first.get("top_logprobs", [])) == 2, f"top_logprobs 2 gave {first.get('top_logprobs')}")


async def chat_stream(target: Target) -> None:
    """Events bring a role, then content, then an end."""
    body = FIXED | {"messages": target.options.chat, "max_tokens": 3, "stream": True}
    roles, reasons = [], []
    async for event in target.events("/v1/chat/completions", body):
        for choice in shaped(event, ChatEvent, "a stream event").choices:
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    demand(roles[:1] == ["assistant"], f"roles are {roles}")
    demand(reasons == ["length"], f"finish reasons are {reasons}")


async def refusals(target: Target) -> None:
    """What cannot be served is a 400 with a message."""
    chat_path, text_path, text = "/v1/chat/completions", "/v1/completions", target.options.texts[0]
    fill = [5] * (target.context_length + 952)
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        (chat_path, {"model": "default"}),
        (chat_path, {"model": "default", "messages": []}),
        (chat_path, {"model": "default", "messages": list(target.options.chat), "temperature": -1, "max_tokens": 2}),
        (text_path, {"model": "default"}),
        (text_path, {"model": "default", "prompt": text, "max_tokens": 0}),
        (text_path, {"model": "default", "prompt": text, "max_tokens": 99999}),
        (text_path, {"model": "default", "prompt": fill, "max_tokens": 4}),
        (text_path, {"model": "default", "prompt": fill, "max_tokens": 4, "stream": True}),
    )
    for path, body in cases:
        await target.refused(path, body)
    await target.refused(chat_path, raw=b"{")


CHECKS = (
    models, completion, completion_batch, completion_logprobs, completion_stream, chat, chat_logprobs, alternatives,
    chat_stream, refusals,
)  # fmt: skip
