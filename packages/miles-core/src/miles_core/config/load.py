"""From a TOML file or a recipe name, and `--section.key value` flags, to a frozen `RunConfig`; all errors at once."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from miles_core.config.schema import RunConfig
from miles_core.config.toml_lines import KeyPath, key_lines, line_of
from miles_core.recipes.catalog import recipe_names, recipe_text


class ConfigError(ValueError):
    """One or more things wrong with the configuration; `problems` holds one message each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "" if len(self.problems) == 1 else f"{len(self.problems)} problems:\n"
        super().__init__(count + "\n".join(self.problems))


@dataclass(frozen=True)
class Override:
    """One `--section.key value` flag."""

    path: tuple[str, ...]
    value: Any
    text: str
    """As written, for fields that want a string."""

    @property
    def flag(self) -> str:
        """The flag as the user wrote it, without its value."""
        return "--" + ".".join(self.path)


@dataclass(frozen=True)
class Source:
    """The text a configuration starts from."""

    label: str
    """What messages call it: a path, or 'recipe "quickstart"'."""
    name: str
    """Default name of the run."""
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


def load_config(target: str, arguments: Sequence[str] = (), *, extra: Sequence[Override] = ()) -> RunConfig:
    """The resolved configuration of a recipe or file with overrides applied; `run.name` is always set.

    `extra` are overrides that have flags of their own (`--steps`). Raises ConfigError with every problem found.
    """
    source = read_source(target)
    overrides = [*parse_overrides(arguments), *extra]
    values: dict[str, Any] = _copy(source.values)
    problems = [problem for problem in (_apply(values, override) for override in overrides) if problem]
    config, invalid = _validate(values, source, overrides)
    problems += invalid
    if problems or config is None:
        raise ConfigError(problems)
    return config if config.run.name is not None else config.with_name(source.name)


def read_source(target: str) -> Source:
    """The TOML of a file (`my.toml`, any path with a slash) or of a recipe that ships with Miles."""
    path = Path(target)
    if path.suffix == ".toml" or "/" in target or path.is_file():
        if not path.is_file():
            raise ConfigError([f"{target}: no such file (current directory: {Path.cwd()})"])
        return _parse(path.read_text(encoding="utf-8"), label=target, name=path.stem)
    if target not in recipe_names():
        raise ConfigError(
            [f'no recipe "{target}"{_nearest(target, recipe_names())}; known: {", ".join(recipe_names())}; a file ends in .toml']
        )
    return _parse(recipe_text(target), label=f'recipe "{target}"', name=target)


def _parse(text: str, *, label: str, name: str) -> Source:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{label}: not TOML: {error}"]) from None
    return Source(label=label, name=name, values=values, lines=key_lines(text))


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """`--section.key value` and `--section.key=value`; values are TOML literals, anything else is a plain string."""
    overrides, problems, rest = [], [], list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, text = flag.removeprefix("--").partition("=")
        path = tuple(part.replace("-", "_") if i < 2 else part for i, part in enumerate(name.split(".")))
        if not flag.startswith("--") or len(path) < 2 or not all(path):
            problems.append(f"{flag}: not a setting; a setting is written --section.key value, for example --optimizer.lr 1e-4")
            continue
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                problems.append(f"{flag}: the value is missing; write --{name} VALUE (a switch takes true or false)")
                continue
            text = rest.pop(0)
        overrides.append(Override(path, literal(text), text))
    if problems:
        raise ConfigError(problems)
    return overrides


def literal(text: str) -> Any:
    """A TOML value when the text is one, otherwise the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _apply(values: dict[str, Any], override: Override) -> str | None:
    """Set one override in place; a message when its path runs through something that is no table."""
    table: Any = values
    for i, part in enumerate(override.path[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return f"{override.flag}: {'.'.join(override.path[: i + 1])} is a value, not a table"
    table[override.path[-1]] = override.value
    return None


def _validate(values: dict[str, Any], source: Source, overrides: Sequence[Override]) -> tuple[RunConfig | None, list[str]]:
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        if _reread_as_text(values, error, overrides):
            return _validate(values, source, overrides)
        return None, [_message(detail, source, overrides) for detail in error.errors(include_url=False)]


def _reread_as_text(values: dict[str, Any], error: ValidationError, overrides: Sequence[Override]) -> bool:
    """A flag like `--run.name 7` means the text "7": put it back where a string was expected. True when something changed."""
    wanted = {tuple(detail["loc"]) for detail in error.errors() if detail["type"] == "string_type"}
    changed = False
    for override in overrides:
        if override.path in wanted and not isinstance(override.value, str):
            table = values
            for part in override.path[:-1]:
                table = table[part]
            changed |= table[override.path[-1]] != override.text
            table[override.path[-1]] = override.text
    return changed


def _message(detail: Any, source: Source, overrides: Sequence[Override]) -> str:
    """Where the key was set, which key it is, what is wrong with it."""
    location: KeyPath = tuple(detail["loc"])
    key = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        what = f"unknown key{_nearest(str(location[-1]), known)}" + ("" if known else "; nothing may be set here")
        if len(location) == 1:
            what = f"unknown section{_nearest(key, known)}; sections: {', '.join(known)}"
    elif detail["type"] == "missing":
        what = f"is required{_purpose(location)}"
    else:
        what = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if detail["type"] != "value_error" and not isinstance(detail["input"], dict):
            what += f"; got {detail['input']!r}"
    where = _where(location, source, overrides)
    return f"{where}: {what}" if where == f"--{key}" or not key else f"{where}: {key}: {what}"


def _where(location: KeyPath, source: Source, overrides: Sequence[Override]) -> str:
    for override in reversed(overrides):
        if location and (override.path[: len(location)] == location or location[: len(override.path)] == override.path):
            return override.flag
    line = line_of(source.lines, location)
    return source.label if line is None else f"{source.label}:{line}"


def _fields_at(location: KeyPath) -> list[str]:
    """Names that may stand in the table at `location`."""
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = _section_in(annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _purpose(location: KeyPath) -> str:
    """What a required section is for: the first line of its documentation."""
    field = RunConfig.model_fields.get(str(location[0])) if len(location) == 1 else None
    section = None if field is None else _section_in(field.annotation)
    return f": {(section.__doc__ or '').splitlines()[0]}" if section is not None else ""


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation like `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
