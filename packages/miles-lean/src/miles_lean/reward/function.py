"""The reward `lean` for miles-core: 1.0 for a proof the judge accepts, 0.0 for one it does not, an error for everything else.

An error means that the sample gets no reward and is not trained (miles-core counts it); it is never a 0.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from miles_lean.backends.discover import require_backend
from miles_lean.extract import NoProof, extract
from miles_lean.reward.connect import connect
from miles_lean.reward.outcome import Outcome
from miles_lean.reward.verifier import Verifier
from miles_lean.statement import Statement


class Failed(RuntimeError):
    """The machine, not the proof, failed: this sample has no reward."""


class Scoring:
    """A verifier with its options, shared by all calls of one event loop; counts outcomes by category."""

    def __init__(self, verifier: Verifier, log: Path | None) -> None:
        self.verifier = verifier
        self.categories: Counter[str] = Counter()
        self._log: IO[str] | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = log.open("a", encoding="utf-8")

    async def outcome(self, text: str, metadata: Mapping[str, Any]) -> Outcome:
        """The outcome of one completion. Raises ValueError when the row is no problem of ours."""
        made = await self._outcome(text, metadata)
        self.categories[made.category] += 1
        if self._log is not None:
            line = {"name": str(metadata.get("name") or ""), "text": text, **made.as_dict()}
            self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._log.flush()
        return made

    async def _outcome(self, text: str, metadata: Mapping[str, Any]) -> Outcome:
        statement = statement_of(metadata)
        try:
            proof = proof_of(text, str(metadata.get("format") or "auto"), statement)
        except NoProof as error:
            return Outcome(category="no_code", reason=str(error))
        except ValueError as error:
            return Outcome(category="bad_form", reason=str(error))
        return await self.verifier.verify(statement, proof, header=str(metadata.get("header") or ""))

    async def close(self) -> None:
        """End everything that was started."""
        if self._log is not None:
            self._log.close()
        await self.verifier.close()


_BY_LOOP: dict[tuple[asyncio.AbstractEventLoop, str], tuple[Scoring, asyncio.Task[None]]] = {}


async def lean(
    text: str,
    label: str | None,
    metadata: Mapping[str, Any],
    *,
    backend: str = "auto",
    workers: int = 2,
    elaborate_s: float = 10.0,
    judge_s: float = 20.0,
    retries: int = 2,
    cache: str = "",
    log: str = "",
) -> dict[str, Any]:
    """1.0 when the judge accepts the completion as a proof of `metadata["statement"]`, else 0.0.

    `backend` is a backend's name or the address of a server; `cache` a file of remembered verdicts; `log` a file that
    gets one JSON line with category, reason and times for every completion. Raises Failed when the machine failed.
    """
    options = {"workers": workers, "elaborate_s": elaborate_s, "judge_s": judge_s, "retries": retries}
    scoring = scoring_of(backend, options, cache, log)
    found = await scoring.outcome(text, metadata)
    if found.status == "infra_error":
        raise Failed(f"{found.category} after {found.attempts} attempts: {found.reason}")
    return {"score": float(found.status == "accepted"), "category": found.category, "reason": found.reason}


def ready(*, backend: str = "auto", **_: Any) -> None:
    """What miles-core asks a reward before anything is generated. Raises RuntimeError saying what to install."""
    require_backend(backend)


lean.ready = ready  # type: ignore[attr-defined]


def statement_of(metadata: Mapping[str, Any]) -> Statement:
    """The open statement of a row. Raises ValueError when the row holds none."""
    source = metadata.get("statement")
    if not isinstance(source, str):
        raise ValueError('metadata["statement"] must hold Lean source with an open proof; see miles_lean.data')
    return Statement.parse(source)


def proof_of(text: str, format: str, statement: Statement) -> str:
    """The proof in a completion. "raw" takes all of it; other formats as in `extract`. Raises NoProof or ValueError."""
    if format == "raw":
        if not text.strip():
            raise NoProof("the completion is empty")
        return text
    found = extract(text, format)
    return statement.proof_in(found.code) if found.kind == "file" else found.code


def scoring_of(backend: str, options: dict[str, Any], cache: str, log: str) -> Scoring:
    """The one of this loop and these options; it is closed when the loop cancels its tasks at its end."""
    loop = asyncio.get_running_loop()
    key = (loop, json.dumps([backend, options, cache, log], sort_keys=True))
    if key not in _BY_LOOP:
        scoring = Scoring(connect(backend, cache=cache, **options), Path(log) if log else None)
        _BY_LOOP[key] = (scoring, loop.create_task(_close_at_end(key, scoring)))
    return _BY_LOOP[key][0]


async def _close_at_end(key: tuple[asyncio.AbstractEventLoop, str], scoring: Scoring) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        _BY_LOOP.pop(key, None)
        await scoring.close()
