"""From sources to tokenized prompts or SFT examples, with a report of everything found and left out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from miles_core.data.config import DataConfig
from miles_core.data.formats import convert_rows
from miles_core.data.gym import gym_rows
from miles_core.data.prompts import PromptBuilder
from miles_core.data.readers import plain_row, read_file, split_slice
from miles_core.data.record import DataError, LoadReport, Prompt, RawRow, Row, SFTExample
from miles_core.data.sft import build_example
from miles_core.data.tasks import task_rows
from miles_core.imports import load_callable
from miles_rollout.text import Tokenizer

_GENERATOR = re.compile(r"(?P<head>[\w./-]+):(?P<name>[\w.]+)(?:\?(?P<query>.*))?")


def load_rows(spec: str, *, name: str | None = None) -> list[RawRow]:
    """The rows of one source (see DataConfig), sliced; `name` replaces the file name in origins.

    Raises DataError for anything that is not there or not readable.
    """
    source, part = split_slice(spec)
    if part.step == 0 or not source:
        raise DataError(f"{spec!r}: not a source")
    match = _GENERATOR.fullmatch(source)
    if match is None or Path(source).exists():
        rows = read_file(Path(source), part, name or Path(source).name)
    else:
        rows = _generated_rows(match["head"], match["name"], match["query"] or "")[part]
    if not rows:
        raise DataError(f"{spec}: no rows" + (" in this slice" if part != slice(None) else ""))
    return rows


def _generated_rows(head: str, name: str, query: str) -> list[RawRow]:
    source = f"{head}:{name}"
    settings = _settings(source, query)
    if head == "gym":
        values: Iterable[Any] = gym_rows(name, **settings)
    elif head == "task":
        values = task_rows(name, **settings)
    else:
        function = load_callable(source, purpose=f"data source {source}")
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        unknown = sorted(settings.keys() - set(known))
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise DataError(f"{source}: the function has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        values = function(**settings)
        if not isinstance(values, Iterable):
            raise DataError(
                f"{source}: the function returned {type(values).__name__}; it must return or yield rows (dictionaries)"
            )
    return [plain_row(f"{source}:{number}", value) for number, value in enumerate(values, 1)]


def _settings(source: str, query: str) -> dict[str, Any]:
    """ "size=10&split=train" to {"size": 10, "split": "train"}: values are JSON where they can be, text otherwise."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise DataError(f"{source}?{query}: settings are written key=value&key=value ({error})") from None
    settings: dict[str, Any] = {}
    for key, text in pairs:
        if key in settings:
            raise DataError(f"{source}?{query}: {key} is given twice")
        try:
            settings[key] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            settings[key] = text
    for key, least in (("size", 1), ("seed", 0)):
        if key in settings and (type(settings[key]) is not int or settings[key] < least):
            raise DataError(f"{source}?{query}: {key} = {settings[key]!r} must be a whole number, at least {least}")
    return settings


def load_prompts(
    specs: str | Sequence[str], tokenizer: Tokenizer, config: DataConfig, *, max_tokens: int | None = None
) -> tuple[list[Prompt], LoadReport]:
    """All prompts of the sources, in order, tokenized; `max_tokens` is what the context leaves for a prompt.

    Raises DataError for bad rows, and for long, empty or duplicate prompts where the configuration says so.
    """
    report = LoadReport()
    builder = PromptBuilder(tokenizer, config)
    limits = [(config.max_prompt_tokens, "data.max_prompt_tokens"), (max_tokens, "what the context leaves for a prompt")]
    limit, why = min(((value, name) for value, name in limits if value is not None), default=(None, ""))
    prompts: list[Prompt] = []
    seen: dict[tuple[Any, ...], str] = {}
    problems = _Problems(config, report)
    for row in chain.from_iterable(_converted(specs, config, report)):
        if _is_empty(row):
            problems.add("empty_prompts", "empty prompt", row.origin, "the prompt holds no text")
            continue
        prompt = builder.build(row)
        size = len(prompt.input_ids)
        if limit is not None and size > limit:
            what = f"the prompt has {size} tokens, the limit is {limit} ({why})"
            problems.add("long_prompts", f"prompt over {limit} tokens", row.origin, what)
            continue
        earlier = seen.get((prompt.input_ids, prompt.label))
        if earlier is not None:
            report.duplicates.append(row.origin)
            if config.duplicate_prompts != "keep":
                problems.add("duplicate_prompts", "duplicate", row.origin, f"same prompt and label as {earlier}")
                continue
        seen.setdefault((prompt.input_ids, prompt.label), row.origin)
        prompts.append(prompt)
    problems.finish(specs, len(prompts))
    return prompts, report


def load_sft(specs: str | Sequence[str], tokenizer: Tokenizer, config: DataConfig) -> tuple[list[SFTExample], LoadReport]:
    """All rows of the sources as token sequences with a loss mask over the completions.

    Raises DataError for rows without a completion, and for over-long ones where the configuration says so.
    """
    report = LoadReport()
    builder = PromptBuilder(tokenizer, config)
    examples: list[SFTExample] = []
    problems = _Problems(config, report)
    for row in chain.from_iterable(_converted(specs, config, report)):
        if _is_empty(row):
            problems.add("empty_prompts", "empty prompt", row.origin, "the prompt holds no text")
            continue
        example = build_example(row, builder)
        size, limit = len(example.token_ids), config.max_sequence_tokens
        if limit is not None and size > limit:
            what = f"the example has {size} tokens, the limit is {limit} (data.max_sequence_tokens)"
            problems.add("long_prompts", f"example over {limit} tokens", row.origin, what)
            continue
        examples.append(example)
    problems.finish(specs, len(examples))
    return examples, report


def _converted(specs: str | Sequence[str], config: DataConfig, report: LoadReport) -> Iterable[list[Row]]:
    sources = (specs,) if isinstance(specs, str) else tuple(specs)
    if not sources:
        raise DataError('no data: give at least one source, for example data.train = "train.jsonl"')
    names = [Path(split_slice(spec)[0]).name for spec in sources]
    for spec, name in zip(sources, names, strict=True):
        path = split_slice(spec)[0]
        rows, _, line = convert_rows(load_rows(spec, name=path if names.count(name) > 1 else name), config, where=spec)
        report.formats.append(line)
        report.num_rows += len(rows)
        yield rows


def _is_empty(row: Row) -> bool:
    """A template or worked example does not make an empty question whole, so this looks at the row itself."""
    if isinstance(row.prompt, str):
        return not row.prompt.strip()
    return not any(turn.get("content") for turn in row.prompt if turn["role"] != "system")


class _Problems:
    """Rows at fault: dropped and counted where the configuration says so, else collected into one error."""

    def __init__(self, config: DataConfig, report: LoadReport) -> None:
        self._config, self._report = config, report
        self._wrong: list[str] = []

    def add(self, option: str, reason: str, origin: str, what: str) -> None:
        """One row; `option` names the policy in DataConfig."""
        if getattr(self._config, option) == "drop":
            self._report.drop(reason, origin)
        else:
            self._wrong.append(f'{origin}: {what}; change the row, or set data.{option} = "drop"')

    def finish(self, specs: str | Sequence[str], kept: int) -> None:
        """Raise DataError naming the first rows at fault, or when no row is left."""
        self._report.num_kept = kept
        if self._wrong:
            more = [f"... and {len(self._wrong) - 5} more rows"] if len(self._wrong) > 5 else []
            raise DataError("\n".join([*self._wrong[:5], *more]))
        if not kept:
            raise DataError(f"{specs}: no row is left:\n" + "\n".join(self._report.lines()))
