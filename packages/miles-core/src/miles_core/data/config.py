"""The `[data]` section: which rows are read, and how a row becomes a prompt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from miles_core.config.base import Section

FormatName = Literal["auto", "prompt", "prompt_completion", "messages", "slime", "verl"]


class FewShot(Section):
    """One worked example shown in front of every prompt."""

    prompt: str
    """The question, as it would stand in the dataset."""
    answer: str
    """The answer, written right after the question."""


class DataConfig(Section):
    """Sources are files (`train.jsonl`, `train.parquet@[0:1000]`), `gym:NAME?size=..&seed=..` (reasoning-gym),
    `task:NAME?size=..&seed=..` (built in) or `module:function?size=..&seed=..` (your own generator of rows).
    """

    train: tuple[str, ...] = ()
    """Sources to train on, one or a list."""
    eval: tuple[str, ...] = ()
    """Held-out sources, one or a list."""
    format: FormatName = "auto"
    """Shape of the rows; "auto" looks at the columns and reports what it found."""
    prompt_column: str | None = None
    """Column that holds the prompt, text or messages; overrides the format's."""
    label_column: str | None = None
    """Column that holds what the reward compares with."""
    completion_column: str | None = None
    """Column that holds the completion to imitate (SFT)."""
    metadata_column: str | None = None
    """Column that holds a dictionary for the reward; columns without a role of their own are added to it."""
    tools_column: str | None = None
    """Column that holds OpenAI-style tool schemas for the chat template."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """"auto" renders messages with the model's chat template and leaves text alone; "always" wraps text in a user turn."""
    chat_template_options: dict[str, Any] = {}
    """Variables for the chat template, for example {"enable_thinking": false}."""
    system_prompt: str | None = None
    """System turn put in front of every conversation that has none. Chat only."""
    template: str = "{prompt}"
    """Text around the prompt; {prompt} stands for the dataset's text. In a conversation it applies to the last user turn."""
    prefix: str = ""
    """Text in front of everything. Plain text only."""
    fewshot: tuple[FewShot, ...] = ()
    """Worked examples: text in front of the prompt, or user and assistant turns in a conversation."""
    fewshot_separator: str = "\n\n"
    """Text after each worked example. Plain text only."""
    shuffle: bool = True
    """A new order every epoch, a pure function of run.seed and the epoch; false keeps the files' order."""
    max_epochs: int | None = Field(default=None, ge=1)
    """Passes over the training prompts after which the run ends; unset means as many as the steps need."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; unset means what the context leaves after sampling.max_new_tokens."""
    max_sequence_tokens: int | None = Field(default=None, ge=2)
    """Longest prompt and completion together, for SFT."""
    long_prompts: Literal["error", "drop"] = "error"
    """What to do with a prompt or SFT example over the limit; dropped ones are counted and named."""
    empty_prompts: Literal["error", "drop"] = "error"
    """What to do with a row whose prompt holds no text; dropped ones are counted and named."""
    duplicate_prompts: Literal["keep", "drop", "error"] = "keep"
    """What to do with rows equal in prompt and label to an earlier row; they are counted in any case."""
    sft_turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation SFT imitates."""
    eos_token_id: int | None = Field(default=None, ge=0)
    """End-of-sequence token put after SFT completions of plain text; unset means the tokenizer's first."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError(f"template {value!r} must hold {{prompt}} exactly once; that is where the dataset's text goes")
        return value

    @model_validator(mode="after")
    def _plain_or_chat(self) -> DataConfig:
        if self.chat_template == "never" and self.system_prompt is not None:
            raise ValueError('system_prompt is a chat turn, but chat_template = "never"; use prefix for plain text')
        if self.chat_template == "always" and self.prefix:
            raise ValueError('prefix is plain text, but chat_template = "always"; use system_prompt for conversations')
        return self
