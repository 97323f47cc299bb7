"""`miles-rollout`: serve a model, ask a server. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from miles_rollout import __version__

app = typer.Typer(name="miles-rollout", help="Rollout service for language models.", no_args_is_help=True, add_completion=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory: config.json, safetensors, tokenizer files.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16: weights, activations and KV cache.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of torch; tiny models are fastest with 1. [default: torch's choice]")
]
MaxContext = Annotated[int | None, typer.Option(help="Most tokens of one sequence. [default: the model's limit]")]


def main() -> None:
    """Entry point."""
    app()


def _version(value: bool) -> None:
    if value:
        typer.echo(f"miles-rollout {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Rollout service for language models."""


@contextmanager
def _user_errors() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        yield
    except (ValueError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 30000,
    dtype: Dtype = "float32",
    threads: Threads = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name under /v1. [default: the last part of MODEL]")] = None,
    admin_token: Annotated[
        str | None,
        typer.Option(
            envvar="MILES_ROLLOUT_ADMIN_TOKEN", help="Bearer token of admin endpoints; without one they answer this machine only."
        ),
    ] = None,
    drain_s: Annotated[float, typer.Option(help="After SIGTERM or Ctrl-C: seconds for running requests to finish.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
    max_context: MaxContext = None,
    max_running: Annotated[int, typer.Option(help="Most sequences in one step.")] = 128,
    max_batched_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 2048,
    prefill_chunk: Annotated[int, typer.Option(help="Most prompt tokens of one sequence in one forward pass.")] = 512,
    kv_memory_mib: Annotated[int, typer.Option(help="Memory for keys and values, MiB.")] = 1024,
    num_pages: Annotated[int | None, typer.Option(help="KV pages, instead of --kv-memory-mib.")] = None,
    page_size: Annotated[int, typer.Option(help="Tokens per KV page, a multiple of 16.")] = 16,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the KV cache of prompts with a common beginning.")] = True,
) -> None:
    """Serve MODEL with the embedded engine: SGLang's native HTTP API and OpenAI's /v1."""
    with _user_errors():
        from miles_rollout.engines.embedded.config import EmbeddedConfig
        from miles_rollout.extras import require

        config = EmbeddedConfig(
            page_size=page_size,
            kv_memory_bytes=kv_memory_mib << 20,
            num_pages=num_pages,
            max_running=max_running,
            max_batched_tokens=max_batched_tokens,
            prefill_chunk=prefill_chunk,
            max_context=max_context,
            prefix_cache=prefix_cache,
        )
        levels = ("critical", "error", "warning", "info", "debug")
        if log_level not in levels:
            raise ValueError(f"--log-level {log_level} must be one of {', '.join(levels)}")
        for library in ("starlette", "uvicorn"):
            require(library, extra="embedded", purpose="miles-rollout serve")
        from miles_rollout.server import ServerConfig, bind

        name = served_model_name or Path(model).resolve().name
        server = ServerConfig(served_model_name=name, admin_token=admin_token, drain_s=drain_s)
        sock = bind(host, port)  # before the model is loaded, so that a port in use is known at once
        with sock:
            _serve(model, config, server, sock, dtype=dtype, threads=threads, log_level=log_level)


def _serve(model: str, config: Any, server: Any, sock: Any, *, dtype: str, threads: int | None, log_level: str) -> None:
    import logging

    from miles_rollout.launch import load_embedded
    from miles_rollout.server import create_app, listen
    from miles_rollout.server import serve as run

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    engine, tokenizer, load_weights = load_embedded(model, config, dtype=dtype, threads=threads)
    listen(sock)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"miles-rollout {__version__}: {model} on http://{shown}:{port}", err=True)
    asyncio.run(run(create_app(engine, tokenizer, server, load_weights=load_weights), sock, log_level=log_level))


@app.command()
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
    dtype: Dtype = "float32",
    threads: Threads = None,
) -> None:
    """Print completions of a prompt, from a server or from a model loaded for the occasion."""
    with _user_errors():
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
        replies = asyncio.run(_ask(target, path, bodies, timeout_s=timeout_s, dtype=dtype, threads=threads))
    for reply in replies:
        typer.echo(json.dumps(reply, ensure_ascii=False) if as_json else reply["message"]["content"] if chat else reply["text"])


async def _ask(target: str, path: str, bodies: list[Any], *, timeout_s: float, dtype: str, threads: int | None) -> list[Any]:
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

    engine, tokenizer, _ = load_embedded(target, EmbeddedConfig(), dtype=dtype, threads=threads)
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


@app.command()
def conformance(
    url: Annotated[str, typer.Argument(metavar="URL", help="A running server: ours, a router, or SGLang.")],
    only: Annotated[str, typer.Option(help="Run the checks whose names match, e.g. 'openai/*'.")] = "*",
    text: Annotated[list[str] | None, typer.Option(help="Two prompts the tokenizer can read. [default: 1+1= and 2+2=]")] = None,
    prompt_ids: Annotated[str, typer.Option(help="Token ids of a prompt, at least five.")] = "5,6,7,8,9,10,11",
    admin_token: Annotated[str | None, typer.Option(envvar="MILES_ROLLOUT_ADMIN_TOKEN", help="The server's token.")] = None,
    weights: Annotated[str | None, typer.Option(help="Also update to this directory on the server's machine.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Deadline of each request.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
    strict: Annotated[bool, typer.Option(help="A check that does not apply fails too.")] = False,
) -> None:
    """Check that a server speaks SGLang's native API, OpenAI's /v1 and the admin API. Exit code 1 when a check fails."""
    with _user_errors():
        import msgspec

        from miles_rollout.conformance import Options, run_suite

        try:
            ids = tuple(int(each) for each in prompt_ids.split(","))
        except ValueError:
            raise ValueError(f"--prompt-ids {prompt_ids!r} must be integers with commas between them") from None
        texts = text or list(Options().texts)
        if len(texts) != 2:
            raise ValueError(f"--text was given {len(texts)} times; give two prompts or none")
        options = Options(
            prompt_ids=ids,
            texts=(texts[0], texts[1]),
            chat=({"role": "user", "content": texts[0]},),
            admin_token=admin_token,
            weights=weights,
            timeout_s=timeout_s,
        )
        report = asyncio.run(run_suite(url, options, only=only))
    typer.echo(msgspec.json.encode(report).decode() if as_json else report.text())
    if not report.ok or (strict and report.count("unsupported")):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
