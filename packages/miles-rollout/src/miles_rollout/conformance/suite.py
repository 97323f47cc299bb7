"""Runs every check, one after the other, whatever the ones before it found."""

from __future__ import annotations

import asyncio
import fnmatch
import time
from collections.abc import Awaitable, Callable

import httpx

from miles_rollout.conformance import admin, native, openai
from miles_rollout.conformance.report import CheckResult, Report, Status
from miles_rollout.conformance.target import CheckFailed, Options, Target, Unsupported

Check = Callable[[Target], Awaitable[None]]
GROUPS: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("native", native.CHECKS), ("openai", openai.CHECKS), ("admin", admin.CHECKS),
)  # fmt: skip
CHECKS: dict[str, Check] = {f"{group}/{check.__name__}": check for group, checks in GROUPS for check in checks}  # type: ignore[attr-defined]
"""Name to check, in running order. A check's docstring says what it demands."""


async def run_suite(url: str, options: Options | None = None, *, only: str = "*") -> Report:
    """Run the checks whose names match the pattern `only` against the server at `url`.

    Raises ValueError when nothing there answers as a rollout server does, or no check has such a name.
    """
    options = options or Options()
    if len(options.prompt_ids) < 5:
        raise ValueError(f"the prompt has {len(options.prompt_ids)} token ids; the checks need at least 5")
    chosen = {name: check for name, check in CHECKS.items() if fnmatch.fnmatchcase(name, only)}
    if not chosen:
        raise ValueError(f"no check matches {only!r}; there are {', '.join(CHECKS)}")
    async with httpx.AsyncClient(timeout=options.timeout_s) as http:
        target = Target(url.rstrip("/"), options, http)
        await target.refresh()
        results = [await _run(name, check, target) for name, check in chosen.items()]
    return Report(url=target.url, flavour="miles" if target.is_miles else "sglang", results=tuple(results))


async def _run(name: str, check: Check, target: Target) -> CheckResult:
    started = time.perf_counter()
    status: Status = "pass"
    detail = ""
    try:
        async with asyncio.timeout(4 * target.options.timeout_s):
            await check(target)
    except Unsupported as error:
        status, detail = "unsupported", str(error)
    except CheckFailed as error:
        status, detail = "fail", str(error)
    except Exception as error:  # a reply so odd that the check itself tripped over it is a failure too
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return CheckResult(name=name, status=status, detail=detail, duration_s=time.perf_counter() - started)
