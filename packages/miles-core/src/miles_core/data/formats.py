"""Recognise the dataset shapes in use (TRL, slime/miles, verl/SkyRL, prime-rl) and turn their rows into one `Row`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from miles_core.data.config import DataConfig
from miles_core.data.record import DataError, Message, RawRow, Row, some

FAMILIES = {
    "prompt": "TRL prompt-only: prompt",
    "prompt_completion": "TRL, prime-rl: prompt, completion",
    "messages": "TRL, prime-rl: messages",
    "slime": "slime/miles: input, with label and metadata",
    "verl": "verl/SkyRL: prompt (messages), reward_model or reward_spec {ground_truth}",
}
"""Format name to the shape it reads."""

_PROMPT_COLUMN = {"prompt": "prompt", "prompt_completion": "prompt", "messages": "messages", "slime": "input", "verl": "prompt"}
_LABELS = ("label", "answer", "ground_truth", "solution", "target")
_REWARD_SPECS = ("reward_model", "reward_spec")
_LIKELY_PROMPTS = ("question", "problem", "instruction", "query", "text", "conversations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Which column plays which role. `describe()` is reported to the user."""

    name: str
    prompt: str
    completion: str | None = None
    label: str | None = None
    reward_spec: str | None = None
    metadata: str | None = None
    tools: str | None = None

    def describe(self, columns: Iterable[str]) -> str:
        """One line: the shape, the columns' roles, and what goes to metadata."""
        roles = {"prompt": self.prompt, "completion": self.completion, "label": self.label, "metadata": self.metadata}
        roles["tools"] = self.tools
        if self.reward_spec is not None and self.label is None:
            roles["label"] = f"{self.reward_spec}.ground_truth"
        named = ", ".join(f"{role} = {column}" for role, column in roles.items() if column is not None)
        extra = sorted(set(columns) - self.used)
        return f"{FAMILIES[self.name]} -> {named}" + (f"; to metadata: {', '.join(extra)}" if extra else "")

    @property
    def used(self) -> set[str]:
        """Columns with a role of their own."""
        chosen = (self.prompt, self.completion, self.label, self.metadata, self.tools)
        return {column for column in chosen if column is not None}


def detect_format(columns: Iterable[str], config: DataConfig | None = None, *, where: str = "dataset") -> Format:
    """The shape that these columns make; raises DataError naming columns and known shapes when none or several fit."""
    present = set(columns)
    config = config or DataConfig()
    for role in ("prompt_column", "label_column", "completion_column", "metadata_column", "tools_column"):
        column = getattr(config, role)
        if column is not None and column not in present:
            raise DataError(f"{where}: data.{role} = {column!r}, but the columns are {_names(present)}")
    name = _detect_name(present, config, where) if config.format == "auto" else config.format
    prompt = config.prompt_column or _PROMPT_COLUMN[name]
    completion = config.completion_column or ("completion" if name == "prompt_completion" else None)
    reward_spec = None
    if name == "verl":
        specs = [column for column in _REWARD_SPECS if column in present]
        if len(specs) != 1:
            raise DataError(f"{where}: verl's shape needs one of reward_model and reward_spec; columns are {_names(present)}")
        reward_spec = specs[0]
    for column in (prompt, completion):
        if column is not None and column not in present:
            raise DataError(f"{where}: the {name} shape needs column {column!r}; columns are {_names(present)}")
    label = config.label_column or (_detect_label(present - {prompt, completion}, where) if reward_spec is None else None)
    return Format(
        name=name,
        prompt=prompt,
        completion=completion,
        label=label,
        reward_spec=reward_spec,
        metadata=config.metadata_column or ("metadata" if "metadata" in present else None),
        tools=config.tools_column or ("tools" if "tools" in present else None),
    )


def _detect_name(present: set[str], config: DataConfig, where: str) -> str:
    if {"chosen", "rejected"} <= present:
        raise DataError(
            f"{where}: chosen/rejected are preference pairs; Miles trains on prompts with a reward, or on completions"
        )
    if config.prompt_column is not None:
        return "prompt_completion" if "completion" in present and config.completion_column is None else "prompt"
    prompts = [column for column in ("prompt", "messages", "input") if column in present]
    mixed = len(prompts) > 1 or ("messages" in present and "completion" in present) or {"instruction", "input"} <= present
    if mixed or not prompts:
        what = "columns of several shapes at once" if mixed else "no known shape"
        likely = next((column for column in _LIKELY_PROMPTS if column in present), prompts[0] if prompts else "...")
        known = "\n".join(f"  {name}: {shape}" for name, shape in FAMILIES.items())
        raise DataError(
            f"{where}: {what}; columns are {_names(present)}. Known shapes:\n{known}\n"
            f'Say which column holds the prompt, for example data.prompt_column = "{likely}", or set data.format'
        )
    if prompts[0] == "messages":
        return "messages"
    if prompts[0] == "input":
        return "slime"
    if present & set(_REWARD_SPECS):
        return "verl"
    return "prompt_completion" if "completion" in present else "prompt"


