"""The records that cross a process, a room or a disk: frozen msgspec structs, no torch, no numpy.

Legend: L = tokens of one sequence (prompt and completions), C = tokens of one completion, n = completions of one request.

Token ids are the record; text is derived from them. Log-probabilities are fp32 values held in Python floats,
so a JSON or msgpack round trip keeps every bit. Unknown fields are refused on decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")

SCHEMA = 1
"""Version of every struct in this module. A reader refuses a record with another number."""

FinishReason = Literal["stop", "length", "abort"]
SampleStatus = Literal["completed", "truncated", "aborted", "failed"]
RewardStatus = Literal["pending", "ok", "error", "timeout"]


class WireError(ValueError):
    """A record that does not fit the schema: says which record, which field and why."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all wire structs."""


class SamplingParams(Wire, frozen=True, kw_only=True):
    """How completions are sampled. Names and defaults follow SGLang's native API where both have the field.

    Example: SamplingParams(max_new_tokens=16, temperature=1.0, stop_token_ids=(2,))
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    """0 means greedy: the largest logit, lowest token id on a tie. Log-probabilities are then stated at temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps all tokens."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """Generation ends when the text contains one of these; the text is cut before it, the token ids are kept."""
    stop_token_ids: tuple[int, ...] = ()
    """In addition to the model's own end-of-sequence ids. The stop token is kept in the token ids."""
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1

    def validate(self) -> None:
        """Raise ValueError naming every field outside its range."""
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            wrong.append(f"min_new_tokens={self.min_new_tokens} must lie in 0..max_new_tokens={self.max_new_tokens}")
        if not (self.temperature >= 0.0 and self.temperature < float("inf")):
            wrong.append(f"temperature={self.temperature} must be finite and not negative")
        if not 0.0 < self.top_p <= 1.0:
            wrong.append(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k != -1 and self.top_k < 1:
            wrong.append(f"top_k={self.top_k} must be -1 (all) or at least 1")
        if not 0.0 <= self.min_p < 1.0:
            wrong.append(f"min_p={self.min_p} must lie in [0, 1)")
        if self.n < 1:
            wrong.append(f"n={self.n} must be at least 1")
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed={self.seed} must lie in 0..2^63-1")
        if any(not text for text in self.stop):
            wrong.append("stop holds an empty string, which would stop every completion at once")
        if wrong:
            raise ValueError("sampling parameters: " + "; ".join(wrong))


MAX_TOP_LOGPROBS = 20
TopLogprobs: TypeAlias = tuple[tuple[tuple[int, float], ...], ...]


class GenerateRequest(Wire, frozen=True, kw_only=True):
    """Ask for `sampling.n` completions of one prompt.

    `sample_ids` keys the sampling noise: the token at a position is a pure function of
    (weights, prompt, sampling, seed, sample id), whatever else the engine is serving.

    Example: GenerateRequest(request_id="g7", input_ids=(5, 9), sampling=SamplingParams(n=2), sample_ids=(14, 15))
    """

    request_id: str
    input_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    sample_ids: tuple[int, ...] = ()
    """One id per completion, `n` in all; empty means 0..n-1."""
    return_prompt_logprobs: bool = False
    return_routed_experts: bool = False
    """Ask for `Completion.routed_experts`; a dense model has none and leaves it None."""
    num_top_logprobs: int = 0
    """Likeliest tokens to tell beside every sampled one, at most MAX_TOP_LOGPROBS."""
    schema: int = SCHEMA


class RoutedExperts(Wire, frozen=True, kw_only=True):
    """Which experts every token of a sequence went to: an array [num_tokens, num_layers, top_k], row-major, little-endian.

    `num_tokens` is prompt plus completion minus one: the last sampled token was never fed to the model.
    """

    num_tokens: int
    num_layers: int
    """Layers that have experts."""
    top_k: int
    dtype: Literal["uint8", "uint16", "int32"] = "int32"
    """The smallest that holds the expert ids, where the engine can choose."""
    data: bytes = b""

    def validate(self) -> None:
        """Raise WireError unless `data` has as many bytes as the shape asks for."""
        width = {"uint8": 1, "uint16": 2, "int32": 4}[self.dtype]
        expected = self.num_tokens * self.num_layers * self.top_k * width
        if len(self.data) != expected:
            shape = (self.num_tokens, self.num_layers, self.top_k)
            raise WireError(f"routed experts: {len(self.data)} bytes for shape {shape} of {self.dtype}, expected {expected}")


class WeightSpan(Wire, frozen=True, kw_only=True):
    """Tokens [start, stop) of the sequence were sampled under `version`."""

    version: int
    start: int
    stop: int


class Completion(Wire, frozen=True, kw_only=True):
    """One sampled continuation, all arrays [C]."""

    sample_id: int
    index: int
    """Position among the n completions of its request."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log p of each token under softmax(logits / temperature), unfiltered. This is what a trainer reproduces bitwise."""
    sampled_logprobs: tuple[float, ...]
    """log p of each token under the distribution actually sampled (after top-k, top-p, min-p)."""
    text: str
    finish_reason: FinishReason
    matched_stop: int | str | None = None
    weight_spans: tuple[WeightSpan, ...] = ()
    """Offsets count from the first completion token."""
    top_logprobs: TopLogprobs = ()
    """For each token the `num_top_logprobs` likeliest, as (token id, log p under what `logprobs` is of), likeliest first; empty
    unless asked for."""
    routed_experts: RoutedExperts | None = None
    """Of prompt and completion, when `GenerateRequest.return_routed_experts` asked for it and the model has experts."""


class GenerateResult(Wire, frozen=True, kw_only=True):
    """The answer to a GenerateRequest: all n completions, in index order."""

    request_id: str
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[float, ...] | None = None
    """[P], unfiltered; the first entry is 0.0 because nothing predicts the first token. None when they were not asked for, or the
    request was aborted before they were known."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    contract_digest: str = ""
    schema: int = SCHEMA


class GenerateChunk(Wire, frozen=True, kw_only=True):
    """New tokens of one completion, in order; the last chunk of a completion carries `finish_reason`."""

    request_id: str
    sample_id: int
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampled_logprobs: tuple[float, ...]
    text: str
    """The text these tokens add. Held back while it could still turn into a stop string or half a character."""
    weight_version: int
    finish_reason: FinishReason | None = None
    matched_stop: int | str | None = None
    top_logprobs: TopLogprobs = ()


class Sample(Wire, frozen=True, kw_only=True):
    """One trainable token sequence; every array is [L] and aligned with `token_ids`.

    Example: prompt (5, 9), completion (7, 2): token_ids=(5, 9, 7, 2), loss_mask=(False, False, True, True),
    rollout_logprobs=(0.0, 0.0, -1.2, -0.1).
    """

    sample_id: int
    group_id: int
    prompt_id: str
    """Names the dataset row: "train.jsonl:17"."""
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token was sampled by the policy and is trained."""
    rollout_logprobs: tuple[float, ...]
    """Engine's unfiltered log p at `temperature`; 0.0 where loss_mask is False."""
    temperature: float = 1.0
    weight_spans: tuple[WeightSpan, ...] = ()
    """Offsets count from the first token of the sequence."""
    text: str = ""
    """Decoded completion, what the reward saw."""
    label: str | None = None
    status: SampleStatus = "completed"
    reward: float | None = None
    """None until scored, and for every status but "ok"."""
    reward_status: RewardStatus = "pending"
    reward_detail: str = ""
    """Why a reward is missing, or what the scorer wants to report."""
    metadata: dict[str, Any] = {}
    schema: int = SCHEMA

    def validate(self) -> None:
        """Raise WireError unless all [L] arrays have one length and masked-out log-probabilities are 0.0."""
        length = len(self.token_ids)
        sizes = {"loss_mask": len(self.loss_mask), "rollout_logprobs": len(self.rollout_logprobs)}
        for name, size in sizes.items():
            if size != length:
                raise WireError(f"sample {self.sample_id}: {name} has {size} entries, token_ids has {length}")
        stray = [i for i, (m, lp) in enumerate(zip(self.loss_mask, self.rollout_logprobs, strict=True)) if not m and lp != 0.0]
        if stray:
            raise WireError(f"sample {self.sample_id}: rollout_logprobs is not 0.0 at {stray[:5]}, where loss_mask is False")

    @property
    def num_trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(self.loss_mask)

    @property
    def oldest_version(self) -> int | None:
        """The smallest weight version among the sampled tokens, None when nothing was sampled."""
        return min((span.version for span in self.weight_spans), default=None)


class EngineInfo(Wire, frozen=True, kw_only=True):
    """What an engine states about itself at start-up and after every weight update."""

    model: str
    contract_digest: str
    weight_version: int
    vocab_size: int
    max_context: int
    """Most tokens, prompt and completion together, one sequence may hold."""
    max_running: int
    eos_token_ids: tuple[int, ...] = ()
    schema: int = SCHEMA


class TensorSpec(Wire, frozen=True, kw_only=True):
    """One tensor of a weight update: HF name, torch dtype name ("float32"), shape, `miles_kernels.checksum` of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    hash: str


class WeightManifest(Wire, frozen=True, kw_only=True):
    """Everything a receiver must hold before it may swap to `version`."""

    version: int
    tensors: tuple[TensorSpec, ...]
    contract_digest: str
    schema: int = SCHEMA


def encode_json(value: Any) -> bytes:
    """JSON of a struct or of plain containers of structs. Floats keep every bit."""
    return msgspec.json.encode(value)


def decode_json(data: bytes | str, type_: type[T]) -> T:
    """Decode and check one record; raises WireError naming the field and the type expected there."""
    try:
        value = msgspec.json.decode(data, type=type_)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a {getattr(type_, '__name__', type_)}: {error}") from error
    check_schema(value)
    return value


def check_schema(value: Any) -> None:
    """Raise WireError when a decoded record states another schema number than ours."""
    schema = getattr(value, "schema", SCHEMA)
    if schema != SCHEMA:
        name = type(value).__name__
        raise WireError(f"{name}: schema {schema}, this build reads schema {SCHEMA}; use matching versions of miles-rollout")


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSON lines, atomically: the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for sample in samples:
            file.write(encode_json(sample) + b"\n")
    partial.replace(path)


def read_samples(path: Path) -> list[Sample]:
    """Read a samples file; raises WireError naming file and line of the first bad record."""
    samples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                sample = decode_json(line, Sample)
                sample.validate()
            except WireError as error:
                raise WireError(f"{path}:{number}: {error}") from None
            samples.append(sample)
    return samples
