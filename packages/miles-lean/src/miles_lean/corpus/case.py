"""One attack, its honest twin, and what the judge must say to each."""

from __future__ import annotations

from dataclasses import dataclass

from miles_lean.judge.compare import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`attack` must be rejected for one of `reasons`, `twin` accepted. The twin uses the same trick without cheating."""

    name: str
    family: str
    challenge: str
    attack: str
    reasons: tuple[str, ...]
    twin: str
    twin_challenge: str = ""
    """What the twin proves, when it is not the attack's challenge (a false statement has no honest proof)."""
    rules: Rules = Rules()
    deadline_s: float = 20.0

    def __post_init__(self) -> None:
        assert self.reasons, self.name


def stated(statement: str) -> str:
    """A challenge that asks for one theorem, `t`."""
    return f"theorem t : {statement} := by sorry\n"
