"""What every way of running Lean looks like from outside: one record of abilities, one result, one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Outcome = Literal["ok", "rejected", "crash", "timeout", "infra"]
"""ok: Lean ended well. rejected: Lean refused the source, with messages. crash: the Lean process died on this source
(signal, stack overflow, memory limit). timeout: the deadline passed and the process group was killed. infra: nothing was
learned about the source (no Lean, full disk, worker lost for reasons of its own); try again, never score it.

"ok" means that elaboration ended without errors. It does not mean that anything is proved: only the judge says that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of Lean. Lines count from 1, columns from 0 in code points, as Lean prints them."""

    severity: Literal["error", "warning", "information"]
    text: str
    line: int
    column: int
    end_line: int | None = None
    end_column: int | None = None

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.severity}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do, and which Lean its results hold for."""

    name: str
    """embedded, toolchain, repl, http or replay."""
    version: str
    """Lean's version, as "4.35.0"; "" when the backend cannot tell."""
    githash: str
    """Lean's commit, 40 hex digits; "" when the backend cannot tell."""
    identity: str
    """Changes whenever a verdict could: Lean's commit, prelude or project manifest. Cache keys and verdicts carry it."""
    has_mathlib: bool = False
    can_olean: bool = False
    """compile() writes .olean files."""
    can_lsp: bool = False
    """command(["--worker"]) is a Lean server worker."""
    can_replay: bool = False
    """The kernel can be run on .olean files in a process of its own (see miles_lean.judge)."""
    default_header: str = ""
    """What to put before a file that has no header of its own; "" when Lean's own default import serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """What one run of Lean gave. `olean` is set only when the outcome is ok and a file was asked for."""

    outcome: Outcome
    rc: int | None
    """Exit code of the process; negative for a signal; None when there was no process or it was killed for time."""
    messages: tuple[Message, ...]
    seconds: float
    """Wall-clock time from the call to the answer."""
    olean: Path | None = None
    detail: str = ""
    """One line for people: why it crashed, what infrastructure failed, which limit was hit."""

    @property
    def errors(self) -> tuple[Message, ...]:
        """The messages that are errors."""
        return tuple(message for message in self.messages if message.severity == "error")


class Backend(Protocol):
    """A Lean that can be run. Methods block; miles_lean.workers.Pool runs many at once for asyncio programs.

    Example:
        backend = find_backend()
        result = backend.compile("theorem t : 2 + 2 = 4 := rfl", out=folder / "Submission.olean", deadline=10.0)
    """

    @property
    def capabilities(self) -> Capabilities:
        """The record of this backend; constant for its lifetime."""
        ...

    @property
    def search_path(self) -> tuple[Path, ...]:
        """Folders whose .olean files an import finds (LEAN_PATH), first match wins; () when there are no local files."""
        ...

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        """The argument list that runs Lean's own command line with these arguments; run it with `environment()`."""
        ...

    def environment(self) -> Mapping[str, str]:
        """The complete environment of a Lean process; nothing is inherited."""
        ...

    def compile(self, source: str, *, out: Path, deadline: float) -> CompileResult:
        """Elaborate a file in a process of its own and write `out` (a path that ends in .olean).

        The module is called after `out` (x/Submission.olean is module Submission); compile a challenge and its solution
        under the same name, in different folders, and private names agree. `deadline` is in seconds from this call; the
        whole process group is killed when it passes. Never raises for what Lean or the machine does: see `outcome`.
        """
        ...

    def elaborate(self, source: str, *, deadline: float) -> CompileResult:
        """The fast stage: elaborate only, in a shared worker where there is one. Says no quickly; a yes proves nothing."""
        ...

    def close(self) -> None:
        """End every process this backend started."""
        ...
