"""What the engine knows about a request (`Job`) and about each of its completions (`Sequence`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from miles_rollout.text import IncrementalDecoder
from miles_rollout.wire import FinishReason, GenerateRequest, RoutedExperts, WeightSpan
from miles_spec.draft import Draft, DraftSession

if TYPE_CHECKING:
    from miles_rollout.engines.embedded.tail import Tail


class PromptHold(NamedTuple):
    """A computed prompt that siblings still want to continue: its pages (shared) and the logits [1, V] after it."""

    pages: list[int]
    logits: torch.Tensor


class Sequence:
    """One completion in the making. `row` is its place in the tables while it runs, -1 while it waits.

    Of its `num_tokens` tokens, prompt and output, the first `num_computed` have keys and values in `pages`.
    """

    __slots__ = (
        "job", "index", "sample_id", "order", "recorded", "tail", "row", "pages", "claims", "tokens",
        "num_computed", "decoder", "finish_reason", "matched_stop", "version_starts", "max_tokens", "draft",
        "experts", "top_logprobs",
    )  # fmt: skip

    def __init__(self, job: Job, index: int, sample_id: int) -> None:
        self.job = job
        self.index = index
        self.sample_id = sample_id
        self.order = (job.arrival, index)
        self.recorded: tuple[list[int], list[float], list[float]] = ([], [], [])
        """Output tokens and their two log-probabilities, as far as they have been pulled from `tail`."""
        self.tail: Tail | None = None
        """Where its newest tokens are, while it has a row."""
        self.row = -1
        self.pages: list[int] = []
        self.claims: list[tuple[int, int]] = []
        """(tokens needed, page): pages filed as not ready in the prefix cache, in order."""
        self.tokens: torch.Tensor | None = None
        """int64 [num_tokens], while it is being prefilled."""
        self.num_computed = 0
        self.decoder: IncrementalDecoder | None = None
        self.finish_reason: FinishReason | None = None
        self.matched_stop: int | str | None = None
        self.version_starts: list[tuple[int, int]] = []
        """(weight version, first output token sampled under it)."""
        self.max_tokens = job.num_prompt + job.request.sampling.max_new_tokens
        self.draft: tuple[Draft, DraftSession, int] | None = None
        """The draft, its session and how many tokens that has seen; kept while the sequence waits."""
        self.experts: RoutedExperts | None = None
        """Which experts its tokens went to, once it has ended and somebody asked."""
        self.top_logprobs: dict[int, tuple[tuple[int, float], ...]] = {}
        """(token id, log p) of the likeliest by output position, where asked for; drawn ahead, so perhaps beyond the end."""

    @property
    def output(self) -> list[int]:
        """Output tokens so far."""
        return self._up_to_date()[0]

    @property
    def logprobs(self) -> list[float]:
        """The log-probability of each output token."""
        return self._up_to_date()[1]

    @property
    def sampled_logprobs(self) -> list[float]:
        """The same under the distribution that was sampled."""
        return self._up_to_date()[2]

    def _up_to_date(self) -> tuple[list[int], list[float], list[float]]:
        if self.tail is not None:
            self.tail.pull(self)
        return self.recorded

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return len(self.recorded[0]) if self.tail is None else int(self.tail.count[self.row])

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return self.job.num_prompt + len(self.output)

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the last token has to be computed before the next one can be sampled."""
        return self.tokens is not None

    def token_ids(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.job.input_ids + tuple(self.output)

    def start_version(self, version: int) -> None:
        """From the next token on, `version` holds."""
        start = len(self.output)
        while self.version_starts and self.version_starts[-1][1] == start:
            self.version_starts.pop()
        self.version_starts.append((version, start))

    def weight_spans(self) -> tuple[WeightSpan, ...]:
        """The versions its output tokens were sampled under."""
        stops = [start for _, start in self.version_starts[1:]] + [len(self.output)]
        return tuple(
            WeightSpan(version=version, start=start, stop=stop)
            for (version, start), stop in zip(self.version_starts, stops, strict=True)
            if stop > start
        )


class Job:
    """One request. `leader` is the sequence computing its prompt, `hold` the computed prompt while siblings wait for a place."""

    __slots__ = (
        "request", "arrival", "input_ids", "num_prompt", "prompt", "eos", "stream", "sequences", "unfinished",
        "prompt_logprobs", "cached_tokens", "leader", "hold",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, arrival: int, eos: frozenset[int], stream: bool = False) -> None:
        sampling = request.sampling
        self.request = request
        self.arrival = arrival
        self.input_ids = tuple(request.input_ids)
        self.num_prompt = len(self.input_ids)
        self.prompt = torch.tensor(self.input_ids, dtype=torch.int64)
        self.eos = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)
        """All ids that end a completion of this request."""
        self.stream = stream
        ids = request.sample_ids or range(sampling.n)
        self.sequences = [Sequence(self, index, sample_id) for index, sample_id in enumerate(ids)]
        self.unfinished = len(self.sequences)
        self.prompt_logprobs: list[float | None] | None = None
        if request.return_prompt_logprobs:
            self.prompt_logprobs = [0.0, *[None] * (self.num_prompt - 1)]  # None: not computed yet
        self.cached_tokens: int | None = None
        """None until its prompt is first looked up in the prefix cache."""
        self.leader: Sequence | None = None
        self.hold: PromptHold | None = None


class Failed(NamedTuple):
    """A job that ended in an error of its own, such as a tokenizer that cannot decode."""

    error: BaseException


class Delivery(NamedTuple):
    """Something the front hands to whoever awaits `job`: a GenerateResult, a GenerateChunk or a Failed."""

    job: Job
    item: Any
