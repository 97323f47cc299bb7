"""Every setting with its type, default, bounds and meaning, read off the sections themselves: `miles settings`."""

from __future__ import annotations

import difflib
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from miles_core.config.schema import RunConfig

_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "at least {} of them"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of the configuration.

    Example: Setting(name="optimizer.lr", kind="float", default="1e-06", bounds="at least 0.0", text="Peak learning rate.")
    """

    name: str
    kind: str
    default: str
    """As in a TOML file, or "" where it must be given or is unset."""
    bounds: str
    text: str

    @property
    def section(self) -> str:
        """The table it stands in."""
        return self.name.rpartition(".")[0]


def settings() -> list[Setting]:
    """All of them, in the order of the sections."""
    return list(_walk(RunConfig, ""))


def reference(query: str | None, width: int | None = None) -> str:
    """Settings as text: the sections, those of one section, one of them, or all that mention a word.

    Raises ValueError naming the nearest when nothing does.
    """
    width = width or max(60, min(120, shutil.get_terminal_size().columns))
    found = settings()
    if query is None:
        return "\n".join([*_sections(width), "", "miles settings SECTION, SECTION.KEY or any word says more"])
    name = query.strip("[]-").strip()
    chosen = [one for one in found if one.name == name] or [one for one in found if f"{one.section}.".startswith(f"{name}.")]
    chosen = chosen or [one for one in found if name.lower() in f"{one.name} {one.text}".lower()]
    if not chosen:
        near = difflib.get_close_matches(name, [*RunConfig.model_fields, *(one.name for one in found)], n=3, cutoff=0.5)
        raise ValueError(
            f'no setting mentions "{query}"' + (f"; near it: {', '.join(near)}" if near else "; see: miles settings")
        )
    return "\n".join(_entry(one, width) for one in chosen)


def _sections(width: int) -> Iterator[str]:
    for name, field in RunConfig.model_fields.items():
        section = _section_of(field.annotation)
        assert section is not None
        count = sum(one.name.startswith(f"{name}.") for one in settings())
        words = " ".join((section.__doc__ or "").split("\n\n")[0].split())
        head = f"[{name}]".ljust(13) + f"{count:3}  "
        yield head + textwrap.shorten(words, width - len(head), placeholder=" …")


def _entry(setting: Setting, width: int) -> str:
    head = f"--{setting.name}  {setting.kind}"
    head += f" = {setting.default}" if setting.default else ""
    head += f"  ({setting.bounds})" if setting.bounds else ""
    body = textwrap.fill(" ".join(setting.text.split()), width, initial_indent="    ", subsequent_indent="    ")
    return f"{head}\n{body}"


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")
        else:
            bounds = [
                words.format(getattr(one, key)) for one in field.metadata for key, words in _BOUNDS.items() if hasattr(one, key)
            ]
            yield Setting(
                name=prefix + name,
                kind=_kind(field.annotation),
                default=_default(field),
                bounds=", ".join(bounds),
                text=field.description or "",
            )


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section an annotation like `Section` or `Section | None` is of; a list of tables is a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for one in typing.get_args(annotation) if (found := _section_of(one)) is not None), None)
    return None


def _kind(annotation: Any) -> str:
    """A type in a user's words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(_toml(one) for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_kind(one) for one in arguments if one is not type(None))
    if origin is tuple:
        inner = [_kind(one) for one in arguments if one is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if origin is dict or annotation is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return {str: "text", int: "integer", float: "number", bool: "true | false"}.get(annotation, "value")


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() or field.default is None else _toml(field.default)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\n", "\\n") + '"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return "{}" if value == {} else str(value)
