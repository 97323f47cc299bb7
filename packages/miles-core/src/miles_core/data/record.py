"""The records of this room: what a reader yields, what a dataset row means, what a model is asked, what SFT imitates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One chat turn: {"role": ..., "content": ...} and whatever else the template reads."""


class DataError(ValueError):
    """Bad data: says which file and line or row, what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as read, columns untouched."""

    origin: str
    """"train.jsonl:17": file and line, or source and row, counted from 1."""
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dataset row in the one shape used inside, whatever columns it came from.

    Example: Row(origin="train.jsonl:1", prompt="1+2=", completion=None, label="3", metadata={}, tools=None)
    """

    origin: str
    prompt: str | tuple[Message, ...]
    completion: str | tuple[Message, ...] | None
    label: str | None
    metadata: dict[str, Any]
    tools: list[dict[str, Any]] | None
    completion_is_apart: bool = False
    """The completion has a column of its own: SFT then imitates it and no earlier assistant turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is asked, tokenized once.

    Example: Prompt(prompt_id="train.jsonl:1", input_ids=(5, 14, 6, 15), text="1+2=", label="3")
    """

    prompt_id: str
    """The row's origin."""
    input_ids: tuple[int, ...]
    text: str
    """What the ids say, special tokens included."""
    messages: tuple[Message, ...] | None = None
    """The conversation behind the ids; None for plain text."""
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """One prompt handed out once; its completions form a group. Group ids only grow during a run."""

    group_id: int
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTExample:
    """One sequence to imitate; both arrays are [L]."""

    example_id: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True on the tokens of the completion, its end-of-sequence token included."""

    @property
    def num_trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(self.loss_mask)


@dataclass(kw_only=True)
class LoadReport:
    """What loading found and left out; `lines()` is what the user sees."""

    formats: list[str] = field(default_factory=list)
    num_rows: int = 0
    num_kept: int = 0
    duplicates: list[str] = field(default_factory=list)
    """Origins of rows equal to an earlier one."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Reason to origins."""

    def drop(self, reason: str, origin: str) -> None:
        """Count one row left out."""
        self.dropped.setdefault(reason, []).append(origin)

    def lines(self) -> list[str]:
        """One line per fact, nothing hidden."""
        out = [*self.formats, f"{self.num_kept} of {self.num_rows} rows kept"]
        out += [f"{len(ids)} rows dropped, {reason}: {some(ids)}" for reason, ids in self.dropped.items()]
        if self.duplicates:
            out.append(f"{len(self.duplicates)} rows repeat an earlier prompt and label: {some(self.duplicates)}")
        return out


def some(names: list[str], limit: int = 5) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
