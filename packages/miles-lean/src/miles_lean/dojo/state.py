"""What a tactic can lead to."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Goal:
    """One goal as Lean prints it.

    Example: Goal.parse("case inl\\np q : Prop\\nh : p\\n⊢ q").conclusion is "q".
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> Goal:
        """From Lean's print of one goal."""
        return cls(text.strip("\n"))

    @property
    def case(self) -> str:
        """The goal's tag; "" when it has none."""
        first = self.text.split("\n", 1)[0]
        return first.removeprefix("case ").strip() if first.startswith("case ") else ""

    @property
    def conclusion(self) -> str:
        """What is to be shown, on one line."""
        return " ".join(self.text.rpartition("⊢")[2].split())

    @property
    def assumptions(self) -> tuple[tuple[str, str], ...]:
        """(name, type) of everything before the turnstile; a line that is indented continues the one before."""
        found: list[tuple[str, str]] = []
        before = self.text.rpartition("⊢")[0]
        for line in before.split("\n"):
            if line.startswith("case ") or not line.strip():
                continue
            names, colon, kind = line.partition(" : ")
            if line.startswith(" ") and found:
                found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
            elif colon:
                found += [(name, kind.strip()) for name in names.split()]
        return tuple(found)


@dataclass(frozen=True)
class TacticState:
    """Open goals after some tactics. States are values: any of them can be gone on from, in any order."""

    goals_text: tuple[str, ...]
    script: tuple[str, ...] = ()
    """The tactics that led here."""
    id: int = 0
    message: str = ""
    """What Lean said that was no error."""

    @property
    def pp(self) -> str:
        """All goals as Lean prints them, an empty line between two."""
        return "\n\n".join(self.goals_text)

    @cached_property
    def goals(self) -> tuple[Goal, ...]:
        """The goals, parsed."""
        return tuple(Goal.parse(text) for text in self.goals_text)

    @property
    def num_goals(self) -> int:
        """How many are open."""
        return len(self.goals_text)


@dataclass(frozen=True)
class ProofFinished:
    """No goal is open. Lean elaborated it; whether it is a proof says `Verifier.verify(dojo.statement, finished.proof)`."""

    script: tuple[str, ...]
    tactic_state_id: int = 0
    message: str = ""

    @property
    def proof(self) -> str:
        """The whole tactic block."""
        return "\n".join(self.script)


@dataclass(frozen=True)
class ProofGivenUp:
    """No goal is open because of a `sorry`."""


@dataclass(frozen=True)
class LeanError:
    """Lean refused the tactic; the state it was tried in is unchanged."""

    error: str


@dataclass(frozen=True)
class Timeout:
    """The tactic did not end within its time; Lean was killed, the state it was tried in is unchanged."""

    seconds: float


@dataclass(frozen=True)
class Crash:
    """Lean did not survive the tactic. `infra`: it was not the tactic's doing, and says nothing about it."""

    detail: str
    infra: bool = False


Result = TacticState | ProofFinished | ProofGivenUp | LeanError | Timeout | Crash


@dataclass(frozen=True)
class View:
    """What a look at a partial proof shows."""

    goals: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    given_up: bool = False
