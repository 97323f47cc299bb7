"""How a reward function is called, told by its parameter names, and how its answer becomes a number or a failure.

| convention | parameters                                       | called with |
|---|---|---|
| miles      | any of text, label, metadata, prompt, messages   | one completion |
| verl       | solution_str, ground_truth (data_source, extra_info) | one completion |
| slime      | args, sample (.prompt .response .label .metadata) | one completion |
| trl        | completions (prompts, dataset columns by name)   | lists: all completions of a group |
| openrlhf   | queries, prompts, labels                         | lists: all completions of a group |

Options of the configuration are passed by keyword (slime: as attributes of args). Functions may be sync or async.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from miles_rollout.wire import RewardStatus

Convention = Literal["miles", "verl", "slime", "trl", "openrlhf"]
_OURS = ("text", "label", "metadata", "prompt", "messages")


class RewardError(ValueError):
    """The reward cannot be had: too many samples without one, or no process that could compute it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInput:
    """One completion to score."""

    sample_id: int
    prompt_id: str
    text: str
    label: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    """The prompt's text."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The prompt's conversation, when it is one."""


class Score(NamedTuple):
    """A reward, or why there is none: `value` is None unless `status` is "ok"."""

    value: float | None
    status: RewardStatus = "ok"
    detail: str = ""


def convention_of(function: Callable[..., Any], name: str) -> Convention:
    """Which convention the function's parameters follow; raises ValueError listing the known ones when none fits."""
    parameters = inspect.signature(function).parameters
    names = set(parameters)
    if {"solution_str", "ground_truth"} <= names:
        return "verl"
    if {"queries", "prompts", "labels"} <= names:
        return "openrlhf"
    if "completions" in names:
        return "trl"
    if {"args", "sample"} <= names:
        return "slime"
    if "text" in names:
        return "miles"
    raise ValueError(
        f"reward {name}: parameters ({', '.join(parameters)}) fit no known signature. Known are (text, label, metadata), "
        f"verl (data_source, solution_str, ground_truth, extra_info), TRL (prompts, completions, **columns), "
        f"OpenRLHF (queries, prompts, labels), slime (args, sample)"
    )


def check_options(function: Callable[..., Any], convention: Convention, options: Mapping[str, Any], name: str) -> None:
    """Raise ValueError naming options the function does not take."""
    if convention == "slime":
        return
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    given = {
        "miles": _OURS,
        "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
        "trl": ("prompts", "completions"),
        "openrlhf": ("queries", "prompts", "labels"),
    }[convention]
    known = [key for key, p in parameters.items() if key not in given and p.kind is not p.VAR_POSITIONAL]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(f"reward {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")


def is_batched(convention: Convention) -> bool:
    """Whether one call takes all completions of a group."""
    return convention in ("trl", "openrlhf")


def invoke(function: Callable[..., Any], convention: Convention, items: Sequence[RewardInput], options: Mapping[str, Any]) -> Any:
    """Call the function on one item, or on the items of one group; the raw answer, or an awaitable of it."""
    first = items[0]
    if convention == "miles":
        known = {key: getattr(first, key) for key in _OURS}
        return function(**_accepted(function, known), **options)
    if convention == "verl":
        known = {
            "data_source": first.metadata.get("data_source"),
            "solution_str": first.text,
            "ground_truth": first.label,
            "extra_info": first.metadata.get("extra_info"),
        }
        return function(**_accepted(function, known), **options)
    if convention == "slime":
        sample = SimpleNamespace(
            index=first.sample_id,
            prompt=first.prompt if first.messages is None else list(first.messages),
            response=first.text,
            label=first.label,
            metadata=dict(first.metadata),
        )
        return function(SimpleNamespace(**options), sample)
    if convention == "openrlhf":
        queries = [item.prompt + item.text for item in items]
        return function(queries, [item.prompt for item in items], [item.label for item in items], **options)
    chat = first.messages is not None
    columns = {key: [item.metadata.get(key) for item in items] for key in first.metadata}
    columns |= {
        key: [item.label for item in items] for key in ("label", "answer", "ground_truth", "solution") if key not in columns
    }
    known = {
        **columns,
        "prompts": [list(item.messages) if item.messages is not None else item.prompt for item in items],
        "completions": [[{"role": "assistant", "content": item.text}] if chat else item.text for item in items],
    }
    return function(**{**_accepted(function, known), **options})


def scores_of(convention: Convention, raw: Any, count: int) -> list[Score]:
    """`count` scores from a function's raw answer; anything that is not a finite number becomes an error."""
    if not is_batched(convention):
        if isinstance(raw, dict) and "score" in raw:
            raw = raw["score"]
        return [as_score(raw)] * count
    if convention == "openrlhf" and isinstance(raw, dict):
        raw = raw.get("rewards")
    if hasattr(raw, "tolist"):
        raw = raw.tolist()
    if not isinstance(raw, (list, tuple)):
        return [Score(None, "error", f"returned {type(raw).__name__}; it must return a list of {count} numbers")] * count
    if len(raw) != count:
        return [Score(None, "error", f"returned {len(raw)} rewards for {count} completions")] * count
    return [as_score(value) for value in raw]


def as_score(value: Any) -> Score:
    """A finite number as a score; None, NaN, infinity and other types as an error saying so."""
    if hasattr(value, "item") and not isinstance(value, (int, float)):
        try:
            value = value.item()  # a scalar of numpy or torch
        except (TypeError, ValueError, RuntimeError) as error:
            return Score(None, "error", f"returned {type(value).__name__} that is not one number: {error}")
    if not isinstance(value, (int, float)):
        return Score(None, "error", f"returned {type(value).__name__} {str(value)[:80]!r}; a reward is a number")
    if not math.isfinite(value):
        return Score(None, "error", f"returned {value}; a reward is a finite number")
    return Score(float(value))


def _accepted(function: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `known` that the function has parameters for; all of it for **columns."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(known)
    return {key: value for key, value in known.items() if key in parameters}
