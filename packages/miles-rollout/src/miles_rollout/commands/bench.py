"""`miles-rollout bench`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from miles_rollout.commands.common import user_errors


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="A running server, router or SGLang.")],
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 32,
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="Random token ids per prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens per completion.")] = 64,
    vocab_size: Annotated[int, typer.Option(help="Prompt ids are drawn below this. [default: asked of the server]")] = 0,
    stream: Annotated[bool, typer.Option(help="Stream, and time the first token and the gaps.")] = False,
    seed: Annotated[int, typer.Option(help="Of prompts and sampling.")] = 0,
    timeout_s: Annotated[float, typer.Option(help="Deadline of each request.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as one JSON object.")] = False,
) -> None:
    """Tokens per second and latencies under a steady load. Exit code 1 when a request failed."""
    with user_errors():
        import msgspec

        from miles_rollout.bench import Load, run_load

        load = Load(
            concurrency=concurrency, requests=requests, prompt_tokens=prompt_tokens, new_tokens=new_tokens, vocab_size=vocab_size,
            stream=stream, seed=seed, timeout_s=timeout_s,
        )  # fmt: skip
        report = asyncio.run(run_load(url, load))
    typer.echo(msgspec.json.encode(report).decode() if as_json else report.text())
    if report.num_failed:
        raise typer.Exit(1)
