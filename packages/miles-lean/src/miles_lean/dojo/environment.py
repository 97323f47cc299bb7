"""The tactic environment: states are values, a tactic applied to one gives a result, nothing else changes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from types import TracebackType
from typing import Literal

from miles_lean.backends.base import Backend
from miles_lean.dojo.look import ByServer, Look, Partial, by_messages
from miles_lean.dojo.state import Crash, LeanError, ProofFinished, ProofGivenUp, Result, TacticState, Timeout, View
from miles_lean.lexer import code_tokens
from miles_lean.statement import Statement

_REMEMBERED = 10_000


class InitError(RuntimeError):
    """The theorem itself does not elaborate, or Lean could not be started; says which."""


class Dojo:
    """Tactic by tactic on one statement, whose proof must be a tactic block.

    `goals` chooses how goals are read: "server" ($/lean/plainGoal), "messages" (any backend), "auto". Results are
    remembered, so going back to a state and trying the same tactic again asks nobody.

    Example:
        with Dojo("theorem t (p q : Prop) (h : p ∧ q) : q := by sorry", backend) as (dojo, state):
            result = dojo.run_tac(state, "exact h.2")     # ProofFinished
    """

    def __init__(
        self,
        statement: str | Statement,
        backend: Backend,
        *,
        header: str = "",
        timeout_s: float = 10.0,
        goals: Literal["auto", "server", "messages"] = "auto",
    ) -> None:
        self.statement = Statement.parse(statement) if isinstance(statement, str) else statement
        if self.statement.mode != "tactic":
            raise ValueError(f"{self.statement.name or 'the statement'} ends with ':='; tactics need ':= by'")
        self.backend, self.header, self.timeout_s = backend, header, timeout_s
        use_server = backend.capabilities.can_lsp if goals == "auto" else goals == "server"
        self._server = ByServer(backend) if use_server else None
        self._look: Look = self._server if self._server is not None else by_messages(backend)
        self._ids = itertools.count()
        self._known: OrderedDict[tuple[tuple[str, ...], str], Result] = OrderedDict()
        self.is_successful = False

    def init(self) -> TacticState:
        """The state before the first tactic. Raises InitError."""
        seen = self._see(())
        if isinstance(seen, (Timeout, Crash)):
            raise InitError(f"{self.statement.name}: {seen}")
        if seen.errors:
            raise InitError(f"{self.statement.name} does not elaborate: {seen.errors[0]}")
        return TacticState(goals_text=seen.goals, id=next(self._ids))

    def run_tac(self, state: TacticState, tactic: str) -> Result:
        """What one tactic, of one line or several, does in that state. Never raises for what is in the tactic."""
        key = (state.script, tactic)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        result = self._run(state, tactic)
        if not isinstance(result, (Timeout, Crash)):
            self._known[key] = result
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self.is_successful |= isinstance(result, ProofFinished)
        return result

    def source(self, script: tuple[str, ...]) -> str:
        """The whole file with these tactics. Raises ValueError when they do not fit into the slot."""
        return self._file(self.statement.fill("\n".join(script)))

    def close(self) -> None:
        """End what this environment started; the backend stays."""
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> tuple[Dojo, TacticState]:
        try:
            return self, self.init()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, state: TacticState, tactic: str) -> Result:
        script = (*state.script, tactic)
        try:
            self.statement.fill("\n".join(script))
        except ValueError as error:
            return LeanError(str(error))
        seen = self._see(script)
        if isinstance(seen, (Timeout, Crash)):
            return seen
        if seen.errors:
            return LeanError(seen.errors[0])
        message = "\n".join(seen.notes)
        if seen.goals:
            return TacticState(goals_text=seen.goals, script=script, id=next(self._ids), message=message)
        if seen.given_up or any(token.text in ("sorry", "admit") for token in code_tokens(tactic)):
            return ProofGivenUp()
        return ProofFinished(script=script, tactic_state_id=next(self._ids), message=message)

    def _see(self, script: tuple[str, ...]) -> View | Timeout | Crash:
        before = self._file(self.statement.before)
        if script:
            filled = Statement(self.statement.before, "", "tactic").fill("\n".join(script))
        else:
            filled = self.statement.before + "\n  skip\n"
        return self._look(Partial(before=before, source=self._file(filled)), self.timeout_s)

    def _file(self, source: str) -> str:
        return f"{self.header.rstrip()}\n\n{source}" if self.header.strip() else source
