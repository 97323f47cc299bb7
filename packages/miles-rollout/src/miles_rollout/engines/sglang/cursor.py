"""From events that hold everything so far to chunks of what is new, and from chunks to completions."""

from __future__ import annotations

from miles_rollout.engines.sglang import replies
from miles_rollout.engines.sglang.replies import Reply
from miles_rollout.wire import Completion, GenerateChunk, GenerateRequest, WeightSpan


class Cursor:
    """Turns SGLang's events, each holding everything so far, into chunks of what is new."""

    def __init__(self, request: GenerateRequest, index: int, by_hand: bool) -> None:
        self._request, self._index = request, index
        self._stops = frozenset(request.sampling.stop_token_ids) if by_hand else frozenset()
        self._count = 0
        self._text = ""

    def advance(self, reply: Reply) -> GenerateChunk | None:
        """The chunk an event adds, None when it adds nothing."""
        request, meta = self._request, reply.meta_info
        ids, finish, text = reply.output_ids, meta.finish_reason, reply.text
        reason = None if finish is None else finish.type
        matched = None if finish is None else finish.matched
        least = request.sampling.min_new_tokens
        for at in range(self._count, len(ids)):
            if ids[at] in self._stops and at + 1 >= least:
                ids, reason, matched = ids[: at + 1], "stop", ids[at]
                break
        stop = len(ids)
        shown = text if reason is not None else replies.settled(text, request.sampling.stop)
        new_text = shown[len(self._text) :]
        if stop == self._count and reason is None and not new_text:
            return None
        start, self._count = self._count, stop
        self._text = shown
        return GenerateChunk(
            request_id=request.request_id,
            sample_id=replies.sample_id(request, self._index),
            index=self._index,
            token_ids=tuple(ids[start:stop]),
            logprobs=tuple(each[0] for each in meta.output_token_logprobs[start:stop]),
            sampled_logprobs=replies.sampled(request, reply)[start:stop],
            text=new_text,
            weight_version=number(meta.weight_version),
            finish_reason=reason,
            matched_stop=matched if isinstance(matched, int | str) else None,
            top_logprobs=replies.top(meta.output_top_logprobs[start:stop]),
        )


def by_hand(request: GenerateRequest) -> bool:
    """Whether stop tokens must be watched for here: SGLang forgets them under ignore_eos."""
    return request.sampling.ignore_eos and bool(request.sampling.stop_token_ids)


def joined(chunks: list[GenerateChunk]) -> Completion:
    last = chunks[-1]
    spans: list[WeightSpan] = []
    at = 0
    for chunk in chunks:
        stop = at + len(chunk.token_ids)
        if spans and spans[-1].version == chunk.weight_version:
            spans[-1] = WeightSpan(version=chunk.weight_version, start=spans[-1].start, stop=stop)
        elif stop > at:
            spans.append(WeightSpan(version=chunk.weight_version, start=at, stop=stop))
        at = stop
    return Completion(
        sample_id=last.sample_id,
        index=last.index,
        token_ids=tuple(i for chunk in chunks for i in chunk.token_ids),
        logprobs=tuple(i for chunk in chunks for i in chunk.logprobs),
        sampled_logprobs=tuple(i for chunk in chunks for i in chunk.sampled_logprobs),
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason or "abort",
        matched_stop=last.matched_stop,
        weight_spans=tuple(spans),
        top_logprobs=tuple(each for chunk in chunks for each in chunk.top_logprobs),
    )


def number(version: str) -> int:
    """SGLang calls the weights it started with "default"."""
    return int(version) if version.isdigit() else 0
