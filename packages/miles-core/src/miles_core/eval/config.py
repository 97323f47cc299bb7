"""The `[eval]` section."""

from __future__ import annotations

from pydantic import Field, model_validator

from miles_core.config.base import Section


class EvalConfig(Section):
    """When and how the held-out prompts of `data.eval` are tried."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; there is one before the first step and one after the last, too. Unset: none."""
    num_samples: int = Field(default=1, ge=1)
    """Completions per prompt."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy, and then one sample per prompt says everything."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """As in [sampling]."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion; unset means that of [sampling]."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Only the first so many prompts; unset means all."""
    pass_at: tuple[int, ...] = ()
    """Values of k for pass@k; each at most num_samples."""
    success: float = 1.0
    """A completion whose reward is at least this counts as solved."""

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
