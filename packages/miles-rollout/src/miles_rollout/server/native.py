"""POST /generate in SGLang's native shape, with a few documented extensions.

Request extensions: `sample_ids`, `stream_incremental`. Reply extensions in `meta_info`: `sample_id`, `sampling_seed`,
`weight_spans`, `contract_digest`, `routed_experts_shape`, and `output_token_sampling_logprobs` next to `output_token_logprobs`.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from miles_rollout.server.errors import JSONResponse, RequestError
from miles_rollout.server.native_reply import Item, reply, stream_replies
from miles_rollout.server.params import Neutral, parse
from miles_rollout.server.service import Service, new_id
from miles_rollout.server.sse import open_stream, unless_disconnected
from miles_rollout.text import Tokenizer
from miles_rollout.wire import MAX_TOP_LOGPROBS, GenerateRequest, SamplingParams


class NativeSampling(msgspec.Struct, frozen=True, kw_only=True):
    """`sampling_params` of /generate: SGLang's names, defaults of `miles_rollout.wire.SamplingParams`."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: int = 1
    sampling_seed: int | None = None

    def to_wire(self) -> SamplingParams:
        """Checked; a missing seed is drawn, so that unseeded requests differ. Raises RequestError."""
        params = SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            seed=secrets.randbits(63) if self.sampling_seed is None else self.sampling_seed,
            n=self.n,
        )
        try:
            params.validate()
        except ValueError as error:
            raise RequestError(str(error), param="sampling_params") from None
        return params


class NativeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /generate. A list of prompts is a batch; then per-prompt fields may be lists too."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: Any = {}
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    """Likeliest tokens beside every sampled one, with return_logprob; at most 20."""
    return_text_in_logprobs: bool = False
    stream: bool = False
    return_routed_experts: bool = False
    sample_ids: list[int | list[int]] | None = None
    """Extension: keys of the sampling noise, n per prompt; 0..n-1 when not given."""
    stream_incremental: bool = False
    """Extension: each event carries what is new instead of everything so far."""


SAMPLING_NEUTRAL: Neutral = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "json_schema": (),
    "regex": (), "ebnf": (), "structural_tag": (), "stop_regex": ([],), "no_stop_trim": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "custom_params": (), "stream_interval": (1,), "seed": (),
}  # fmt: skip
REQUEST_NEUTRAL: Neutral = {
    "input_embeds": (), "image_data": (), "video_data": (), "audio_data": (), "modalities": ([],),
    "token_ids_logprob": (), "return_hidden_states": (False,), "routed_experts_start_len": (0,), "return_sampling_mask": (False,),
    "return_entropy": (False,), "return_prompt_token_ids": (False,), "lora_path": (), "lora_id": (), "session_params": (),
    "custom_logit_processor": (), "priority": (), "extra_key": (), "log_metrics": (True, False),
}  # fmt: skip


async def generate(service: Service, request: Request) -> Response:
    """The route. Replies an object, a list for a batch or n > 1, or events."""
    started = time.perf_counter()
    body = parse(await service.read(request), NativeRequest, REQUEST_NEUTRAL)
    items = _items(service, body)
    as_list = len(items) > 1 or _is_batch(body) or items[0].request.sampling.n > 1
    token_text = service.need_tokenizer("return_text_in_logprobs") if body.return_text_in_logprobs else None
    if body.stream:
        if body.return_routed_experts:
            raise RequestError("return_routed_experts does not come with stream; ask without", param="return_routed_experts")
        if any(item.return_logprob and item.logprob_start_len >= 0 for item in items):
            raise RequestError(
                "logprob_start_len: prompt logprobs do not come with stream; ask without stream", param="logprob_start_len"
            )
        events = stream_replies(
            service, items, token_text, incremental=body.stream_incremental, with_index=as_list, started=started
        )
        return await open_stream(request, events)
    results = await unless_disconnected(request, service.generate([item.request for item in items]))
    elapsed_s = time.perf_counter() - started
    replies = [
        reply(item, result, completion, token_text, elapsed_s)
        for item, result in zip(items, results, strict=True)
        for completion in result.completions
    ]
    return JSONResponse(replies if as_list else replies[0])


def _is_batch(body: NativeRequest) -> bool:
    if body.input_ids is not None:
        return any(isinstance(each, list) for each in body.input_ids)
    return isinstance(body.text, list)


