"""The base of every configuration section: typed, frozen, documented, refusing unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One table of the run configuration. Each field is followed by a docstring, which becomes its reference entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
