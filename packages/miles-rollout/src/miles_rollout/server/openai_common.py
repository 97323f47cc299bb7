"""What /v1/completions and /v1/chat/completions have in common: parameters, usage, events.

Extensions of the OpenAI API, all optional: SGLang's and vLLM's `top_k`, `min_p`, `min_tokens`, `ignore_eos`,
`stop_token_ids`, `rid`, `return_token_ids`, and `sample_ids`. Replies carry `metadata.weight_version` and `matched_stop`
as SGLang's do; with `return_token_ids` each choice has `token_ids`, `weight_spans` and `sample_id`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from miles_rollout.server.errors import RequestError
from miles_rollout.server.native_reply import experts_fields
from miles_rollout.server.params import Neutral
from miles_rollout.server.service import Service, new_id
from miles_rollout.wire import MAX_TOP_LOGPROBS, Completion, GenerateRequest, GenerateResult, SamplingParams


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both routes."""

    model: str = "default"
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    top_k: int = -1
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    rid: str | None = None
    sample_ids: list[int | list[int]] | None = None
    return_token_ids: bool = False
    return_routed_experts: bool = False


COMMON_NEUTRAL: Neutral = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "lora_path": (),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "no_stop_trim": (False,), "regex": (), "ebnf": (),
    "json_schema": (), "stop_regex": ([],), "return_hidden_states": (False,), "priority": (),
    "include_stop_str_in_output": (False,), "custom_logit_processor": (),
}  # fmt: skip


class Call:
    """One /v1 request under way: its engine requests and what its reply needs to know."""

    def __init__(
        self,
        service: Service,
        body: CommonRequest,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        prefix: str,
        top: tuple[str, int] = ("", 0),
    ) -> None:
        """`top`: how many likeliest tokens to tell beside every sampled one, and the parameter that said so."""
        if not 0 <= top[1] <= MAX_TOP_LOGPROBS:
            raise RequestError(f"{top[0]}={top[1]} must lie in 0..{MAX_TOP_LOGPROBS}", param=top[0])
        check_model(service, body.model)
        service.check_size(len(prompts), max(1, body.n))
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options is only allowed with stream", param="stream_options")
        if body.return_routed_experts and body.stream:
            raise RequestError("return_routed_experts does not come with stream; ask without", param="return_routed_experts")
        self.body = body
        self.id = body.rid or f"{prefix}-{new_id()}"
        self.created = int(time.time())
        self.model = service.model_name
        sampling = _sampling(body, max_tokens)
        ids = _sample_ids(body, len(prompts))
        self.requests = [
            GenerateRequest(
                request_id=self.id if len(prompts) == 1 else f"{self.id}_{i}",
                input_ids=tuple(prompt),
                sampling=sampling,
                sample_ids=tuple(ids[i]),
                return_routed_experts=body.return_routed_experts,
                num_top_logprobs=top[1],
            )
            for i, prompt in enumerate(prompts)
        ]

    def head(self, kind: str) -> dict[str, Any]:
        """Fields every object of the reply starts with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, num_completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
        """Token counts of the whole call; each prompt counts once."""
        prompt = sum(len(request.input_ids) for request in self.requests)
        details = {"cached_tokens": cached_tokens} if cached_tokens else None
        total = prompt + num_completion_tokens
        counts = {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": num_completion_tokens}
        return counts | {"prompt_tokens_details": details, "reasoning_tokens": 0}

    def tail(self, results: Sequence[GenerateResult]) -> dict[str, Any]:
        """`usage` and `metadata` of a complete reply."""
        completions = [each for result in results for each in result.completions]
        versions = [span.version for each in completions for span in each.weight_spans]
        return {
            "usage": self.usage(
                sum(len(each.token_ids) for each in completions), sum(result.cached_tokens for result in results)
            ),
            "metadata": {
                "weight_version": str(max(versions)) if versions else None,
                "contract_digest": results[0].contract_digest,
                "seed": self.requests[0].sampling.seed,
            },
        }

    def extras(self, completion: Completion) -> dict[str, Any]:
        """What `return_token_ids` and `return_routed_experts` add to a choice."""
        found: dict[str, Any] = {} if completion.routed_experts is None else experts_fields(completion.routed_experts)
        if not self.body.return_token_ids:
            return found
        spans = completion.weight_spans
        return found | {"token_ids": completion.token_ids, "weight_spans": spans, "sample_id": completion.sample_id}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage event."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage


def check_model(service: Service, name: str) -> None:
    """Raise RequestError 404 unless `name` is the served model, or "default"."""
    if name not in ("default", service.model_name):
        message = f"The model '{name}' does not exist; this server has '{service.model_name}'"
        raise RequestError(message, param="model", status=404, code="model_not_found")


def model_card(service: Service) -> dict[str, Any]:
    """One entry of /v1/models."""
    name = service.model_name
    card = {"id": name, "object": "model", "created": 0, "owned_by": "miles", "root": name, "parent": None}
    return card | {"max_model_len": service.engine.info().max_context}


def _sampling(body: CommonRequest, max_tokens: int) -> SamplingParams:
    params = SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        n=body.n,
    )
    try:
        params.validate()
    except ValueError as error:
        raise RequestError(str(error)) from None
    return params


def _sample_ids(body: CommonRequest, num_prompts: int) -> list[list[int]]:
    """One list of n ids, or an empty one, per prompt."""
    if body.sample_ids is None:
        return [[] for _ in range(num_prompts)]
    given: list[Any] = [body.sample_ids] if not any(isinstance(each, list) for each in body.sample_ids) else body.sample_ids
    fits = len(given) == num_prompts and all(isinstance(ids, list) and len(ids) == body.n for ids in given)
    if not fits or any(isinstance(i, list) for ids in given for i in ids):
        raise RequestError(f"sample_ids must hold n={body.n} ids for each of {num_prompts} prompt(s)", param="sample_ids")
    return given
