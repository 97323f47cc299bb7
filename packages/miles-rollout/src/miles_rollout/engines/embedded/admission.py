"""What the engine refuses before queueing: requests that could never be served, each with the numbers and the way out."""

from __future__ import annotations

from typing import NamedTuple

from miles_rollout.engine import EngineRefusal
from miles_rollout.wire import MAX_TOP_LOGPROBS, SCHEMA, GenerateRequest

_MAX_ID = 2**63


class Limits(NamedTuple):
    """What one sequence must fit into."""

    vocab_size: int
    max_context: int
    page_size: int
    num_pages: int
    records_experts: bool = True
    """Whether routed experts can be asked for: they are recorded, or there are none."""
    tells_top: bool = True
    """Whether the likeliest tokens can be asked for; draft trees have several draws for one position."""


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Raise EngineRefusal naming everything about `request` that can never be served."""
    sampling, wrong = request.sampling, []
    if request.schema != SCHEMA:
        wrong.append(f"schema {request.schema}, this engine reads schema {SCHEMA}")
    try:
        sampling.validate()
    except ValueError as error:
        wrong.append(str(error))
    if not request.input_ids:
        wrong.append("input_ids is empty; give at least one token, such as the model's beginning-of-sequence id")
    for name, ids in (("input_ids", request.input_ids), ("stop_token_ids", sampling.stop_token_ids)):
        outside = [i for i, token in enumerate(ids) if not 0 <= token < limits.vocab_size]
        if outside:
            wrong.append(
                f"{name}[{outside[0]}] = {ids[outside[0]]} is outside the vocabulary of {limits.vocab_size} "
                f"({len(outside)} such ids); was another tokenizer used?"
            )
    if request.sample_ids and len(request.sample_ids) != sampling.n:
        wrong.append(f"sample_ids has {len(request.sample_ids)} entries for n={sampling.n}; give one per completion, or none")
    strange = [sample_id for sample_id in request.sample_ids if not 0 <= sample_id < _MAX_ID]
    if strange:
        wrong.append(f"sample id {strange[0]} must lie in 0..2^63-1")
    if request.return_routed_experts and not limits.records_experts:
        wrong.append("routed experts are not recorded here; start the engine with record_routed_experts=true")
    if not 0 <= request.num_top_logprobs <= MAX_TOP_LOGPROBS:
        wrong.append(f"num_top_logprobs={request.num_top_logprobs} must lie in 0..{MAX_TOP_LOGPROBS}")
    if request.num_top_logprobs and not limits.tells_top:
        wrong.append("the likeliest tokens are not told by an engine with draft trees; leave draft_tree out")
    wrong += _sizes(len(request.input_ids), sampling.max_new_tokens, limits)
    if wrong:
        raise EngineRefusal(f"request {request.request_id!r}: " + "; ".join(wrong))


def _sizes(prompt: int, new: int, limits: Limits) -> list[str]:
    if prompt + new > limits.max_context:
        room = limits.max_context - prompt
        remedy = f"lower max_new_tokens to {room} or less" if room > 0 else f"shorten the prompt by at least {1 - room} tokens"
        return [
            f"{prompt} prompt tokens + max_new_tokens={new} = {prompt + new} exceed the context of {limits.max_context}; {remedy}"
        ]
    pages = -(-(prompt + new - 1) // limits.page_size)  # the last sampled token is never computed
    if pages > limits.num_pages:
        return [
            f"{prompt} prompt tokens + max_new_tokens={new} need {pages} pages of {limits.page_size} tokens, the KV cache has "
            f"{limits.num_pages}; lower max_new_tokens or raise kv_memory_bytes (or num_pages)"
        ]
    return []
