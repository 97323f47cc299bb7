"""The `[rollout]`, `[sampling]` and `[reward]` sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from miles_core.config.base import Section
from miles_rollout.wire import SamplingParams


class RolloutConfig(Section):
    """How many groups a step trains on, and which of the produced ones."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Groups a step trains on."""
    group_size: int = Field(default=8, ge=1)
    """Completions per prompt."""
    engine: Literal["embedded"] = "embedded"
    """Rollout engine that the run makes: ours, which computes the trainer's numbers. Others are reached as a `[service]`."""
    producer: str = "single_turn"
    """How a rollout goes: "single_turn" (one completion), or your own `module:function` or `path/to/file.py:function`, which
    lets policy and environment take turns; see `miles_core.rollout.Rollout`. Evaluation goes the same way."""
    producer_options: dict[str, Any] = {}
    """Keyword arguments for a producer of your own."""
    deadline_s: float = Field(default=600.0, gt=0.0)
    """Longest time one rollout of a producer of your own may take; then its sample carries no reward."""
    max_concurrency: int = Field(default=256, ge=1)
    """Most groups being generated at one time."""
    filters: tuple[str, ...] = ()
    """Groups to leave out: "zero_variance", or your own `module:function` (Group -> reason or None). Applied in order."""
    over_sampling: float = Field(default=0.0, ge=0.0)
    """Extra groups produced at once, as a share of prompts_per_step; surplus ones go back and are asked again later."""
    max_refill: int = Field(default=0, ge=0)
    """How often a step may ask for more groups to replace those left out; with 0 it trains on what is left."""
    truncated: Literal["train", "exclude"] = "train"
    """Whether completions cut off at max_new_tokens are trained."""

    @field_validator("engine", mode="before")
    @classmethod
    def _ours(cls, value: Any) -> Any:
        if value != "embedded":
            raise ValueError(
                f'a run makes engines of its own kind, "embedded", not {value!r}; put SGLang behind `miles-rollout serve MODEL '
                "--engine sglang` and name its address as service.url"
            )
        return value

    @field_validator("filters", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class SamplingConfig(Section):
    """How completions are sampled. Seed and number of completions come from run.seed and rollout.group_size."""

    max_new_tokens: int = 128
    """Longest completion in tokens."""
    min_new_tokens: int = 0
    """No end of sequence before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens with this much probability is kept. Below 1, as with top_k, min_p or min_new_tokens, tokens come
    from another distribution than the one that is trained: the gradient is biased, and no correction here undoes that."""
    top_k: int = -1
    """Most probable tokens kept; -1 keeps all."""
    min_p: float = 0.0
    """Tokens below this share of the largest probability are left out."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, beside the model's own."""
    ignore_eos: bool = False
    """Go on after the model's end of sequence."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _in_range(self) -> SamplingConfig:
        self.params(seed=0, n=1).validate()
        return self

    def params(self, *, seed: int, n: int) -> SamplingParams:
        """The wire record an engine is asked with."""
        return SamplingParams(**self.model_dump(), seed=seed, n=n)


class RewardConfig(Section):
    """What scores a completion, and what happens when the scorer fails."""

    name: str = "exact_match"
    """A registered reward (exact_match, last_integer, math_verify, reasoning_gym, an installed plug-in) or `module:function`."""
    options: dict[str, Any] = {}
    """Keyword arguments for the reward."""
    timeout_s: float = Field(default=10.0, gt=0.0)
    """Longest time for one call; then the call is killed and its samples carry no reward."""
    workers: int = Field(default=2, ge=1)
    """Processes for rewards that are not built-in one-liners."""
    max_error_rate: float = Field(default=0.05, ge=0.0, le=1.0)
    """Largest share of a step's samples that may fail to get a reward before the run stops."""
