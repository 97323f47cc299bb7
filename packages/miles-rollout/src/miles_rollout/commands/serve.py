"""`miles-rollout serve`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from miles_rollout import __version__
from miles_rollout.commands.common import (
    AdminToken,
    Device,
    DrainS,
    Dtype,
    Host,
    LogFormat,
    LogLevel,
    Otel,
    Port,
    Threads,
    shown,
    user_errors,
)

LOG = logging.getLogger("miles_rollout.serve")
WATCH_S = 0.5
"""How often the engine is asked whether it has failed for good."""
Roots = Annotated[
    list[str] | None,
    typer.Option(help="Directory that weight updates may be read from; may be repeated. [default: the one MODEL lies in]"),
]

TensorParallel = Annotated[
    int, typer.Option(help="GPUs the model is divided over. More than 1: a contract of its own, the same for 2, 4, 8.")
]


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory: config.json, safetensors, tokenizer files.")],
    host: Host = "127.0.0.1",
    port: Port = 30000,
    engine: Annotated[str, typer.Option(help="embedded, or sglang: options after -- go to SGLang as they are.")] = "embedded",
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name under /v1. [default: the last part of MODEL]")] = None,
    admin_token: AdminToken = None,
    weights_root: Roots = None,
    profile_dir: Annotated[str | None, typer.Option(help="Where traces of /start_profile go. [default: none are taken]")] = None,
    drain_s: DrainS = 30.0,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    otel: Otel = False,
    max_requests: Annotated[int, typer.Option(help="Prompts served at a time; one more is answered 429.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Most tokens one HTTP request may use, prompts and completions.")] = 16 << 20,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body, MiB.")] = 32,
    request_s: Annotated[float, typer.Option(help="Deadline of a request.")] = 3600.0,
    max_context: Annotated[int | None, typer.Option(help="Most tokens of one sequence. [default: the model's limit]")] = None,
    max_running: Annotated[int, typer.Option(help="Most sequences in one step.")] = 128,
    max_batched_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 2048,
    prefill_chunk: Annotated[int, typer.Option(help="Most prompt tokens of one sequence in one forward pass.")] = 512,
    kv_memory_mib: Annotated[
        int | None, typer.Option(help="Memory for keys and values, MiB. [default: most of a GPU, else 1024]")
    ] = None,
    num_pages: Annotated[int | None, typer.Option(help="KV pages, instead of --kv-memory-mib.")] = None,
    page_size: Annotated[
        int | None, typer.Option(help="Tokens per KV page, a multiple of 16. [default: 64 on a GPU, else 16]")
    ] = None,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the KV cache of prompts with a common beginning.")] = True,
    record_routed_experts: Annotated[bool, typer.Option(help="Let requests ask which experts every token went to.")] = False,
    draft: Annotated[str, typer.Option(help="Speculation: none, ngram, suffix, mtp or eagle3. Tokens stay the same.")] = "none",
    draft_path: Annotated[str | None, typer.Option(help="Directory of the draft model, for mtp and eagle3.")] = None,
    draft_tokens: Annotated[int, typer.Option(help="Most draft tokens of a sequence in one step.")] = 4,
    tensor_parallel: TensorParallel = 1,
    sglang_url: Annotated[str, typer.Option(help="Engine sglang: attach to this server instead of starting one.")] = "",
    sglang_python: Annotated[str, typer.Option(help="Engine sglang: interpreter of an environment that has SGLang.")] = "",
    seeds: Annotated[bool, typer.Option(help="Engine sglang: seeds hold (deterministic inference), at some cost.")] = True,
) -> None:
    """Serve MODEL: SGLang's native HTTP API and OpenAI's /v1."""
    with user_errors():
        from miles_rollout.extras import require

        if engine not in ("embedded", "sglang"):
            raise ValueError(f"--engine {engine} must be embedded or sglang")
        if context.args and engine != "sglang":
            raise ValueError(f"unexpected argument {context.args[0]!r}; options after -- are for --engine sglang")
        for library in ("starlette", "uvicorn"):
            require(library, extra=engine, purpose="miles-rollout serve")
        from miles_rollout.server import ServerConfig, bind
        from miles_rollout.server.logs import setup_logging
        from miles_rollout.server.tracing import setup_tracing

        if engine == "embedded":
            from miles_rollout.engines.embedded.config import EmbeddedConfig

            settings: Any = EmbeddedConfig(
                page_size=page_size,
                kv_memory_bytes=1 << 30 if kv_memory_mib is None else kv_memory_mib << 20,
                num_pages=num_pages,
                max_running=max_running,
                max_batched_tokens=max_batched_tokens,
                prefill_chunk=prefill_chunk,
                max_context=max_context,
                prefix_cache=prefix_cache,
                record_routed_experts=record_routed_experts,
                draft=draft,
                draft_path=draft_path,
                draft_tokens=draft_tokens,
                tensor_parallel=tensor_parallel,
            )
            settings.validate()
        else:
            from miles_rollout.engines.sglang.config import SglangConfig

            settings = SglangConfig(model=model, url=sglang_url, python=sglang_python, seeds=seeds, args=tuple(context.args))
            settings.validate()
        server = ServerConfig(
            served_model_name=served_model_name or Path(model).resolve().name,
            admin_token=admin_token,
            drain_s=drain_s,
            max_requests=max_requests,
            max_tokens=max_tokens,
            max_body_bytes=max_body_mib << 20,
            request_s=request_s,
            weight_roots=tuple(weights_root or [default_root(model)]),
            profile_dir=profile_dir,
        )
        server.validate()
        setup_logging(log_level, log_format)
        if otel:
            setup_tracing("miles-rollout")
        sock = bind(host, port)  # before the model is loaded, so that a port in use is known at once
        with sock:
            options = {"device": device, "dtype": dtype, "threads": threads, "fill": kv_memory_mib is None and num_pages is None}
            asyncio.run(_serve(model, settings, server, sock, engine, options, log_level, log_format))


def default_root(model: str) -> str:
    """Where new weights may come from when nobody says: beside the model, but never the whole machine."""
    path = Path(model).resolve()
    return str(path if path.parent == Path(path.anchor) else path.parent)


async def _serve(
    model: str, settings: Any, server: Any, sock: Any, engine: str, options: dict[str, Any], log_level: str, log_format: str
) -> None:
    from miles_rollout.launch import load_embedded, load_sglang, warm_up
    from miles_rollout.server import create_app, listen
    from miles_rollout.server import serve as run
    from miles_rollout.server.logs import announce

    for root in server.weight_roots:
        if not Path(root).is_dir():
            LOG.warning("--weights-root %s is no directory yet; weight updates are refused until it is one", root)
    if engine == "embedded":
        serving, tokenizer, load_weights = load_embedded(model, settings, **options)
        if serving.device.type == "cuda":  # type: ignore[attr-defined]
            await warm_up(serving)  # type: ignore[arg-type]
    else:
        serving, tokenizer = await load_sglang(model, settings)
        load_weights = None
    listen(sock)
    host, port = sock.getsockname()[:2]
    announce(f"miles-rollout {__version__}: {model} on http://{shown(host)}:{port}", log_format)
    app = create_app(serving, tokenizer, server, load_weights=load_weights)
    if engine == "embedded":
        from miles_rollout.server.transfer import accept_weights
        from miles_rollout.weights.receiver import WeightReceiver

        accept_weights(app, WeightReceiver(serving))
    stop = asyncio.Event()
    watch = asyncio.ensure_future(_failed(serving, app.state.service, stop))
    await run(app, sock, stop=stop, log_level=log_level)
    if watch.done():
        raise typer.Exit(1)
    watch.cancel()


async def _failed(engine: Any, service: Any, stop: asyncio.Event) -> None:
    """Return when the engine can only be started anew, and end the process: whoever supervises it starts another one."""
    while service.draining or (why := engine.failure) is None:
        await asyncio.sleep(WATCH_S)
    LOG.critical("the engine has failed and this server ends: %s", why)
    stop.set()
