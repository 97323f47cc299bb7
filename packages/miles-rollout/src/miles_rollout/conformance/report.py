"""What the suite found, as records and as text."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["pass", "fail", "unsupported"]


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """One check. `detail` says what was wrong, or why the check does not apply; empty for a pass."""

    name: str
    status: Status
    detail: str = ""
    duration_s: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All checks against one server, in the order they ran."""

    url: str
    flavour: str
    """"miles" when the server states a contract digest, else "sglang"."""
    results: tuple[CheckResult, ...]

    def count(self, status: Status) -> int:
        """How many checks ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def ok(self) -> bool:
        """No check failed, and at least one passed."""
        return self.count("fail") == 0 and self.count("pass") > 0

    def text(self) -> str:
        """One line a check, then the totals."""
        width = max((len(result.name) for result in self.results), default=0)
        lines = [f"{r.status:<11} {r.name:<{width}}  {r.detail}".rstrip() for r in self.results]
        counts = ", ".join(f"{self.count(status)} {status}" for status in ("pass", "fail", "unsupported"))
        return "\n".join([*lines, f"{self.url} ({self.flavour}): {counts}"])
