"""Named checks of a running server, for the tools beside this file: one failure does not hide the others."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

RESULTS: list[dict[str, Any]] = []


async def check(name: str, call: Callable[[], Awaitable[Any]], deadline_s: float = 120) -> None:
    """Run one check and say how it ended; what it returns is reported with it."""
    began = time.perf_counter()
    status, detail = "pass", None
    try:
        async with asyncio.timeout(deadline_s):
            detail = await call()
    except Exception as error:
        status, detail = "FAIL", f"{type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - began, 3)
    RESULTS.append({"name": name, "status": status, "s": seconds, "detail": detail})
    print(f"{status:5} {seconds:8.3f} s  {name}  {json.dumps(detail) if detail is not None else ''}", flush=True)


def demand(condition: bool, message: Any) -> None:
    """Raise AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def finish(out: str) -> None:
    """Write the results to `out`, if that is a name, say how many passed and end: with 1 unless there are some and all did."""
    if out:
        Path(out).write_text(json.dumps(RESULTS, indent=1))
    failed = [row["name"] for row in RESULTS if row["status"] != "pass"]
    print(f"{len(RESULTS) - len(failed)} of {len(RESULTS)} checks passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    raise SystemExit(bool(failed) or not RESULTS)
