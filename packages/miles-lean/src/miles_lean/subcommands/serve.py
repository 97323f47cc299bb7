"""`miles-lean serve`: checks and verdicts over HTTP, for our clients and for Kimina's."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from miles_lean.backends.discover import KNOWN
from miles_lean.server.service import Limits


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    usual = Limits()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one and prints it")
    parser.add_argument("--backend", default="auto", help=f"auto, {KNOWN}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="checks at one time")
    parser.add_argument("--queue", type=int, default=usual.queue_size, help="checks that may wait; more are answered 429")
    parser.add_argument("--max-wait", type=float, default=usual.max_wait_s, help="longest wait for a worker, seconds")
    parser.add_argument("--max-timeout", type=float, default=usual.max_timeout_s, help="longest time for one check, seconds")
    parser.add_argument("--elaborate-s", type=float, default=10.0, help="deadline of the fast stage of a proof, seconds")
    parser.add_argument("--judge-s", type=float, default=20.0, help="deadline of the judge's two stages, seconds each")
    parser.add_argument("--max-rss-mib", type=int, default=2048, help="resident memory at which a check is ended, MiB")
    parser.add_argument(
        "--no-fast", action="store_true", help="sandboxed processes only: for backends on which proofs can start programs"
    )
    parser.add_argument("--drain", type=float, default=usual.drain_s, help="seconds for running checks after SIGTERM")
    parser.add_argument("--cache", default="", help="file of remembered verdicts; read at the start, appended to")
    parser.add_argument("--no-audit", action="store_true", help="answer Kimina clients from Lean's messages alone")
    parser.add_argument(
        "--api-key-env", default="MILES_LEAN_API_KEY", help="variable that holds the API key; no key is wanted when it is unset"
    )


def run(options: argparse.Namespace) -> int:
    """0 after a complete drain, 1 when running checks had to be cut off, 3 when there is no Lean to serve."""
    from miles_lean.backends.discover import require_backend
    from miles_lean.reward.connect import audit_function, connect
    from miles_lean.server.serve import serve
    from miles_lean.server.service import Service

    for name in ("workers", "elaborate_s", "judge_s", "max_rss_mib"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name):g}: must be above 0")
    limits = Limits(
        slots=options.workers,
        queue_size=options.queue,
        max_wait_s=options.max_wait,
        max_timeout_s=options.max_timeout,
        drain_s=options.drain,
    )

    try:
        require_backend(options.backend)
    except RuntimeError as error:
        print(f"miles-lean: {error}", file=sys.stderr)
        return 3

    async def main() -> bool:
        verifier = connect(
            options.backend,
            workers=options.workers,
            cache=options.cache,
            elaborate_s=options.elaborate_s,
            judge_s=options.judge_s,
            fast=not options.no_fast,
            max_rss=options.max_rss_mib << 20,
        )
        audit = None if options.no_audit else audit_function(verifier)
        service = Service(verifier, limits, audit=audit)
        key = os.environ.get(options.api_key_env)
        return await serve(service, host=options.host, port=options.port, api_key=key)

    return 0 if asyncio.run(main()) else 1
