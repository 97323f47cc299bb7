"""One problem in the one shape used inside, whatever dataset it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_lean.lexer import code_tokens
from miles_lean.statement import MARKER, Statement


class DataError(ValueError):
    """A row or file that cannot be used: says which, what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A theorem to prove.

    Example: Problem(problem_id="t1", header="import Mathlib", statement="theorem t1 : 1 + 1 = 2 := by sorry", name="t1")
    """

    problem_id: str
    """Unique in its file; the dataset's own id where it has one."""
    statement: str
    """Lean source with one open proof, as `Statement.parse` reads it: definitions it needs, docstring, theorem."""
    name: str = ""
    """The theorem's name; "" for an example."""
    header: str = ""
    """Imports, opens and options that go in front; "" means the backend's default."""
    informal: str = ""
    """The problem in words."""
    split: str = ""
    """valid, test, train; "" when the dataset does not say."""
    proof: str | None = None
    """A proof that came with the problem, unverified: the text that goes into the slot."""
    holes: tuple[str, ...] = ()
    """Definitions that the prover has to give, too (PutnamBench's `..._solution`)."""
    win_rate: float | None = None
    """Share of earlier attempts that succeeded, 0 to 1, where the dataset or a rollout knows it."""
    toolchain: str = ""
    """Lean version the statement was written for, such as "leanprover/lean4:v4.9.0"; "" when unknown."""
    source: str = ""
    """Which dataset."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other columns worth keeping: difficulty, topic, answer."""

    @property
    def file(self) -> str:
        """Header and statement together: a whole Lean file with an open proof."""
        return f"{self.header.rstrip()}\n\n{self.statement}" if self.header.strip() else self.statement

    @property
    def slot(self) -> Statement:
        """The parsed statement, header included. Raises ValueError when its slot cannot be found."""
        return Statement.parse(self.file)

    @property
    def text_key(self) -> str:
        """Hash of the statement's code tokens without its name: equal for copies that differ in space, comments and name."""
        texts = [token.text for token in code_tokens(self.statement)]
        if self.name in texts:
            texts.remove(self.name)
        return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()

    def row(self, prompt: str, *, completion: str | None = None) -> dict[str, Any]:
        """A row for miles-core: `prompt`, `label` and a `metadata` dictionary that the Lean reward understands."""
        metadata = {"statement": self.statement, "header": self.header, "name": self.name, "holes": list(self.holes)}
        made: dict[str, Any] = {"prompt": prompt, "label": self.problem_id, "metadata": metadata}
        return made if completion is None else made | {"completion": completion}


def checked(problem: Problem, where: str) -> Problem:
    """The problem itself, its slot found and its name filled in. Raises DataError naming the row."""
    from dataclasses import replace

    try:
        slot = Statement.parse(problem.statement)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    return problem if problem.name else replace(problem, name=slot.name)


def opened(source: str) -> str:
    """A statement whose last `sorry` is the slot, marked where there are several; one that ends bare gets ":= by sorry"."""
    source = source.replace("\r\n", "\n").strip()
    code = code_tokens(source)
    sorries = [token for token in code if token.text == "sorry"]
    if sorries and sorries[-1] is code[-1] and len(sorries) > 1:
        last = sorries[-1]
        return source[: last.start] + MARKER + source[last.stop :]
    if code and code[-1].text not in (":=", "by", "sorry") and MARKER not in source:
        return source + " := by sorry"
    return source
