"""Settings of the router."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Policy = Literal["cache-aware", "least-loaded"]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits, deadlines and rights.

    Example: RouterConfig(admin_token="secret", max_per_worker=64)
    """

    policy: Policy = "cache-aware"
    """cache-aware: the worker that saw the longest beginning of the prompt, unless it is much busier than another."""
    admin_token: str | None = None
    """With a token, admin endpoints want `Authorization: Bearer TOKEN`; without, they answer callers on loopback only."""
    worker_token: str | None = None
    """The admin token of the workers."""
    max_per_worker: int = 256
    """Requests one worker serves at a time."""
    max_waiting: int = 1024
    """Requests that wait for a worker; one more is answered 429."""
    wait_s: float = 30.0
    """How long a request waits for a worker before it is answered 429 (all busy) or 503 (none serves)."""
    request_s: float = 600.0
    """Deadline of a request, waiting and retries included."""
    retries: int = 3
    """How often a request of which no token was delivered goes to another worker."""
    hedge_s: float = 0.0
    """Above 0: a request without a reply after so long goes to a second worker too, and the first reply is delivered. Requests
    without a seed then cost twice and differ; off by default."""
    health_interval_s: float = 1.0
    health_s: float = 5.0
    """Deadline of one health check; a worker that sent any byte meanwhile counts as alive."""
    fail_after: int = 2
    """Checks that must time out before a worker is given up. A refused connection needs no second one."""
    update_s: float = 300.0
    """Deadline of one worker's weight update."""
    drain_s: float = 30.0
    max_body_bytes: int = 32 << 20
    body_s: float = 60.0
    """How long the body of a request may take to arrive."""
    state: Path | None = None
    """Where the fleet's weight version is kept, so that a restarted router still refuses workers that lack it."""

    def validate(self) -> None:
        """Raise ValueError naming every setting outside its range."""
        low = {"max_per_worker": 1, "max_waiting": 0, "retries": 0, "fail_after": 1, "max_body_bytes": 1}
        wrong = [
            f"{name}={getattr(self, name)} must be at least {least}" for name, least in low.items() if getattr(self, name) < least
        ]
        seconds = ("wait_s", "request_s", "health_interval_s", "health_s", "update_s", "drain_s", "body_s")
        wrong += [f"{name}={getattr(self, name)} must be above 0" for name in seconds if not getattr(self, name) > 0]
        if not self.hedge_s >= 0:
            wrong.append(f"hedge_s={self.hedge_s} must not be negative; 0 is off")
        if self.admin_token is not None and not self.admin_token.strip():
            wrong.append("admin_token is empty; leave it out, or give a secret")
        if self.policy not in ("cache-aware", "least-loaded"):
            wrong.append(f"policy={self.policy!r} must be cache-aware or least-loaded")
        if wrong:
            raise ValueError("router: " + "; ".join(wrong))
