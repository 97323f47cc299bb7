"""What runs inside a reward process: import the function once, score, report failures as values, die with the parent."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from miles_core.imports import load_callable
from miles_core.rollout.rewards.calling import Convention, RewardInput, Score, invoke, scores_of

_PARENT_POLL_S = 0.5


def prepare(target: str, parent_pid: int) -> None:
    """Start-up of a reward process: import now, so that an import does not count against a call's time limit."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a kill must not wait for Python to look
    threading.Thread(target=_die_with_parent, args=(parent_pid,), daemon=True).start()
    try:
        load_callable(target, purpose="reward")
    except Exception:
        return  # the first call fails the same way, and reports it with its sample


def ping() -> int:
    """Answers when the process is up."""
    return os.getpid()


def score(target: str, convention: Convention, items: Sequence[RewardInput], options: Mapping[str, Any]) -> list[Score]:
    """Scores of the items of one call; whatever the function raises becomes error scores."""
    try:
        function = load_callable(target, purpose="reward")
        raw = invoke(function, convention, items, options)
        if asyncio.iscoroutine(raw):
            raw = asyncio.run(raw)
        return scores_of(convention, raw, len(items))
    except (Exception, SystemExit) as error:
        return [failure(error)] * len(items)


def failure(error: BaseException) -> Score:
    """An error score naming exception, message and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return Score(None, "error", f"raised {type(error).__name__}: {error}{where}")


def _die_with_parent(parent_pid: int) -> None:
    """After a kill -9 of the parent nobody else would end a process that hangs in a reward."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)
