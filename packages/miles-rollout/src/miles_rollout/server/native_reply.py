"""The reply objects of /generate: one per completion, or one per chunk of a stream, in SGLang's shape."""

from __future__ import annotations

import array
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from miles_rollout.server.service import Service
from miles_rollout.text import Tokenizer
from miles_rollout.wire import Completion, FinishReason, GenerateChunk, GenerateRequest, GenerateResult, RoutedExperts, WeightSpan


class Item(NamedTuple):
    """One prompt of a request and how its reply is to look."""

    request: GenerateRequest
    return_logprob: bool
    logprob_start_len: int


class Progress:
    """One completion of a stream: everything its chunks brought so far. `weight_spans` count from its first token."""

    def __init__(self, chunk: GenerateChunk) -> None:
        self.index = chunk.index
        self.sample_id = chunk.sample_id
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.weight_spans: list[WeightSpan] = []
        self.top_logprobs: list[tuple[tuple[int, float], ...]] = []
        self.finish_reason: FinishReason | None = None
        self.matched_stop: int | str | None = None

    def add(self, chunk: GenerateChunk) -> None:
        """Append one chunk."""
        start, stop = len(self.token_ids), len(self.token_ids) + len(chunk.token_ids)
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.sampled_logprobs += chunk.sampled_logprobs
        self.top_logprobs += chunk.top_logprobs
        self.finish_reason, self.matched_stop = chunk.finish_reason, chunk.matched_stop
        spans, version = self.weight_spans, chunk.weight_version
        if spans and spans[-1].version == version:
            spans[-1] = WeightSpan(version=version, start=spans[-1].start, stop=stop)
        elif stop > start or not spans:
            spans.append(WeightSpan(version=version, start=start, stop=stop))


def reply(
    item: Item, result: GenerateResult, completion: Completion, token_text: Tokenizer | None, elapsed_s: float
) -> dict[str, Any]:
    """The object of one finished completion."""
    meta = _meta(item, completion) | {"cached_tokens": result.cached_tokens}
    if item.return_logprob:
        start, prompt = item.logprob_start_len, item.request.input_ids
        known = result.prompt_logprobs or ()
        scored = 0 <= start < len(prompt) and (result.prompt_logprobs is not None or start == len(prompt) - 1)
        meta["input_token_logprobs"] = _entries((None, *known[start + 1 :]), prompt[start:], token_text) if scored else []
        meta |= _logprobs(completion, completion.token_ids, token_text)
    meta |= {"contract_digest": result.contract_digest, "e2e_latency": elapsed_s}
    if completion.routed_experts is not None:
        meta |= experts_fields(completion.routed_experts)
    return {"text": completion.text, "output_ids": completion.token_ids, "meta_info": meta}


def experts_fields(routed: RoutedExperts) -> dict[str, Any]:
    """SGLang's base64 of int32, whatever the engine holds, and the shape it leaves to be guessed."""
    code = {"uint8": "B", "uint16": "H", "int32": "i"}[routed.dtype]
    values = array.array("i", array.array(code, routed.data)) if routed.dtype != "int32" else array.array("i", routed.data)
    shape = (routed.num_tokens, routed.num_layers, routed.top_k)
    return {"routed_experts": base64.b64encode(values.tobytes()).decode(), "routed_experts_shape": shape}


async def stream_replies(
    service: Service, items: list[Item], token_text: Tokenizer | None, *, incremental: bool, with_index: bool, started: float
) -> AsyncIterator[dict[str, Any]]:
    """One object per chunk: everything so far, as SGLang does, or only what is new. `cached_tokens` is not known here."""
    digest = service.engine.info().contract_digest
    firsts = [sum(other.request.sampling.n for other in items[:i]) for i in range(len(items))]
    progress: dict[tuple[int, int], Progress] = {}
    async with contextlib.aclosing(service.stream([item.request for item in items])) as chunks:
        async for number, chunk in chunks:
            item = items[number]
            state = progress.setdefault((number, chunk.index), Progress(chunk))
            state.add(chunk)
            shown = chunk if incremental else state
            meta = _meta(item, state) | {"cached_tokens": None}
            if item.return_logprob:
                meta |= {"input_token_logprobs": []} | _logprobs(shown, state.token_ids, token_text)
            if chunk.finish_reason is not None:
                meta |= {"contract_digest": digest, "e2e_latency": time.perf_counter() - started}
            event = {"text": shown.text, "output_ids": shown.token_ids, "meta_info": meta}
            yield event | {"index": firsts[number] + chunk.index} if with_index else event


def _meta(item: Item, state: Completion | Progress) -> dict[str, Any]:
    """The part of meta_info that is always there. `weight_version` is null when nothing was sampled."""
    request, spans = item.request, state.weight_spans
    return {
        "id": request.request_id if request.sampling.n == 1 else f"{request.request_id}_{state.index}",
        "finish_reason": _finish(state),
        "prompt_tokens": len(request.input_ids),
        "weight_version": str(spans[-1].version) if spans else None,
        "completion_tokens": len(state.token_ids),
        "sample_id": state.sample_id,
        "sampling_seed": request.sampling.seed,
        "weight_spans": spans,
    }


def _finish(state: Completion | Progress) -> dict[str, Any] | None:
    match state.finish_reason:
        case None:
            return None
        case "stop":
            return {"type": "stop", "matched": state.matched_stop}
        case "length":
            return {"type": "length", "length": len(state.token_ids)}
        case "abort":
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


def _logprobs(
    shown: Completion | GenerateChunk | Progress, all_ids: Sequence[int], token_text: Tokenizer | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "output_token_logprobs": _entries(shown.logprobs, shown.token_ids, token_text),
        "output_token_logprobs_length": len(all_ids),
        "output_token_sampling_logprobs": shown.sampled_logprobs,
    }
    if shown.top_logprobs:
        found["input_top_logprobs"] = []
        found["output_top_logprobs"] = [
            _entries([value for _, value in each], [token_id for token_id, _ in each], token_text) for each in shown.top_logprobs
        ]
    return found


def _entries(logprobs: Sequence[float | None], ids: Sequence[int], tokenizer: Tokenizer | None) -> list[list[Any]]:
    """SGLang's [logprob, id, text or null] triples."""
    texts = [None] * len(ids) if tokenizer is None else [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return [list(entry) for entry in zip(logprobs, ids, texts, strict=True)]
