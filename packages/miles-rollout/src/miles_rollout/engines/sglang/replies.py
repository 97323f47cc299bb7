"""What SGLang 0.5 answers, as structs, and what it is asked: one /generate body per completion."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from miles_rollout.engine import EngineRefusal
from miles_rollout.wire import FinishReason, GenerateRequest, RoutedExperts, TopLogprobs

DIGESTED = (
    "version", "dtype", "quantization", "kv_cache_dtype", "tp_size", "pp_size", "dp_size", "ep_size", "attention_backend",
    "prefill_attention_backend", "decode_attention_backend", "sampling_backend", "moe_runner_backend", "fp8_gemm_runner_backend",
    "bf16_gemm_backend", "enable_fp32_lm_head", "enable_deterministic_inference", "rl_on_policy_target", "enable_torch_compile",
    "speculative_algorithm",
)  # fmt: skip
"""Server arguments that decide which bits come out."""


EVERY_TOKEN = 1 << 29
"""A top_k that filters nothing and is not SGLang's own word for that. With seeds SGLang has two ways from noise to token, one for
batches in which somebody filters (a greedy request, such as a health check, does) and one for the others: the same seed gives
another token when the company changes. Whoever sends this always gets the first."""


class SglangFailure(RuntimeError):
    """The server is gone, failed, or is in a state nobody can vouch for."""


class Finish(msgspec.Struct):
    """Why a completion ended."""

    type: FinishReason
    matched: int | str | list[int] | None = None
    message: str | None = None
    status_code: int | None = None


class Meta(msgspec.Struct):
    """The part of `meta_info` that is read."""

    finish_reason: Finish | None
    weight_version: str
    completion_tokens: int
    cached_tokens: int = 0
    output_token_logprobs: list[tuple[float, int, str | None]] = []
    output_token_sampling_logprobs: list[float] | None = None
    input_token_logprobs: list[tuple[float | None, int, str | None]] = []
    output_top_logprobs: list[list[tuple[float, int, str | None]]] = []
    routed_experts: str | None = None


class Reply(msgspec.Struct):
    """A reply object, or one event of a stream, which holds everything so far."""

    text: str
    output_ids: list[int]
    meta_info: Meta


class ServerInfo(msgspec.Struct):
    """GET /get_server_info."""

    model_path: str
    version: str
    context_length: int | None = None
    max_req_input_len: int | None = None
    max_total_num_tokens: int | None = None
    enable_deterministic_inference: bool = False
    rl_on_policy_target: str | None = None
    internal_states: list[dict[str, Any]] = []

    @property
    def deterministic(self) -> bool:
        """Whether seeds hold and rows do not depend on their batch."""
        return self.enable_deterministic_inference or self.rl_on_policy_target is not None

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and completion together."""
        limits = [each for each in (self.context_length, self.max_total_num_tokens) if each]
        return min(limits) if limits else (self.max_req_input_len or 2042) + 6


def digest(raw: dict[str, Any], device: str = "") -> str:
    """The contract of a server: its version and the arguments that decide bits. Says so when its bits depend on the batch."""
    chosen = {name: raw.get(name) for name in DIGESTED} | {"device": device}
    text = hashlib.blake2b(msgspec.json.encode(chosen, order="sorted"), digest_size=8).hexdigest()
    deterministic = raw.get("enable_deterministic_inference") or raw.get("rl_on_policy_target")
    return f"sglang-{text}" if deterministic else f"sglang-unaligned-{text}"


def body(request: GenerateRequest, index: int, rid: str, *, seeds: bool, stop_ids_by_hand: bool) -> dict[str, Any]:
    """The /generate body of completion `index` of a request."""
    sampling = request.sampling
    filtered = sampling.top_k != -1 or sampling.top_p < 1 or sampling.min_p > 0
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens, "min_new_tokens": sampling.min_new_tokens, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p, "ignore_eos": sampling.ignore_eos,
    }  # fmt: skip
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_token_ids and not stop_ids_by_hand:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    if seeds:
        params["sampling_seed"] = seed_of(sampling.seed, sample_id(request, index))
        if sampling.top_k == -1 and sampling.temperature > 0:
            params["top_k"] = EVERY_TOKEN
    found: dict[str, Any] = {"rid": rid, "input_ids": list(request.input_ids), "sampling_params": params, "return_logprob": True}
    found["logprob_start_len"] = 0 if request.return_prompt_logprobs and index == 0 else -1
    if filtered and sampling.temperature > 0:
        found["return_sampling_mask"] = True
    if request.num_top_logprobs:
        found["top_logprobs_num"] = request.num_top_logprobs
    if request.return_routed_experts:
        found["return_routed_experts"] = True
    return found


def sample_id(request: GenerateRequest, index: int) -> int:
    """The id that keys the noise of completion `index`."""
    return request.sample_ids[index] if request.sample_ids else index


def seed_of(seed: int, sample: int) -> int:
    """SGLang keys its noise by (seed, position); completions of one request need seeds of their own."""
    key = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "little") >> 33


def sampled(request: GenerateRequest, reply: Reply) -> tuple[float, ...]:
    """Log-probabilities under the distribution that was sampled; a greedy token had no alternative."""
    if request.sampling.temperature == 0:
        return (0.0,) * len(reply.output_ids)
    given = reply.meta_info.output_token_sampling_logprobs
    return tuple(each[0] for each in reply.meta_info.output_token_logprobs) if given is None else tuple(given)


def top(entries: list[list[tuple[float, int, str | None]]]) -> TopLogprobs:
    """SGLang's alternatives as (token id, logprob)."""
    return tuple(tuple((token_id, logprob) for logprob, token_id, _ in each) for each in entries)


def experts(encoded: str, num_tokens: int, num_layers: int, top_k: int) -> RoutedExperts:
    """SGLang's base64 of int32 [num_tokens, num_layers, top_k]. Raises ValueError when the size does not fit."""
    data = base64.b64decode(encoded, validate=True)
    found = RoutedExperts(num_tokens=num_tokens, num_layers=num_layers, top_k=top_k, dtype="int32", data=data)
    found.validate()
    return found


def settled(text: str, stops: tuple[str, ...]) -> str:
    """The beginning of a growing text that will not change: not half a character, not what may turn into a stop string."""
    text = text.rstrip("\ufffd")
    hold = 0
    for stop in stops:
        for size in range(min(len(stop), len(text)), hold, -1):
            if text.endswith(stop[:size]):
                hold = size
                break
    return text[: len(text) - hold] if hold else text


def decoded(content: bytes) -> Reply:
    try:
        return msgspec.json.decode(content, type=Reply)
    except msgspec.MsgspecError as error:
        raise SglangFailure(f"SGLang answered something else than a completion: {error}") from None


def refusal(status: int, content: bytes) -> Exception:
    message = message_of(content)
    return EngineRefusal(message) if 400 <= status < 500 else SglangFailure(f"SGLang answered HTTP {status}: {message}")


def message_of(content: bytes) -> str:
    try:
        reply = msgspec.json.decode(content)
    except msgspec.MsgspecError:
        return content[:200].decode(errors="replace").strip()
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event, up to [DONE]."""
    rest = b""
    async for part in chunks:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                if line[6:].strip() == b"[DONE]":
                    return
                yield line[6:]
