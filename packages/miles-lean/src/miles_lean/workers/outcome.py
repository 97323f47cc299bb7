"""From how a Lean process ended to what that says about the source."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from miles_lean.backends.base import CompileResult, Message, Outcome
from miles_lean.workers.process import Finished

_CRASHES = {
    int(signal.SIGSEGV),
    int(signal.SIGABRT),
    int(signal.SIGBUS),
    int(signal.SIGILL),
    int(signal.SIGFPE),
    int(signal.SIGSYS),
}
_MACHINE = (
    "no space left on device",
    "disk quota exceeded",
    "read-only file system",
    "input/output error",
    "too many open files",
    "failed to create thread",
    "resource temporarily unavailable",
    "cannot allocate memory",
    "error while loading shared libraries",
    "cannot open shared object file",
)


def parse_messages(text: str) -> tuple[Message, ...]:
    """Lean's --json output, one object a line; lines that are no message (a program may print anything) are left out."""
    found = []
    for line in text.split("\n"):  # not splitlines, which cuts at U+2028 in a string, too
        if line.startswith("{"):
            try:
                found.append(message_from(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                continue
    return tuple(found)


def message_from(entry: dict[str, object]) -> Message:
    """One --json object. Raises KeyError, TypeError or ValueError when it has another shape."""
    severity, start, end = entry["severity"], entry["pos"], entry.get("endPos")
    if severity not in ("error", "warning", "information") or not isinstance(start, dict):
        raise ValueError(f"not a message of Lean: severity {severity!r}")
    last = end if isinstance(end, dict) else {}
    text = "\n".join(part for part in (str(entry.get("caption") or ""), str(entry["data"])) if part)
    return Message(
        severity=severity,
        text=text,
        line=int(start["line"]),
        column=int(start["column"]),
        end_line=last.get("line"),
        end_column=last.get("column"),
    )


def judge_exit(done: Finished, *, olean: Path | None = None) -> CompileResult:
    """The result of a `lean --json` run that ended this way; `olean` is what it was asked to write."""
    messages = parse_messages(done.stdout)
    outcome, detail = _outcome(done, messages)
    if outcome == "ok" and olean is not None and not olean.is_file():
        outcome, detail = "infra", f"Lean ended with exit code 0 and did not write {olean.name}"
    return CompileResult(
        outcome=outcome,
        rc=done.rc,
        messages=messages,
        seconds=done.seconds,
        olean=olean if outcome == "ok" else None,
        detail=detail,
    )


def _outcome(done: Finished, messages: tuple[Message, ...]) -> tuple[Outcome, str]:
    last = done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else ""
    if done.ended == "timeout":
        return "timeout", f"killed after {done.seconds:.2f} s"
    if done.ended == "memory":
        return "crash", "killed for using more memory than its limit"
    if done.ended == "failed" or done.rc is None:
        return "infra", last or "the Lean process did not start"
    failure = next((text for text in _MACHINE if text in done.stderr.lower()), "")
    if failure and done.rc:
        return "infra", last
    code = -done.rc if done.rc < 0 else done.rc - 128 if done.rc > 128 else 0
    if code in _CRASHES:
        return "crash", f"Lean died of {signal.Signals(code).name}" + (f": {last}" if last else "")
    if done.rc < 0:
        return "infra", f"Lean was killed by {signal.Signals(-done.rc).name} from outside"
    if done.rc == 0:
        return "ok", ""
    if any(message.severity == "error" for message in messages):
        return "rejected", ""
    if done.dropped:
        return "rejected", f"exit code {done.rc}; {done.dropped} bytes of output were dropped"
    return "infra", f"exit code {done.rc} without an error message" + (f": {last}" if last else "")
