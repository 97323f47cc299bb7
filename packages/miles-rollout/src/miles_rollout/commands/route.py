"""`miles-rollout route`."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from miles_rollout import __version__
from miles_rollout.commands.common import AdminToken, DrainS, Host, LogFormat, LogLevel, Otel, Port, shown, user_errors


def route(
    context: typer.Context,
    workers: Annotated[list[str] | None, typer.Argument(metavar="[URL]...", help="Servers; others may join at /workers.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 30000,
    spawn: Annotated[int, typer.Option(help="Start this many servers of --model and restart those that die or hang.")] = 0,
    model: Annotated[str | None, typer.Option(help="With --spawn: the model; options after -- are those of `serve`.")] = None,
    spawn_port: Annotated[int, typer.Option(help="With --spawn: port of the first server; 0 takes free ones.")] = 0,
    gpus: Annotated[str, typer.Option(help="With --spawn and --device cuda: GPUs dealt to the servers, as in 0,1,2,3.")] = "",
    admin_token: AdminToken = None,
    worker_token: Annotated[
        str | None, typer.Option(envvar="MILES_ROLLOUT_WORKER_TOKEN", help="The admin token of the servers.")
    ] = None,
    policy: Annotated[str, typer.Option(help="cache-aware or least-loaded.")] = "cache-aware",
    state: Annotated[Path | None, typer.Option(help="File that keeps the fleet's weight version across restarts.")] = None,
    max_per_worker: Annotated[int, typer.Option(help="Requests one server gets at a time.")] = 256,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait for a server; one more is answered 429.")] = 1024,
    wait_s: Annotated[float, typer.Option(help="How long a request waits for a server.")] = 30.0,
    request_s: Annotated[float, typer.Option(help="Deadline of a request.")] = 600.0,
    retries: Annotated[int, typer.Option(help="How often a request goes elsewhere while nothing of it was delivered.")] = 3,
    hedge_s: Annotated[float, typer.Option(help="Ask a second server after so many seconds without a reply; 0 never.")] = 0.0,
    health_interval_s: Annotated[float, typer.Option(help="Between two health checks.")] = 1.0,
    health_s: Annotated[float, typer.Option(help="Deadline of a health check.")] = 5.0,
    fail_after: Annotated[int, typer.Option(help="Checks that must time out before a server is given up.")] = 2,
    hung_s: Annotated[float, typer.Option(help="With --spawn: a server that answers nothing for so long is killed.")] = 20.0,
    update_s: Annotated[float, typer.Option(help="Deadline of one server's weight update.")] = 300.0,
    drain_s: DrainS = 30.0,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    otel: Otel = False,
) -> None:
    """One address for many servers: health, load, prefix caches, weight versions; with --spawn, servers of its own."""
    with user_errors():
        from miles_rollout.extras import require

        for library in ("starlette", "uvicorn"):
            require(library, extra="server", purpose="miles-rollout route")
        from miles_rollout.router import RouterConfig
        from miles_rollout.server import bind
        from miles_rollout.server.logs import setup_logging
        from miles_rollout.server.tracing import setup_tracing

        urls, options = _split(workers or [], context.args)
        if spawn < 0 or (spawn > 0) != (model is not None):
            raise ValueError("--spawn COUNT and --model MODEL go together")
        if options and not spawn:
            raise ValueError(f"unexpected argument {options[0]!r}; options after -- are for servers started with --spawn")
        if gpus and not (spawn and all(each.strip() for each in gpus.split(","))):
            raise ValueError(f"--gpus {gpus} is for servers started with --spawn: names between commas, as in 0,1,2,3")
        if spawn and worker_token is None:
            worker_token = secrets.token_urlsafe(24)
        config = RouterConfig(
            policy=policy,  # type: ignore[arg-type]
            admin_token=admin_token, worker_token=worker_token, max_per_worker=max_per_worker,
            max_waiting=max_waiting, wait_s=wait_s, request_s=request_s, retries=retries, hedge_s=hedge_s,
            health_interval_s=health_interval_s, health_s=health_s, fail_after=fail_after, update_s=update_s, drain_s=drain_s,
            state=state,
        )  # fmt: skip
        config.validate()
        setup_logging(log_level, log_format)
        if otel:
            setup_tracing("miles-rollout-router")
        sock = bind(host, port)
        with sock:
            own = [each.strip() for each in gpus.split(",")] if gpus else []
            logs = ["--log-level", log_level, "--log-format", log_format, *(["--otel"] if otel else [])]
            asyncio.run(
                _route(urls, config, sock, spawn, model or "", [*logs, *options], spawn_port, hung_s, own, log_level, log_format)
            )


def _split(words: list[str], extra: list[str]) -> tuple[list[str], list[str]]:
    """Addresses come first; the first word that is none, and all after it, are options for `serve`."""
    everything = [*words, *extra]
    count = next((i for i, word in enumerate(everything) if not word.startswith(("http://", "https://"))), len(everything))
    return everything[:count], everything[count:]


async def _route(
    urls: list[str],
    config: Any,
    sock: Any,
    spawn: int,
    model: str,
    options: list[str],
    first: int,
    hung_s: float,
    gpus: list[str],
    level: str,
    form: str,
) -> None:
    from miles_rollout.child import free_port
    from miles_rollout.router import create_router
    from miles_rollout.router.supervise import Supervisor
    from miles_rollout.server import serve
    from miles_rollout.server.logs import announce

    app = create_router(urls, config)

    def command(port: int) -> list[str]:
        line = [sys.executable, "-m", "miles_rollout.cli", "serve", model, "--port", str(port)]
        return [*line, "--drain-s", str(config.drain_s), *options]

    ports = [first + i if first else free_port() for i in range(spawn)]
    env = os.environ | {"MILES_ROLLOUT_ADMIN_TOKEN": config.worker_token or ""}
    fleet, grace_s = app.state.service.fleet, config.drain_s + 5
    supervisor = Supervisor(fleet, command, ports, env=env, gpus=gpus, hung_s=hung_s, grace_s=grace_s)
    supervisor.start()
    host, port = sock.getsockname()[:2]
    announce(f"miles-rollout {__version__}: routing on http://{shown(host)}:{port}", form)
    try:
        await serve(app, sock, stop=supervisor.mistaken, log_level=level)
    finally:
        await supervisor.stop()
    if supervisor.mistake:
        raise ValueError(supervisor.mistake)
