"""`miles-rollout doctor`."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import platform
import re
import socket
from typing import Annotated

import typer

from miles_rollout import __version__
from miles_rollout.commands.common import user_errors

EXTRAS = ("server", "text", "embedded", "sglang", "otel")


def doctor(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Also look at a running server or router.")] = "",
    port: Annotated[int, typer.Option(help="The port that `serve` would take.")] = 30000,
) -> None:
    """What is installed, what each extra lacks, whether the port is free; of a server, whether it is well. Exit code 1 if not."""
    with user_errors():
        if not 0 <= port <= 65535:
            raise ValueError(f"--port {port} is no port; give 1 to 65535, or 0 for a free one")
        if url and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url} is no address; give http://HOST:PORT")
        typer.echo(f"miles-rollout {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
        for extra in EXTRAS:
            found = {name: _version(name) for name in _needs(extra)}
            lacks = [name for name, version in found.items() if version is None]
            state = f"lacks {', '.join(lacks)}" if lacks else "ready"
            have = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
            typer.echo(f"  [{extra}] {state}" + (f" ({have})" if have else ""))
        for line in _devices():
            typer.echo(f"  {line}")
        typer.echo(f"  port {port}: {'free' if _is_free(port) else 'in use'}")
        if url and not asyncio.run(_look(url)):
            raise typer.Exit(1)


def _needs(extra: str) -> list[str]:
    """Names of what an extra of this package brings, its own only: what it shares with another extra is told there."""
    names = []
    for line in importlib.metadata.requires("miles-rollout") or []:
        requirement, _, marker = line.partition(";")
        found = re.match(r"[\w.-]+", requirement.strip())
        if found and found.group() != "miles-rollout" and re.search(rf"extra == ['\"]{extra}['\"]", marker):
            names.append(found.group())
    return [*names, "sglang"] if extra == "sglang" else names


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """What the embedded engine would run on, and on a GPU what it compiles its kernels with."""
    if importlib.util.find_spec("torch") is None:
        return ["device: unknown without torch"]
    from miles_rollout.extras import require

    torch = require("torch", extra="embedded", purpose="doctor")
    cuda = torch.cuda
    if not cuda.device_count():
        return ["device: CPU; torch sees no GPU" + ("" if torch.version.cuda else ", it was built without CUDA")]
    lines = []
    for i in range(cuda.device_count()):
        free, total = cuda.mem_get_info(i)
        lines.append(f"device {i}: {cuda.get_device_name(i)}, {free >> 20} of {total >> 20} MiB free, CUDA {torch.version.cuda}")
    triton = _version("triton")
    lines.append(
        f"kernels: triton {triton}" if triton else "kernels: triton is missing, and with it every GPU kernel; pip install triton"
    )
    return lines


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def _look(url: str) -> bool:
    """Say how a server is; False when something is wrong."""
    import httpx

    well = True
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        for path in ("/health", "/get_server_info"):
            try:
                response = await http.get(path)
            except httpx.HTTPError as error:
                typer.echo(f"  {url}{path}: {error or type(error).__name__}")
                return False
            ok = response.status_code == 200
            well &= ok
            typer.echo(f"  {url}{path}: HTTP {response.status_code}")
            if ok and path == "/get_server_info":
                info = response.json()
                digest = (info.get("engine") or {}).get("contract_digest", "none: not a Miles server")
                typer.echo(f"  model {info.get('model_path')}, weight version {info.get('weight_version')}, contract {digest}")
    return well
