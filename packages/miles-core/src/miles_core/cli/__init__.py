"""The command `miles`. Only typer is imported here; torch and the rest come with the command that needs them."""

from miles_core.cli.app import main

__all__ = ["main"]
