"""`miles-rollout conformance`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from miles_rollout.commands.common import user_errors


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
    with user_errors():
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
