"""What came of one proof: a status that training and services act on, a category that people count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Status = Literal["accepted", "rejected", "infra_error"]

CATEGORIES: Mapping[str, Status] = MappingProxyType(
    {
        "proved": "accepted",
        "no_code": "rejected",
        "bad_form": "rejected",
        "lean_error": "rejected",
        "judge": "rejected",
        "timeout": "rejected",
        "crash": "rejected",
        "infra": "infra_error",
        "overload": "infra_error",
    }
)
"""Category to status. proved: the judge accepted it. no_code: the output holds no Lean. bad_form: the code does not fit the
slot. lean_error: elaboration failed. judge: it elaborates and is no proof of the statement (axioms, another statement,
forgery). timeout, crash: Lean did not survive it. infra, overload: nothing was learned about it."""

LASTING = frozenset({"proved", "no_code", "bad_form", "lean_error", "judge", "crash"})
"""Categories that the same proof will get again on the same Lean; only these are cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result for one proof. Only `accepted` is worth a reward; `infra_error` is worth nothing at all, not even 0.

    Example: Outcome(category="lean_error", reason="2:3: error: unknown identifier 'h'", identity="6f45...")
    """

    category: str
    reason: str = ""
    """For people, and for the model to read: Lean's first errors, the judge's reason."""
    identity: str = ""
    """Which Lean, prelude or project the verdict holds for (Capabilities.identity)."""
    axioms: tuple[str, ...] = ()
    """Axioms an accepted proof rests on."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage: queue_s, import_s, elaborate_s, judge_s."""
    cached: bool = False
    attempts: int = 1

    def __post_init__(self) -> None:
        assert self.category in CATEGORIES, self.category

    @property
    def status(self) -> Status:
        """accepted, rejected or infra_error."""
        return CATEGORIES[self.category]

    @property
    def is_lasting(self) -> bool:
        """Whether the verdict may be remembered."""
        return self.category in LASTING

    def as_dict(self) -> dict[str, Any]:
        """For JSON, `status` included."""
        fields = {name: getattr(self, name) for name in ("category", "reason", "identity", "cached", "attempts")}
        return {"status": self.status, **fields, "axioms": list(self.axioms), "times": dict(self.times)}
