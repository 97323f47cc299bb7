"""Honest proofs over the prelude: what a verifier must never refuse. Files of theorems, one blank line between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class HonestProof:
    """A theorem with its proof. `statement` ends in ":= by" or ":="; the proof is indented by two spaces."""

    name: str
    topic: str
    statement: str
    proof: str

    @property
    def source(self) -> str:
        """The whole file that a checker must accept."""
        return f"{self.statement}\n{self.proof}\n"

    @property
    def challenge(self) -> str:
        """The same statement with its proof left out by `sorry`."""
        return f"{self.statement} sorry\n"


@lru_cache(maxsize=1)
def honest_proofs() -> tuple[HonestProof, ...]:
    """All of them, by topic. Raises ValueError for a file that is not of this form, naming the theorem."""
    found = []
    for path in sorted(FOLDER.glob("*.lean")):
        for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
            statement, _, proof = block.partition("\n")
            name = statement.split()[1] if statement.startswith("theorem ") else ""
            if not name or not statement.endswith((":= by", ":=")) or not proof.startswith("  "):
                raise ValueError(f"{path.name}: not a theorem on one line with an indented proof: {block[:80]!r}")
            found.append(HonestProof(name, path.stem, statement, proof))
    names = [proof.name for proof in found]
    if len(set(names)) != len(names):
        raise ValueError(f"twice: {sorted({name for name in names if names.count(name) > 1})}")
    return tuple(found)
