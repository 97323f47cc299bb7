"""`miles-rollout generate`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any

import typer

from miles_rollout.commands.common import Device, Dtype, Threads, user_errors


def generate(
    target: Annotated[str, typer.Argument(metavar="URL|MODEL", help="A running server, http://..., or a model directory.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeat for a batch; - reads standard input.")],
    chat: Annotated[bool, typer.Option(help="Send each prompt as a user's chat message.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one completion.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The k most likely tokens; -1 is all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens. [default: drawn]")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Completions per prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Whole replies, one JSON object a line.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Deadline of the whole command.")] = 600.0,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Print completions of a prompt, from a server or from a model loaded for the occasion."""
    with user_errors():
        prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
        shared: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "n": n,
            "stop": stop,
            "ignore_eos": ignore_eos,
        }
        if chat:
            path, limit = "/v1/chat/completions", shared | {"max_tokens": max_new_tokens, "seed": seed}
            bodies = [limit | {"messages": [{"role": "user", "content": text}]} for text in prompts]
        else:
            path, limit = "/generate", shared | {"max_new_tokens": max_new_tokens, "sampling_seed": seed}
            bodies = [{"text": prompts, "sampling_params": limit}]
        replies = asyncio.run(_ask(target, path, bodies, timeout_s=timeout_s, device=device, dtype=dtype, threads=threads))
    for reply in replies:
        typer.echo(json.dumps(reply, ensure_ascii=False) if as_json else reply["message"]["content"] if chat else reply["text"])


async def _ask(
    target: str, path: str, bodies: list[Any], *, timeout_s: float, device: str, dtype: str | None, threads: int | None
) -> list[Any]:
    """Post each body; all completions in order. Raises ValueError with the server's message."""
    import httpx

    if target.startswith(("http://", "https://")):
        async with httpx.AsyncClient(base_url=target, timeout=timeout_s) as http:
            return await _post_all(http, path, bodies)
    from miles_rollout.engines.embedded.config import EmbeddedConfig
    from miles_rollout.extras import require

    require("starlette", extra="embedded", purpose="generating from a model directory")
    from miles_rollout.launch import load_embedded
    from miles_rollout.server import create_app

    engine, tokenizer, _ = load_embedded(target, EmbeddedConfig(), device=device, dtype=dtype, threads=threads)
    try:
        transport = httpx.ASGITransport(create_app(engine, tokenizer))
        async with asyncio.timeout(timeout_s), httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            return await _post_all(http, path, bodies)
    except TimeoutError:
        raise ValueError(f"not done within {timeout_s:g} s; allow more with --timeout-s") from None
    finally:
        await engine.close()


async def _post_all(http: Any, path: str, bodies: list[Any]) -> list[Any]:
    import httpx

    found: list[Any] = []
    for body in bodies:
        try:
            response = await http.post(path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(f"{http.base_url}: {error or type(error).__name__}; is the server running?") from None
        reply = response.json() if response.headers.get("content-type", "").startswith("application/json") else {}
        if response.status_code != 200:
            detail = reply.get("error", reply)
            raise ValueError(detail.get("message") or f"{http.base_url} answered HTTP {response.status_code}")
        found += reply["choices"] if "choices" in reply else reply
    return found
