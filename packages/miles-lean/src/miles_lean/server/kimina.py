"""Kimina's wire format: what its clients send and what they read, on top of our own results.

A clean answer here means what it means there, that elaboration ended without an error, and more: files that pass are
given to the audit as well, and what it finds comes back as an error message. Clients need no change to be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles_lean.backends.base import CompileResult, Message
from miles_lean.lexer import code_tokens


class BadRequest(ValueError):
    """The body is not what the endpoint takes; says which field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """One file to check."""

    id: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A whole request."""

    snippets: tuple[Snippet, ...]
    timeout_s: float
    debug: bool = False
    legacy: bool = False
    """It came to /verify, whose answers are laid out in another way."""


def parse_check(body: Any) -> Ask:
    """The body of POST /api/check. Raises BadRequest naming the field."""
    rows = _list(body, "snippets")
    snippets = tuple(Snippet(id=_string(row, "id"), code=_string(row, "code")) for row in rows)
    return _ask(body, snippets, default_s=30.0, legacy=False)


def parse_verify(body: Any) -> Ask:
    """The body of POST /verify. Raises BadRequest naming the field."""
    rows = _list(body, "codes")
    snippets = []
    for row in rows:
        code = row.get("proof") if row.get("proof") is not None else row.get("code")
        if not isinstance(code, str):
            raise BadRequest("codes: every entry needs proof or code, a string")
        if not isinstance(row.get("custom_id"), (str, int)):
            raise BadRequest("codes: every entry needs custom_id, a string or a number")
        snippets.append(Snippet(id=str(row["custom_id"]), code=code))
    return _ask(body, tuple(snippets), default_s=300.0, legacy=True)


def answer(
    snippet: Snippet, result: CompileResult, ask: Ask, *, audit: str = "", extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One entry of `results`. `audit` is what the audit found wrong with a file that elaborates; "" when nothing."""
    seconds = result.seconds
    if result.outcome == "timeout":
        return failure(snippet, f"Lean REPL command timed out in {ask.timeout_s:g} seconds", ask, seconds)
    if result.outcome in ("infra", "crash"):
        return failure(snippet, f"{result.outcome}: {result.detail}", ask, seconds)
    messages = [_message(message) for message in result.messages]
    if audit:
        messages.append({"severity": "error", "pos": {"line": 1, "column": 0}, "endPos": None, "data": f"judge: {audit}"})
    response: dict[str, Any] = {"env": 0}
    if messages:
        response["messages"] = messages
    if sorries := _sorries(result, snippet.code):
        response["sorries"] = sorries
    if ask.legacy:
        return {"custom_id": snippet.id, "error": None, "response": {**response, "time": seconds}}
    diagnostics = {"diagnostics": extra} if ask.debug and extra else {}
    return {"id": snippet.id, "time": seconds, "error": None, "response": response, **diagnostics}


def failure(snippet: Snippet, message: str, ask: Ask, seconds: float = 0.0) -> dict[str, Any]:
    """An entry for a snippet about which Lean said nothing."""
    if ask.legacy:
        return {"custom_id": snippet.id, "error": message, "response": None}
    return {"id": snippet.id, "time": seconds, "error": message, "response": None}


def _message(message: Message) -> dict[str, Any]:
    severity = "info" if message.severity == "information" else message.severity
    end = None if message.end_line is None else {"line": message.end_line, "column": message.end_column or 0}
    return {"severity": severity, "pos": {"line": message.line, "column": message.column}, "endPos": end, "data": message.text}


def _sorries(result: CompileResult, code: str) -> list[dict[str, Any]]:
    """Places of `sorry` in a file Lean warned about (the warning can be switched off: the words in the code count, too)."""
    if result.outcome != "ok":
        return []
    found = []
    for token in code_tokens(code):
        if token.kind == "ident" and token.text.removeprefix("_root_.") in ("sorry", "sorryAx", "admit"):
            line = code.count("\n", 0, token.start)
            column = token.start - (code.rfind("\n", 0, token.start) + 1)
            pos = {"line": line + 1, "column": column}
            found.append({"pos": pos, "endPos": {"line": line + 1, "column": column + len(token.text)}, "goal": ""})
    return found


def _ask(body: Any, snippets: tuple[Snippet, ...], *, default_s: float, legacy: bool) -> Ask:
    if not snippets:
        raise BadRequest("there is nothing to check: the list is empty")
    ids = [snippet.id for snippet in snippets]
    if len(set(ids)) != len(ids):
        raise BadRequest(f"ids must be unique; {next(one for one in ids if ids.count(one) > 1)!r} stands twice")
    timeout = body.get("timeout", default_s)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout < 0:
        raise BadRequest(f"timeout = {timeout!r} must be a number of seconds")
    return Ask(snippets=snippets, timeout_s=float(timeout), debug=bool(body.get("debug", False)), legacy=legacy)


def _list(body: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a JSON {type(body).__name__}; it must be an object with {field}")
    rows = body.get(field)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadRequest(f"{field} must be a list of objects")
    return rows


def _string(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise BadRequest(f"{field} is {value!r}; it must be a string")
    return value
