"""How well drafts do: accept length, accept rate, and where drafts break off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class AcceptStats:
    """Counts over verify steps. Counts add up, so stats of engines and of sequences can be merged.

    Example: steps that accepted 2 of 3 and 0 of 3 tokens: accept_length 2.0 (3 + 1 tokens in 2 steps), accept_rate 1/3.
    """

    num_steps: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    accepted_at: dict[int, int] = field(default_factory=dict)
    """Draft position (from 0) -> how often the token there was accepted."""
    proposed_at: dict[int, int] = field(default_factory=dict)
    """Draft position (from 0) -> how often a token was proposed there."""

    def add(self, num_accepted: int, num_proposed: int) -> None:
        """Count one verify step. Raises ValueError when more was accepted than proposed."""
        if not 0 <= num_accepted <= num_proposed:
            raise ValueError(f"num_accepted={num_accepted} must lie in 0..num_proposed={num_proposed}")
        self.num_steps += 1
        self.num_proposed += num_proposed
        self.num_accepted += num_accepted
        for position in range(num_proposed):
            self.proposed_at[position] = self.proposed_at.get(position, 0) + 1
        for position in range(num_accepted):
            self.accepted_at[position] = self.accepted_at.get(position, 0) + 1

    def merge(self, others: Iterable[AcceptStats]) -> None:
        """Add the counts of others to these."""
        for other in others:
            self.num_steps += other.num_steps
            self.num_proposed += other.num_proposed
            self.num_accepted += other.num_accepted
            for mine, theirs in ((self.accepted_at, other.accepted_at), (self.proposed_at, other.proposed_at)):
                for position, count in theirs.items():
                    mine[position] = mine.get(position, 0) + count

    @property
    def accept_length(self) -> float:
        """Tokens per verify step, the target's own included; 1.0 is plain decoding."""
        return (self.num_accepted + self.num_steps) / self.num_steps if self.num_steps else 0.0

    @property
    def accept_rate(self) -> float:
        """Accepted draft tokens per proposed one."""
        return self.num_accepted / self.num_proposed if self.num_proposed else 0.0

    def rate_at(self, position: int) -> float:
        """Accept rate of the draft token at one position."""
        proposed = self.proposed_at.get(position, 0)
        return self.accepted_at.get(position, 0) / proposed if proposed else 0.0

    def as_metrics(self) -> dict[str, float]:
        """Flat names for a metrics file."""
        return {
            "spec/accept_length": self.accept_length,
            "spec/accept_rate": self.accept_rate,
            "spec/num_steps": float(self.num_steps),
            "spec/num_proposed": float(self.num_proposed),
            "spec/num_accepted": float(self.num_accepted),
        }
