"""From sampled tokens to completions: stop rules, text, chunks, results."""

from __future__ import annotations

from typing import NamedTuple

from miles_rollout.engines.embedded.state import Delivery, Failed, Job, Sequence
from miles_rollout.text import IncrementalDecoder, Tokenizer
from miles_rollout.wire import Completion, FinishReason, GenerateChunk, GenerateResult, TopLogprobs


class Token(NamedTuple):
    """One sampled token and its two log-probabilities."""

    token_id: int
    logprob: float
    sampled_logprob: float


class OutputProcessor:
    """Applies the stop rules to new tokens and collects what is to be delivered."""

    def __init__(self, tokenizer: Tokenizer, contract_digest: str) -> None:
        self._tokenizer = tokenizer
        self._contract_digest = contract_digest
        self.deliveries: list[Delivery] = []

    def take_deliveries(self) -> list[Delivery]:
        """What has become ready since the last call."""
        deliveries, self.deliveries = self.deliveries, []
        return deliveries

    def note(self, seq: Sequence, token: Token, version: int) -> bool:
        """Look at a token that was just recorded; True when the completion is finished by it. Streamed ones get a chunk."""
        token_id, length = token.token_id, seq.num_output
        job = seq.job
        sampling = job.request.sampling
        if length >= sampling.min_new_tokens and token_id in job.eos:
            seq.finish_reason, seq.matched_stop = "stop", token_id
        elif length >= sampling.max_new_tokens:
            seq.finish_reason = "length"
        if job.stream or sampling.stop:
            self._follow_text(seq, token, version, length)
        return seq.finish_reason is not None

    def abort(self, seq: Sequence, version: int) -> None:
        """Mark a completion as aborted; a streamed one gets its last chunk."""
        seq.finish_reason = "abort"
        rest = seq.decoder.finish() if seq.decoder is not None else ""
        if seq.job.stream:
            self.deliveries.append(Delivery(seq.job, _chunk(seq, None, rest, version)))

    def close(self, seq: Sequence) -> None:
        """Count a finished completion; the last one of a request delivers the result."""
        job = seq.job
        job.unfinished -= 1
        if job.unfinished:
            return
        completions = tuple(self._completion(other) for other in job.sequences)
        result = GenerateResult(
            request_id=job.request.request_id,
            completions=completions,
            prompt_logprobs=_known(job.prompt_logprobs),
            cached_tokens=job.cached_tokens or 0,
            contract_digest=self._contract_digest,
        )
        self.deliveries.append(Delivery(job, result))

    def fail(self, job: Job, error: BaseException) -> None:
        """Deliver an error instead of a result."""
        self.deliveries.append(Delivery(job, Failed(error)))

    def _follow_text(self, seq: Sequence, token: Token, version: int, length: int) -> None:
        """Decode along, look for stop strings, and stream what is safe to show."""
        sampling = seq.job.request.sampling
        if seq.decoder is None:
            seq.decoder = IncrementalDecoder(self._tokenizer, sampling.stop)
        decoder = seq.decoder
        text = ""
        if not isinstance(seq.matched_stop, int):  # the stop token itself is not text
            text = decoder.push((token.token_id,), can_stop=length >= sampling.min_new_tokens)
        if decoder.matched is None and seq.finish_reason is not None:
            text += decoder.finish()
        if decoder.matched is not None:
            seq.finish_reason, seq.matched_stop = "stop", decoder.matched
        if seq.job.stream:
            self.deliveries.append(Delivery(seq.job, _chunk(seq, token, text, version)))

    def _completion(self, seq: Sequence) -> Completion:
        reason: FinishReason | None = seq.finish_reason
        assert reason is not None
        return Completion(
            sample_id=seq.sample_id,
            index=seq.index,
            token_ids=tuple(seq.output),
            logprobs=tuple(seq.logprobs),
            sampled_logprobs=tuple(seq.sampled_logprobs),
            text=self._text(seq),
            finish_reason=reason,
            matched_stop=seq.matched_stop,
            weight_spans=seq.weight_spans(),
            top_logprobs=_top(seq, 0, seq.num_output),
            routed_experts=seq.experts,
        )

    def _text(self, seq: Sequence) -> str:
        if seq.decoder is not None:
            return seq.decoder.text
        shown = seq.output[:-1] if isinstance(seq.matched_stop, int) else seq.output
        return self._tokenizer.decode(shown)


def _top(seq: Sequence, start: int, stop: int) -> TopLogprobs:
    """Of output tokens start .. stop, where somebody asked."""
    return tuple(seq.top_logprobs[i] for i in range(start, stop)) if seq.job.request.num_top_logprobs else ()


def _chunk(seq: Sequence, token: Token | None, text: str, version: int) -> GenerateChunk:
    return GenerateChunk(
        request_id=seq.job.request.request_id,
        sample_id=seq.sample_id,
        index=seq.index,
        token_ids=() if token is None else (token.token_id,),
        logprobs=() if token is None else (token.logprob,),
        sampled_logprobs=() if token is None else (token.sampled_logprob,),
        text=text,
        weight_version=version,
        finish_reason=seq.finish_reason,
        matched_stop=seq.matched_stop,
        top_logprobs=() if token is None else _top(seq, seq.num_output - 1, seq.num_output),
    )


def _known(logprobs: list[float | None] | None) -> tuple[float, ...] | None:
    """All of a prompt's log-probabilities; None when they were not asked for, or an abort came before them."""
    if logprobs is None:
        return None
    found = tuple(each for each in logprobs if each is not None)
    return found if len(found) == len(logprobs) else None
