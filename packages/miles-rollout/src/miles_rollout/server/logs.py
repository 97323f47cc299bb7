"""Log lines that carry the id of the request they belong to, as text or as one JSON object each."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import Any, TextIO

import msgspec

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The id of the request that the running task serves."""
LEVELS = ("critical", "error", "warning", "info", "debug")
FORMATS = ("text", "json")


class _Stderr(logging.StreamHandler[TextIO]):
    """Standard error as it is now, not as it was when logging was set up."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Nothing to keep."""


class _WithId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found = getattr(record, "request_id", "")
        text = super().format(record)
        fields = getattr(record, "fields", None)
        extra = "".join(f" {name}={_plain(value)}" for name, value in fields.items()) if fields else ""
        return f"{text}{extra}" + (f" [{found}]" if found else "")


def _plain(value: Any) -> str:
    """A value on one line, quoted where it holds more than one word: what callers send must not look like lines of ours."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else json.dumps(text)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        if found := getattr(record, "request_id", ""):
            line["request_id"] = found
        line |= getattr(record, "fields", None) or {}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def announce(message: str, form: str) -> None:
    """One line on standard error whatever the log level, in the form of the log: it says the port, which may have been drawn."""
    if form == "json":
        message = _Json().format(logging.makeLogRecord({"name": "miles_rollout", "levelname": "INFO", "msg": message}))
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def setup_logging(level: str, form: str = "text") -> None:
    """Log to standard error. Raises ValueError for an unknown level or format."""
    if level not in LEVELS:
        raise ValueError(f"--log-level {level} must be one of {', '.join(LEVELS)}")
    if form not in FORMATS:
        raise ValueError(f"--log-format {form} must be one of {', '.join(FORMATS)}")
    handler = _Stderr()
    handler.addFilter(_WithId())
    handler.setFormatter(_Json() if form == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
