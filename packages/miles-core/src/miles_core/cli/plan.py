"""`miles plan`: what a run would hold in memory, without starting it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from miles_core.config.load import load_config, parse_overrides
from miles_core.memory.jobs import Mode, job_of_run, job_of_shape, with_settings
from miles_core.memory.knobs import remedies
from miles_core.memory.plan import Job, make_plan
from miles_core.memory.shapes import SHAPES, find_device, find_shape
from miles_core.memory.show import plan_text, reasons_text

EXIT_DOES_NOT_FIT = 1
_WORLD = "WORLD_SIZE"


def plan(
    target: str,
    settings: Sequence[str],
    *,
    gpu: str,
    num_gpus: int | None,
    engine_gpus: int,
    tokens: int | None,
    recompute: bool,
    why: bool,
) -> None:
    """Print the plan of a recipe, a file or a shape. Ends with exit code 1 when it does not fit."""
    if target.lower() in SHAPES:
        job = job_of_shape(
            target, gpu=gpu, num_gpus=num_gpus or 1, engine_gpus=engine_gpus, tokens=tokens or 16384, recompute=recompute
        )
        job = with_settings(job, settings)
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
        given = {"--gpu": gpu, "--gpus": num_gpus, "--engine-gpus": engine_gpus if engine_gpus > 1 else None, "--tokens": tokens}
        words = [target, *(word for flag, value in given.items() if value is not None for word in (flag, str(value)))]
        words += ["--recompute"] * recompute
        for remedy in remedies(made):
            if remedy.fits:
                typer.echo(f"try: miles plan {shlex.join([*words, *_without(settings, remedy.flags)])} {' '.join(remedy.flags)}")
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _without(settings: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The user's settings, but for those that `flags` set otherwise."""
    changed = {flag.split(" ")[0] for flag in flags}
    return [word for each in parse_overrides(settings) if each.flag not in changed for word in (each.flag, each.text)]


def _is_configuration(target: str) -> bool:
    from miles_core.recipes.catalog import recipe_names

    return target in recipe_names() or Path(target).suffix == ".toml"


def _job_of_configuration(target: str, settings: Sequence[str], gpu: str, num_gpus: int | None) -> Job:
    from miles_core.models import load_shape
    from miles_core.recipes.catalog import recipe_command

    with _processes(num_gpus):
        config = load_config(target, settings)
        shape, _ = load_shape(config.model, lambda line: typer.echo(line, err=True))
        mode: Mode = "train" if target.endswith(".toml") or recipe_command(target) == "train" else "sft"
        return job_of_run(config, shape, mode, find_device(gpu), num_gpus or config.num_trainers)


@contextmanager
def _processes(count: int | None) -> Iterator[None]:
    """As if a launcher had announced so many processes: the layout of the trainer is checked against their number."""
    before = os.environ.get(_WORLD)
    if count is not None:
        os.environ[_WORLD] = str(count)
    try:
        yield
    finally:
        os.environ.pop(_WORLD, None)
        if before is not None:
            os.environ[_WORLD] = before
