"""The fields of replies that clients read, with their types. Servers may send more."""

from __future__ import annotations

from typing import Literal

import msgspec

Logprob = tuple[float | None, int, str | None]


class Finish(msgspec.Struct):
    """Why a completion ended."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None


class Meta(msgspec.Struct):
    """`meta_info` of /generate."""

    id: str
    finish_reason: Finish | None
    prompt_tokens: int
    completion_tokens: int
    weight_version: str | None
    cached_tokens: int | None
    input_token_logprobs: list[Logprob] | None = None
    output_token_logprobs: list[Logprob] | None = None


class Generated(msgspec.Struct):
    """A reply object, or one event, of /generate."""

    text: str
    output_ids: list[int]
    meta_info: Meta
    index: int | None = None


class ModelInfo(msgspec.Struct):
    """GET /get_model_info."""

    model_path: str
    is_generation: bool
    weight_version: str


class ModelCard(msgspec.Struct):
    """One model of /v1/models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Usage(msgspec.Struct):
    """Token counts of a /v1 reply."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Metadata(msgspec.Struct):
    """SGLang's extension of a /v1 reply."""

    weight_version: str | None = None


class TextLogprobs(msgspec.Struct):
    """`logprobs` of a /v1/completions choice."""

    tokens: list[str]
    token_logprobs: list[float | None]


class TextChoice(msgspec.Struct):
    """A choice of /v1/completions; `finish_reason` is null in all events but the last."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "abort"] | None
    logprobs: TextLogprobs | None = None


class TextReply(msgspec.Struct):
    """A reply or an event of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    metadata: Metadata | None = None


class Message(msgspec.Struct):
    """An assistant's message."""

    role: Literal["assistant"]
    content: str | None


class TokenLogprob(msgspec.Struct):
    """One token of a chat choice's `logprobs`."""

    token: str
    logprob: float


class ChatLogprobs(msgspec.Struct):
    """`logprobs` of a chat choice."""

    content: list[TokenLogprob]


class ChatChoice(msgspec.Struct):
    """A choice of /v1/chat/completions."""

    index: int
    message: Message
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    logprobs: ChatLogprobs | None = None


class ChatReply(msgspec.Struct):
    """A reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: Metadata | None = None


class Delta(msgspec.Struct):
    """What an event adds to a chat message."""

    role: str | None = None
    content: str | None = None


class DeltaChoice(msgspec.Struct):
    """A choice of a chat event."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length", "tool_calls", "abort"] | None = None


class ChatEvent(msgspec.Struct):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Usage | None = None


class Updated(msgspec.Struct):
    """The reply to a weight update."""

    success: bool
    message: str
