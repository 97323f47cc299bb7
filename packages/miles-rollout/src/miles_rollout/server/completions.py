"""POST /v1/completions: text or token ids in, text out, in OpenAI's shape."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from miles_rollout.server.errors import JSONResponse, RequestError
from miles_rollout.server.openai_common import COMMON_NEUTRAL, Call, CommonRequest
from miles_rollout.server.params import Neutral, parse
from miles_rollout.server.service import Service
from miles_rollout.server.sse import open_stream, unless_disconnected
from miles_rollout.text import IncrementalDecoder, Tokenizer
from miles_rollout.wire import Completion, GenerateRequest, GenerateResult, TopLogprobs


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    """The body. `logprobs` k gives the sampled tokens' own log-probabilities and those of the k likeliest."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False


NEUTRAL: Neutral = {**COMMON_NEUTRAL, "suffix": (), "best_of": (1,), "response_format": ({"type": "text"},)}


async def completions(service: Service, request: Request) -> Response:
    """The route."""
    body = parse(await service.read(request), CompletionRequest, NEUTRAL)
    if body.logprobs and body.echo:
        raise RequestError("logprobs above 0 are of sampled tokens and do not come with echo; ask for 0", param="logprobs")
    tokenizer = service.need_tokenizer("prompt") if body.echo or body.logprobs is not None else service.tokenizer
    call = Call(service, body, _prompts(service, body), body.max_tokens, "cmpl", ("logprobs", body.logprobs or 0))
    with_prompt = body.echo and body.logprobs is not None
    if body.stream:
        if with_prompt:
            raise RequestError("echo with logprobs does not come with stream; ask without stream", param="echo")
        return await open_stream(request, _events(service, call, body, tokenizer))
    requests = [msgspec.structs.replace(each, return_prompt_logprobs=with_prompt) for each in call.requests]
    results = await unless_disconnected(request, service.generate(requests))
    choices: list[dict[str, Any]] = []
    for sent, result in zip(requests, results, strict=True):
        before = tokenizer.decode(sent.input_ids) if body.echo and tokenizer is not None else ""
        for completion in result.completions:
            choice = {
                "index": len(choices),
                "text": before + completion.text,
                "logprobs": _logprobs(tokenizer, sent, result, completion) if body.logprobs is not None else None,
                "finish_reason": completion.finish_reason,
                "matched_stop": completion.matched_stop,
                **call.extras(completion),
            }
            choices.append(choice | {"prompt_token_ids": sent.input_ids} if body.return_token_ids else choice)
    return JSONResponse(call.head("text_completion") | {"choices": choices} | call.tail(results))


def _logprobs(
    tokenizer: Tokenizer | None, sent: GenerateRequest, result: GenerateResult, completion: Completion
) -> dict[str, Any]:
    """Of the completion, and with echo (the request then asked for prompt logprobs) of the prompt before it."""
    assert tokenizer is not None
    if result.prompt_logprobs is None:
        return token_logprobs(tokenizer, completion.token_ids, completion.logprobs, 0, completion.top_logprobs)
    values = (None, *result.prompt_logprobs[1:], *completion.logprobs)
    return token_logprobs(tokenizer, sent.input_ids + completion.token_ids, values, 0)


def token_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], values: Sequence[float | None], offset: int, top: TopLogprobs = ()
) -> dict[str, Any]:
    """The legacy logprobs object; `text_offset` counts characters of the tokens' text from `offset`.

    The likeliest tokens are told by their text; of two with the same text the likelier one.
    """
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
    offsets = []
    for token_id in ids:
        offsets.append(offset)
        offset += len(decoder.push((token_id,)))
    tokens = [tokenizer.decode((i,), skip_special_tokens=False) for i in ids]
    named = [{tokenizer.decode((i,), skip_special_tokens=False): value for i, value in reversed(each)} for each in top]
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": named or None}


def _prompts(service: Service, body: CompletionRequest) -> list[Sequence[int]]:
    """Token ids of every prompt: one text, texts, one id list, or id lists."""
    given = body.prompt
    parts: list[Any] = [given] if isinstance(given, str) or any(isinstance(each, int) for each in given) else list(given)
    kinds = {type(part) for part in parts}
    if kinds == {list} and not all(isinstance(each, int) for part in parts for each in part):
        kinds = set()  # numbers beside something else
    if kinds not in ({str}, {list}):
        raise RequestError("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", param="prompt")
    if any(not part for part in parts):
        raise RequestError("a prompt is empty; it needs at least one token", param="prompt")
    if kinds == {list}:
        return parts
    tokenizer = service.need_tokenizer("prompt")
    try:
        return [tokenizer.encode(part) for part in parts]
    except ValueError as error:
        raise RequestError(str(error), param="prompt") from None


async def _events(
    service: Service, call: Call, body: CompletionRequest, tokenizer: Tokenizer | None
) -> AsyncIterator[dict[str, Any]]:
    head = call.head("text_completion")
    offsets: dict[int, int] = {}
    num_tokens = 0
    async with contextlib.aclosing(service.stream(call.requests)) as chunks:
        async for number, chunk in chunks:
            index = number * body.n + chunk.index
            text = chunk.text
            if body.echo and tokenizer is not None and index not in offsets:
                text = tokenizer.decode(call.requests[number].input_ids) + text
            logprobs = None
            if body.logprobs is not None and tokenizer is not None:
                at = offsets.get(index, 0)
                logprobs = token_logprobs(tokenizer, chunk.token_ids, chunk.logprobs, at, chunk.top_logprobs)
            offsets[index] = offsets.get(index, 0) + len(text)
            num_tokens += len(chunk.token_ids)
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}
            choice |= {"matched_stop": chunk.matched_stop}
            if body.return_token_ids:
                choice |= {"token_ids": chunk.token_ids, "sample_id": chunk.sample_id}
            yield head | {"choices": [choice], "metadata": {"weight_version": str(chunk.weight_version)}}
    if call.wants_usage:
        yield head | {"choices": [], "usage": call.usage(num_tokens)}
