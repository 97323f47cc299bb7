"""Log lines that carry the id of the request they belong to, as text or as one JSON object each."""

from __future__ import annotations

import contextvars
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
        extra = "".join(f" {name}={value}" for name, value in fields.items()) if fields else ""
        return f"{text}{extra}" + (f" [{found}]" if found else "")


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
