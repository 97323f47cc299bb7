"""Run the service until SIGTERM or SIGINT, then drain: no new work, running checks end, no process is left behind."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from contextlib import suppress

from miles_lean.server.service import Service


async def serve(
    service: Service, *, host: str, port: int, api_key: str | None = None, on_ready: asyncio.Event | None = None
) -> bool:
    """Serve until told to stop; True when every check that was running could end by itself.

    Raises ValueError for a port that is none or a missing extra, OSError when something else listens there.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: a port lies in 0 to 65535, and 0 takes a free one")
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ValueError('the server needs uvicorn and starlette: pip install "miles-lean[server]"') from error
    from miles_lean.server.app import make_app

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():  # no other may; its caller cancels
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    config = uvicorn.Config(
        make_app(service, api_key=api_key), host=host, port=port, log_level="warning", lifespan="off", access_log=False
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(_run(server))
    stopped = asyncio.create_task(stop.wait())
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if running.done():
            raise OSError(f"cannot listen on {host}:{port}; is something else there?")
        bound = server.servers[0].sockets[0].getsockname()[1]
        print(f"miles-lean: serving on http://{host}:{bound}", file=sys.stderr, flush=True)
        if on_ready is not None:
            on_ready.set()
        await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finished = await service.close()
        return finished
    finally:
        stopped.cancel()
        server.should_exit = True
        with suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(running, 5.0)


async def _run(server: object) -> None:
    """uvicorn's loop without its own signal handlers: ours drain first."""
    with suppress(SystemExit):
        await server._serve()  # type: ignore[attr-defined]
