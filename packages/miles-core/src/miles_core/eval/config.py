"""The `[eval]` section."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from miles_core.config.base import Section
from miles_core.rollout.config import RewardConfig

_SET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class EvalConfig(Section):
    """When and how held-out prompts are tried: on which, sampled how, scored by what. Nothing here touches training.

    Example, in a TOML file: [eval] every = 10, [eval.sets] easy = "task:addition?digits=1&split=eval",
    hard = ["task:addition?digits=3&split=eval"], [eval.reward] name = "exact_match"
    """

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; there is one before the first step and one after the last, too. Unset: none."""
    sets: dict[str, tuple[str, ...]] = {}
    """Held-out prompts by name, beside those of `data.eval`; each set has metrics of its own, eval/NAME/accuracy and so on."""
    reward: RewardConfig | None = None
    """What scores held-out completions, where that is not the reward that is trained on."""
    num_samples: int = Field(default=1, ge=1)
    """Completions per prompt."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy, and then one sample per prompt says everything."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """As `sampling.top_p`, whose value has no say here; nor have those of top_k and min_p, which an evaluation does not use."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion; unset means that of [sampling]."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Only the first so many prompts of `data.eval` and of each set; unset means all."""
    pass_at: tuple[int, ...] = ()
    """Values of k for pass@k; each at most num_samples."""
    success: float = 1.0
    """A completion whose reward is at least this counts as solved."""

    @field_validator("sets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: (sources,) if isinstance(sources, str) else sources for name, sources in value.items()}

    @model_validator(mode="after")
    def _sets_have_names(self) -> EvalConfig:
        for name, sources in self.sets.items():
            if not _SET_NAME.fullmatch(name):
                raise ValueError(
                    f"sets: {name!r} is part of a metric's name; use lower-case letters, digits, dash and underscore"
                )
            if not sources:
                raise ValueError(f"sets.{name} names no held-out prompts")
        return self

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.temperature == 0.0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples = {self.num_samples} greedy completions would all be the same; set temperature, or num_samples = 1"
            )
        wrong = [k for k in self.pass_at if not 1 <= k <= self.num_samples]
        if wrong:
            raise ValueError(f"pass_at = {wrong} must lie in 1..num_samples = {self.num_samples}")
        return self
