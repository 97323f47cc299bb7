"""`miles-rollout`: serve a model, route to servers, ask and examine them. Heavy libraries are imported by the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from miles_rollout import __version__
from miles_rollout.commands.bench import bench
from miles_rollout.commands.conformance import conformance
from miles_rollout.commands.doctor import doctor
from miles_rollout.commands.generate import generate
from miles_rollout.commands.route import route
from miles_rollout.commands.serve import serve

app = typer.Typer(name="miles-rollout", help="Rollout service for language models.", no_args_is_help=True, add_completion=False)


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


app.command(context_settings={"allow_extra_args": True})(serve)
app.command(context_settings={"allow_extra_args": True})(route)
app.command()(generate)
app.command()(bench)
app.command()(conformance)
app.command()(doctor)

if __name__ == "__main__":
    main()
