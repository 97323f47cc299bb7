"""What the judge says about one solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from miles_lean.backends.base import Message

REASONS: dict[str, str] = {
    "lean_error": "Lean refused the source",
    "timeout": "elaboration did not end before its deadline",
    "memory": "elaboration needed more memory than its limit",
    "crash": "Lean's process died on this source, twice",
    "no_olean": "Lean ended without an error and without a result, twice",
    "malformed_olean": "the compiled module is not what Lean writes",
    "module_header": "the file keeps its proofs out of the module that others see",
    "foreign_import": "it imports something outside the library",
    "redeclares_library": "it declares a name of the library",
    "sentinel_missing": "the file was not read to its end",
    "theorem_missing": "the theorem is not there",
    "wrong_kind": "the name is there, but it is no theorem",
    "universe_levels": "the theorem has other universe levels",
    "statement_differs": "the theorem states something else",
    "definition_missing": "a definition of the challenge is not there",
    "definition_changed": "a definition that the statement depends on has changed",
    "hole_differs": "a definition to be chosen has another type or kind",
    "unsafe_declaration": "the proof uses an unsafe or partial declaration",
    "sorry": "the proof is left open",
    "axiom": "the proof rests on an axiom that is not allowed",
    "native_decide": "the proof trusts compiled code",
    "kernel": "the kernel refuses a declaration",
    "check_timeout": "the kernel did not end before its deadline",
    "check_memory": "the kernel needed more memory than its limit",
    "check_crash": "the checking process died on this module, twice",
    "not_a_proof": "the submission does not fit into the statement's slot",
}
"""Every reason a rejection can have, and what it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """accepted, rejected with a reason, or infra: nothing was learned, try again and never score it."""

    status: Literal["accepted", "rejected", "infra"]
    reason: str = ""
    """A key of REASONS when rejected; "infra" or "" otherwise."""
    detail: str = ""
    targets: tuple[str, ...] = ()
    """The theorems that were asked for."""
    holes: tuple[str, ...] = ()
    """The definitions that the solution was free to choose."""
    axioms: tuple[str, ...] = ()
    """Every axiom that targets and holes rest on."""
    replayed: int = 0
    """Declarations that the kernel checked again."""
    checker: str = ""
    """What checked the proof: "kernel" in a fresh process, or an outside program's name."""
    versions: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    """Seconds: challenge, compile, check, total."""
    messages: tuple[Message, ...] = ()
    """What Lean said about the solution. For people and for feedback; the verdict does not depend on it."""

    @property
    def accepted(self) -> bool:
        """The only thing that earns a reward."""
        return self.status == "accepted"

    @property
    def exit_code(self) -> int:
        """0 accepted, 1 rejected, 3 infrastructure failure."""
        return {"accepted": 0, "rejected": 1, "infra": 3}[self.status]

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self) | {"accepted": self.accepted}

    def __str__(self) -> str:
        if self.accepted:
            return f"accepted: {', '.join(self.targets)} (axioms: {', '.join(self.axioms) or 'none'})"
        return f"{self.status}: {self.reason}: {self.detail or REASONS.get(self.reason, '')}"
