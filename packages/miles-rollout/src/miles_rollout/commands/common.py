"""What commands share: one-line errors, option types, logging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16: weights, activations and KV cache. [default: bfloat16 on a GPU, else float32]"),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, or auto: a GPU if torch sees one. Which GPU is CUDA_VISIBLE_DEVICES' choice.")
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of torch; tiny models are fastest with 1. [default: torch's choice]")
]
AdminToken = Annotated[
    str | None,
    typer.Option(
        envvar="MILES_ROLLOUT_ADMIN_TOKEN", help="Bearer token of admin endpoints; without one they answer this machine only."
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
DrainS = Annotated[float, typer.Option(help="After SIGTERM or Ctrl-C: seconds for running requests to finish.")]
LogLevel = Annotated[str, typer.Option(help="critical, error, warning, info or debug.")]
LogFormat = Annotated[str, typer.Option(help="text or json: one object a line, with the request's id.")]
Otel = Annotated[bool, typer.Option("--otel", help="Send OpenTelemetry traces where OTEL_EXPORTER_OTLP_ENDPOINT says.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        yield
    except (ValueError, ImportError, TimeoutError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


def shown(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