def _items(service: Service, body: NativeRequest) -> list[Item]:
    """One Item per prompt, everything checked that needs no engine."""
    if (body.text is None) == (body.input_ids is None):
        raise RequestError('give either "text" or "input_ids", one of them', param="input_ids")
    batch = _is_batch(body)
    if body.text is not None:
        tokenizer = service.need_tokenizer("text")
        texts = [body.text] if isinstance(body.text, str) else body.text
        prompts = [_encode(tokenizer, text) for text in texts]
    else:
        assert body.input_ids is not None
        prompts = _lists("input_ids", body.input_ids if batch else [body.input_ids])
    if not prompts or any(not prompt for prompt in prompts):
        raise RequestError("a prompt is empty; it needs at least one token", param="input_ids" if body.text is None else "text")
    count = len(prompts)
    rids = _rids(body.rid, count, batch)
    params = _spread("sampling_params", body.sampling_params, count, batch)
    logprobs = _spread("return_logprob", body.return_logprob, count, batch)
    starts = _spread("logprob_start_len", body.logprob_start_len, count, batch)
    tops = _spread("top_logprobs_num", body.top_logprobs_num, count, batch)
    ids: list[Any] = [None] * count
    if body.sample_ids is not None:
        ids = _lists("sample_ids", body.sample_ids if batch else [body.sample_ids])
    if len(ids) != count:
        raise RequestError(f"sample_ids has {len(ids)} entries for {count} prompts", param="sample_ids")
    items = []
    for i, prompt in enumerate(prompts):
        where = f"sampling_params[{i}]" if isinstance(body.sampling_params, list) else "sampling_params"
        sampling = parse({} if params[i] is None else params[i], NativeSampling, SAMPLING_NEUTRAL, where=where)
        item = _item(prompt, sampling.to_wire(), rids[i], logprobs[i], starts[i], ids[i])
        item = _with_top(item, tops[i])
        if body.return_routed_experts:
            item = item._replace(request=msgspec.structs.replace(item.request, return_routed_experts=True))
        items.append(item)
    service.check_size(1, sum(item.request.sampling.n for item in items))
    return items


def _item(prompt: Any, sampling: SamplingParams, rid: str, return_logprob: bool, start: int, sample_ids: Any) -> Item:
    if sample_ids is not None and (len(sample_ids) != sampling.n or any(isinstance(each, list) for each in sample_ids)):
        raise RequestError(f"sample_ids must hold n={sampling.n} ids for each prompt", param="sample_ids")
    if not -1 <= start <= len(prompt):
        raise RequestError(f"logprob_start_len={start} must lie in 0..{len(prompt)} or be -1 for none", param="logprob_start_len")
    request = GenerateRequest(
        request_id=rid,
        input_ids=tuple(prompt),
        sampling=sampling,
        sample_ids=tuple(sample_ids or ()),
        return_prompt_logprobs=return_logprob and start >= 0,
    )
    return Item(request, return_logprob, start)


def _with_top(item: Item, count: int) -> Item:
    """The same, asking for `count` likeliest tokens beside every sampled one."""
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs_num={count} must lie in 0..{MAX_TOP_LOGPROBS}", param="top_logprobs_num")
    if count and (not item.return_logprob or item.logprob_start_len >= 0):
        raise RequestError(
            "top_logprobs_num is of sampled tokens: ask with return_logprob, and without logprob_start_len",
            param="top_logprobs_num",
        )
    return item._replace(request=msgspec.structs.replace(item.request, num_top_logprobs=count)) if count else item


def _lists(name: str, value: list[Any]) -> list[list[int]]:
    bad = [i for i, each in enumerate(value) if not isinstance(each, list)]
    if bad:
        raise RequestError(f"{name}[{bad[0]}] is a number among lists; give one list per prompt", param=name)
    return value


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise RequestError(str(error), param="text") from None


def _rids(rid: str | list[str] | None, count: int, batch: bool) -> list[str]:
    if not rid:
        return [new_id() for _ in range(count)]
    if isinstance(rid, str):
        return [f"{rid}_{i}" for i in range(count)] if batch else [rid]
    if len(rid) != count:
        raise RequestError(f"rid has {len(rid)} entries for {count} prompts", param="rid")
    return rid


def _spread(name: str, value: Any, count: int, batch: bool) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if not batch or len(value) != count:
        raise RequestError(f"{name} is a list of {len(value)} for {count if batch else 'a single'} prompt(s)", param=name)
    return value
