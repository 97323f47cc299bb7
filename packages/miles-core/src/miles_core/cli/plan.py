"""`miles plan`: what a run would hold in memory, without starting it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from miles_core.memory.jobs import Mode, job_of_run, job_of_shape
from miles_core.memory.plan import Job, make_plan
from miles_core.memory.shapes import SHAPES, find_device, find_shape
from miles_core.memory.show import plan_text, reasons_text

EXIT_DOES_NOT_FIT = 1


def plan(
    target: str,
    settings: Sequence[str],
    *,
    gpu: str,
    num_gpus: int,
    engine_gpus: int,
    tokens: int | None,
    recompute: bool,
    why: bool,
) -> None:
    """Print the plan of a recipe, a file or a shape. Ends with exit code 1 when it does not fit."""
    if target.lower() in SHAPES:
        if settings:
            raise ValueError(
                f"{settings[0]}: a shape by name has no settings; use a recipe or a TOML file, or the flags of miles plan"
            )
        job = job_of_shape(
            target, gpu=gpu, num_gpus=num_gpus, engine_gpus=engine_gpus, tokens=tokens or 16384, recompute=recompute
        )
    elif _is_configuration(target):
        if tokens is not None or recompute or engine_gpus != 1:
            raise ValueError(f"{target} has settings of its own: say --trainer.max_tokens_per_microbatch and --trainer.recompute")
        job = _job_of_configuration(target, settings, gpu, num_gpus)
    else:
        find_shape(target)  # raises with the nearest names
        raise AssertionError(target)
    made = make_plan(job)
    typer.echo(plan_text(made))
    if why:
        typer.echo("\n" + reasons_text(made))
    if not made.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _is_configuration(target: str) -> bool:
    from miles_core.recipes.catalog import recipe_names

    return target in recipe_names() or Path(target).suffix == ".toml"


def _job_of_configuration(target: str, settings: Sequence[str], gpu: str, num_gpus: int) -> Job:
    from miles_core.config.load import load_config
    from miles_core.models import load_shape
    from miles_core.recipes.catalog import recipe_command

    config = load_config(target, settings)
    shape, _ = load_shape(config.model, lambda line: typer.echo(line, err=True))
    mode: Mode = "train" if target.endswith(".toml") or recipe_command(target) == "train" else "sft"
    return job_of_run(config, shape, mode, find_device(gpu), num_gpus)
