"""POST /start_profile and /stop_profile: a trace of what the engine does, for chrome://tracing or Perfetto. For the operator."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from miles_rollout.engine import ProfilableEngine
from miles_rollout.server.errors import JSONResponse, RequestError
from miles_rollout.server.params import Neutral, parse
from miles_rollout.server.service import Service

LOG = logging.getLogger("miles_rollout.server")
LONGEST_S = 120.0
"""A trace grows with every step; one that nobody stops ends then."""


class StartProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /start_profile. Traces go where the server was told to put them, not where a caller says."""


START_NEUTRAL: Neutral = {
    "output_dir": (), "start_step": (), "num_steps": (), "activities": (["CPU", "GPU"], ["GPU", "CPU"]),
    "profile_by_stage": (False,), "with_stack": (False,), "record_shapes": (False,), "merge_profiles": (False,),
}  # fmt: skip


async def start_profile(service: Service, request: Request) -> Response:
    """POST /start_profile: record from now on, until /stop_profile, two minutes at most."""
    if await request.body():
        parse(await service.read(request), StartProfile, START_NEUTRAL)
    directory, engine = service.config.profile_dir, service.engine
    if not isinstance(engine, ProfilableEngine):
        raise RequestError("this engine cannot be profiled")
    if directory is None:
        raise RequestError("this server keeps no profiles; start it with --profile-dir DIRECTORY")
    if service.profile_end is not None:
        raise RequestError("a profile is being recorded; stop it first")
    service.profile_end = asyncio.get_running_loop().call_later(LONGEST_S, _expire, service, engine)
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        await engine.start_profile(directory)
    except BaseException as error:
        _forget(service)
        if isinstance(error, ValueError | OSError):
            raise RequestError("the profile could not be started; the server's log says why") from error
        raise
    return JSONResponse({"success": True, "message": "Start profiling."})


async def stop_profile(service: Service, request: Request) -> Response:
    """POST /stop_profile: write the trace; the reply names the file in the server's directory of profiles."""
    engine = service.engine
    if service.profile_end is None or not isinstance(engine, ProfilableEngine):
        raise RequestError("no profile is being recorded")
    _forget(service)
    return JSONResponse({"success": True, "message": "Stop profiling.", "file": Path(await engine.stop_profile()).name})


def _forget(service: Service) -> None:
    if service.profile_end is not None:
        service.profile_end.cancel()
    service.profile_end = None


def _expire(service: Service, engine: ProfilableEngine) -> None:
    """Nobody stopped it."""
    _forget(service)
    service.profile_task = asyncio.ensure_future(_stop(engine))


async def _stop(engine: ProfilableEngine) -> None:
    try:
        LOG.warning("a profile that nobody stopped in %.0f s has ended: %s", LONGEST_S, await engine.stop_profile())
    except Exception:
        LOG.exception("a profile that nobody stopped could not be written")
