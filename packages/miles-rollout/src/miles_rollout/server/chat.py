"""POST /v1/chat/completions: the model's own chat template, then the same engine. Tool calls are returned as text."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from miles_rollout.server.errors import JSONResponse, RequestError
from miles_rollout.server.openai_common import COMMON_NEUTRAL, Call, CommonRequest
from miles_rollout.server.params import Neutral, parse
from miles_rollout.server.service import Service
from miles_rollout.server.sse import open_stream, unless_disconnected
from miles_rollout.text import ByteTokenizer, Tokenizer
from miles_rollout.wire import Completion, GenerateChunk

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    """The body. Without a limit a reply may fill the context."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """Extension of SGLang and vLLM: variables for the chat template."""
    add_generation_prompt: bool = True


NEUTRAL: Neutral = {
    **COMMON_NEUTRAL,
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "reasoning_effort": (), "modalities": (["text"],),
    "separate_reasoning": (False,), "continue_final_message": (False,), "echo": (False,), "functions": (), "function_call": (),
}  # fmt: skip


async def chat_completions(service: Service, request: Request) -> Response:
    """The route."""
    body = parse(await service.read(request), ChatRequest, NEUTRAL)
    tokenizer = service.need_tokenizer("messages")
    prompt = _prompt(tokenizer, body)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit is None:
        limit = max(1, service.engine.info().max_context - len(prompt))
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs true", param="top_logprobs")
    call = Call(service, body, [prompt], limit, "chatcmpl", ("top_logprobs", body.top_logprobs))
    if body.stream:
        return await open_stream(request, _events(service, call, body, tokenizer))
    (result,) = results = await unless_disconnected(request, service.generate(call.requests))
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "reasoning_content": None, "tool_calls": None},
            "logprobs": _logprobs(tokenizer, completion) if body.logprobs else None,
            "finish_reason": completion.finish_reason,
            "matched_stop": completion.matched_stop,
            **call.extras(completion),
        }
        for completion in result.completions
    ]
    reply = call.head("chat.completion") | {"choices": choices} | call.tail(results)
    return JSONResponse(reply | {"prompt_token_ids": prompt} if body.return_token_ids else reply)


def _prompt(tokenizer: Tokenizer, body: ChatRequest) -> list[int]:
    """The conversation as token ids; raises RequestError naming the message at fault."""
    if not body.messages:
        raise RequestError("messages is empty", param="messages")
    messages = [_message(i, message) for i, message in enumerate(body.messages)]
    try:
        return tokenizer.apply_chat_template(
            messages, tools=body.tools, add_generation_prompt=body.add_generation_prompt, **body.chat_template_kwargs
        )
    except (ValueError, TypeError) as error:
        raise RequestError(str(error), param="messages") from None


def _message(i: int, message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"messages[{i}].role is {role!r}; known are {', '.join(ROLES)}", param=f"messages[{i}].role")
    if content is None and (role == "assistant" and message.get("tool_calls")):
        return message | {"content": ""}
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if any(not isinstance(part, str) for part in parts):
            raise RequestError(f"messages[{i}].content has a part that is not text", param=f"messages[{i}].content")
        content = "".join(part for part in parts if part is not None)
    if not isinstance(content, str):
        raise RequestError(f"messages[{i}].content must be text", param=f"messages[{i}].content")
    return message | {"content": content}


def _logprobs(tokenizer: Tokenizer, shown: Completion | GenerateChunk) -> dict[str, Any]:
    top = shown.top_logprobs or ((),) * len(shown.token_ids)
    pairs = zip(shown.token_ids, shown.logprobs, top, strict=True)
    return {
        "content": [
            _entry(tokenizer, token_id, logprob) | {"top_logprobs": [_entry(tokenizer, *each) for each in likeliest]}
            for token_id, logprob, likeliest in pairs
        ]
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode((token_id,), skip_special_tokens=False)
    raw = tokenizer.token_bytes(token_id, skip_special_tokens=False) if isinstance(tokenizer, ByteTokenizer) else None
    return {"token": text, "bytes": list(text.encode() if raw is None else raw), "logprob": logprob}


async def _events(service: Service, call: Call, body: ChatRequest, tokenizer: Tokenizer) -> AsyncIterator[dict[str, Any]]:
    """A role event per choice, one event per chunk, a finishing event per choice, and usage where asked for."""
    head = call.head("chat.completion.chunk")
    begun: set[int] = set()
    num_tokens = 0

    def event(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "matched_stop": None} | more
        return head | {"choices": [choice]}

    async with contextlib.aclosing(service.stream(call.requests)) as chunks:
        async for _, chunk in chunks:
            if chunk.index not in begun:
                begun.add(chunk.index)
                yield event(chunk.index, {"role": "assistant", "content": ""})
            num_tokens += len(chunk.token_ids)
            if chunk.token_ids:
                more: dict[str, Any] = {}
                if body.logprobs:
                    more["logprobs"] = _logprobs(tokenizer, chunk)
                if body.return_token_ids:
                    more |= {"token_ids": chunk.token_ids, "sample_id": chunk.sample_id}
                yield event(chunk.index, {"content": chunk.text}, **more) | {
                    "metadata": {"weight_version": str(chunk.weight_version)}
                }
            elif chunk.text:
                yield event(chunk.index, {"content": chunk.text})
            if chunk.finish_reason is not None:
                yield event(chunk.index, {}, finish_reason=chunk.finish_reason, matched_stop=chunk.matched_stop)
    if call.wants_usage:
        yield head | {"choices": [], "usage": call.usage(num_tokens)}