def _detect_label(present: set[str | None] | set[str], where: str) -> str | None:
    found = [column for column in _LABELS if column in present]
    if len(found) > 1:
        raise DataError(
            f'{where}: {" and ".join(found)} could each be the label; choose one, for example data.label_column = "{found[0]}"'
        )
    return found[0] if found else None


def convert_rows(raws: Sequence[RawRow], config: DataConfig, *, where: str) -> tuple[list[Row], Format, str]:
    """All rows of one source in the one inner shape, with the format found and its one-line description."""
    columns: dict[str, None] = {}
    for raw in raws:
        columns.update(dict.fromkeys(raw.columns))
    fmt = detect_format(columns, config, where=where)
    return [convert_row(raw, fmt) for raw in raws], fmt, f"{where}: {fmt.describe(columns)}"


def convert_row(raw: RawRow, fmt: Format) -> Row:
    """One row; raises DataError naming its origin and the column at fault."""
    columns = raw.columns
    for column in (fmt.prompt, fmt.completion, fmt.label, fmt.reward_spec):
        if column is not None and column not in columns:
            raise DataError(f"{raw.origin}: column {column!r} is missing; this row has {_names(columns)}")
    prompt = _text_or_messages(columns[fmt.prompt], raw.origin, fmt.prompt)
    completion = None if fmt.completion is None else _text_or_messages(columns[fmt.completion], raw.origin, fmt.completion)
    if completion is None and not isinstance(prompt, str) and prompt and prompt[-1].get("role") == "assistant":
        cut = max((i for i, turn in enumerate(prompt) if turn.get("role") != "assistant"), default=-1) + 1
        prompt, completion = prompt[:cut], prompt[cut:]
    label = columns[fmt.label] if fmt.label is not None else None
    if fmt.completion is not None and isinstance(label, bool):
        raise DataError(
            f"{raw.origin}: a true/false label beside a completion is KTO data; Miles needs a label the reward compares with"
        )
    if fmt.reward_spec is not None and fmt.label is None:
        spec = _nested(columns[fmt.reward_spec], raw.origin, fmt.reward_spec)
        if "ground_truth" not in spec:
            raise DataError(f"{raw.origin}: {fmt.reward_spec} has no ground_truth; it has {_names(spec)}")
        label = spec["ground_truth"]
    return Row(
        origin=raw.origin,
        prompt=prompt,
        completion=completion,
        label=_label_text(label),
        metadata=_metadata(raw, fmt),
        tools=_tools(columns.get(fmt.tools), raw.origin) if fmt.tools is not None else None,
        completion_is_apart=fmt.completion is not None,
    )


def _metadata(raw: RawRow, fmt: Format) -> dict[str, Any]:
    """The metadata column's dictionary and every column without a role; a name in both places is an error."""
    value = raw.columns.get(fmt.metadata) if fmt.metadata is not None else None
    metadata = {} if value is None else dict(_nested(value, raw.origin, str(fmt.metadata)))
    extra = {column: value for column, value in raw.columns.items() if column not in fmt.used}
    clash = sorted(metadata.keys() & extra.keys())
    if clash:
        raise DataError(f"{raw.origin}: {', '.join(clash)} stands both in column {fmt.metadata!r} and beside it; rename one")
    for column in (*_REWARD_SPECS, "extra_info"):
        if fmt.name == "verl" and isinstance(extra.get(column), str):
            extra[column] = _nested(extra[column], raw.origin, column)
    return {**metadata, **extra}


def _text_or_messages(value: Any, origin: str, column: str) -> str | tuple[Message, ...]:
    """Text, or a list of chat turns, possibly hidden as JSON in a string (a habit of parquet writers)."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return value
        try:
            hidden = msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
        if not (isinstance(hidden, list) and hidden and all(isinstance(turn, dict) and "role" in turn for turn in hidden)):
            return value
        value = hidden
    if isinstance(value, dict) and "role" in value:
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{origin}: column {column!r} is {type(value).__name__}; it must be text or a list of messages")
    for i, turn in enumerate(value):
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
            raise DataError(f'{origin}: {column}[{i}] is not a message; a message is {{"role": ..., "content": ...}}')
    # parquet gives every turn the keys of all turns, filled with null; templates test for presence
    return tuple({key: item for key, item in turn.items() if item is not None or key == "content"} for turn in value)


def _nested(value: Any, origin: str, column: str) -> dict[str, Any]:
    """A dictionary, possibly hidden as JSON in a string."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise DataError(f"{origin}: column {column!r} is text that is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin}: column {column!r} is {type(value).__name__}; it must be a dictionary")
    return value


def _tools(value: Any, origin: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise DataError(f"{origin}: tools is text that is not JSON: {error}") from None
    if not value:
        return None
    if not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise DataError(f"{origin}: tools must be a list of JSON schemas, or such a list as JSON text")
    return value


def _label_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _names(columns: Iterable[str]) -> str:
    return some(sorted(columns), limit=20) or "none"
