"""Commands, flags and exit codes: 0 done, 2 the user can fix it (said on standard error), 130 interrupted and resumable."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

EXIT_USER = 2
EXIT_MEMORY = 3

_SETTING = re.compile(r"--[A-Za-z][\w-]*\.[\w.-]+(=.*)?", re.DOTALL)

app = typer.Typer(
    name="miles",
    help="Post-train language models by reinforcement learning, with an engine and a trainer that compute the same numbers.",
    epilog="Every setting is a flag: --section.key VALUE, for example --optimizer.lr 1e-4. `miles settings` explains them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
convert_app = typer.Typer(help="Bring models from other formats.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(convert_app, name="convert")

Target = Annotated[
    str, typer.Argument(metavar="RECIPE|FILE", help="A recipe that ships with Miles (see: miles recipes) or a TOML file.")
]
Name = Annotated[str | None, typer.Option(help="Name of the run; its folder is runs/NAME.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the whole run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would happen, write nothing.")]


@app.command()
def train(
    ctx: typer.Context,
    target: Target,
    name: Name = None,
    steps: Steps = None,
    resume: Resume = False,
    replay: Annotated[
        str | None, typer.Option(metavar="RUN", help="Train on the samples this run recorded, without an engine.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train by reinforcement learning."""
    from miles_core.cli.runs import start

    start("train", target, ctx.obj, name=name, steps=steps, resume=resume, replay=replay, dry_run=dry_run)


@app.command()
def sft(
    ctx: typer.Context, target: Target, name: Name = None, steps: Steps = None, resume: Resume = False, dry_run: DryRun = False
) -> None:
    """Train by imitation of the completions in the data."""
    from miles_core.cli.runs import start

    start("sft", target, ctx.obj, name=name, steps=steps, resume=resume, dry_run=dry_run)


@app.command()
def rollout(
    ctx: typer.Context,
    target: Target,
    name: Name = None,
    steps: Annotated[int, typer.Option(help="Steps to generate.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """Generate and score only: writes samples and rewards, trains nothing."""
    from miles_core.cli.runs import start

    start("rollout", target, ctx.obj, name=name, steps=steps, dry_run=dry_run)


@app.command(name="eval")
def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT|MODEL", help="A run, a checkpoint, a model folder, or recipe:NAME.")
    ],
    recipe: Annotated[str | None, typer.Option(help="Recipe or file with the prompts; default: what the run recorded.")] = None,
) -> None:
    """Evaluate on the held-out prompts."""
    from miles_core.cli.models import evaluate_model

    evaluate_model(model, recipe, ctx.obj)


@app.command()
def export(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run (its last checkpoint) or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
) -> None:
    """Write a Hugging Face folder and prove it by loading it again."""
    _no_settings(ctx)
    from miles_core.cli.models import export_model

    export_model(source, out)


@app.command()
def report(ctx: typer.Context, run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")]) -> None:
    """Write RUN/report.html: plots, settings, samples; readable offline."""
    _no_settings(ctx)
    from miles_core.cli.runs import find_run
    from miles_core.debug.report import write_report

    typer.echo(write_report(find_run(run)))


@app.command()
def compare(
    ctx: typer.Context,
    first: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of another.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with both runs in every plot, too.")] = None,
) -> None:
    """Say where two runs part: step, sample, token, metric, tensor. Exit code 1 when their numbers differ."""
    _no_settings(ctx)
    from miles_core.cli.runs import compare_two

    compare_two(first, second, html, typer.echo)


@app.command()
def plan(
    ctx: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|FILE|SHAPE", help="A recipe, a TOML file, or a model's name such as qwen3-235b-a22b.")
    ],
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100-40, a100-80, l40s, h100, h200, b200.")] = "h200",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs in all; of a shape 1, else the configuration's trainers.", show_default=False)
    ] = None,
    engine_gpus: Annotated[int, typer.Option(min=1, help="GPUs one engine is cut over (shapes only).")] = 1,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a micro-batch (shapes only; 16384).")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Recompute layers in the backward pass (shapes only).")] = False,
    why: Annotated[bool, typer.Option("--why", help="Say what every item of the worst phase is made of.")] = False,
) -> None:
    """Plan the memory of a run: bytes per phase, whether they fit, and what would make them fit. Needs no GPU."""
    from miles_core.cli.plan import plan as show_plan

    show_plan(target, ctx.obj, gpu=gpu, num_gpus=gpus, engine_gpus=engine_gpus, tokens=tokens, recompute=recompute, why=why)


@app.command()
def recipes(ctx: typer.Context) -> None:
    """List the recipes that ship with Miles."""
    _no_settings(ctx)
    from miles_core.recipes.catalog import recipe_command, recipe_names, recipe_summary

    for recipe_name in recipe_names():
        typer.echo(f"miles {recipe_command(recipe_name):5} {recipe_name:16} {recipe_summary(recipe_name)}")


@app.command()
def settings(
    ctx: typer.Context,
    query: Annotated[
        str | None, typer.Argument(metavar="[SECTION|KEY|WORD]", help="What to look up; all sections without.")
    ] = None,
) -> None:
    """Explain the settings: type, default, bounds, meaning."""
    _no_settings(ctx)
    from miles_core.config.reference import reference

    typer.echo(reference(query))


@app.command()
def doctor(ctx: typer.Context) -> None:
    """Say what is installed and whether it can be trusted here."""
    _no_settings(ctx)
    from miles_core.cli.doctor import examine

    raise typer.Exit(0 if examine(typer.echo) else 1)


@convert_app.command()
def gguf(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
) -> None:
    """GGUF to a Hugging Face folder with fp32 weights."""
    _no_settings(ctx)
    from miles_core.convert.gguf import convert_gguf

    typer.echo(convert_gguf(source, out, typer.echo))


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line without its `--section.key value` flags, and those flags; everything after "--" stays."""
    plain: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            plain += [word, *rest]
            break
        if not _SETTING.fullmatch(word):
            plain.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return plain, settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors a user can fix end with their message and exit code 2; MILES_DEBUG=1 shows the traceback, too."""
    plain, settings = split_settings(sys.argv[1:] if arguments is None else arguments)
    try:
        app(plain, obj=settings)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if os.environ.get("MILES_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except MemoryError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_MEMORY)


def _no_settings(ctx: typer.Context) -> None:
    if ctx.obj:
        raise ValueError(f"{ctx.obj[0]}: miles {ctx.info_name} takes no settings")
