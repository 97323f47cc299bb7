"""The commands that make a run: train, sft, rollout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from miles_core.compose import Request
    from miles_core.config.load import Override
    from miles_core.config.schema import RunConfig
    from miles_core.run import Outcome, Run

Mode = Literal["train", "sft", "rollout"]


def start(
    mode: Mode,
    target: str,
    settings: Sequence[str],
    *,
    name: str | None = None,
    steps: int | None = None,
    resume: bool = False,
    replay: str | None = None,
    dry_run: bool = False,
) -> None:
    """Resolve the configuration, then say what would happen or do it."""
    from miles_kernels.env import prepare_process

    prepare_process()
    from miles_core.config.load import load_config
    from miles_core.recipes.catalog import recipe_for

    recorded = None if replay is None else find_run(replay)
    if recorded is not None and resume:
        raise ValueError("--replay and --resume together: a replay is short, start it again instead")
    config = load_config(recipe_for(mode, target), settings, extra=_flags(name, steps))
    if name is None and (recorded is not None or mode == "rollout"):
        config = config.with_name(f"{config.run.name}-{'replay' if recorded else 'rollout'}")
    if recorded is not None:
        config = _as_recorded(config, recorded, steps)
    if dry_run:
        from miles_core.config.dryrun import explain

        typer.echo(explain(config, mode, say=_say))
        return
    _go(config, mode, resume=resume, replay=recorded)


def find_run(run: str) -> Path:
    """The folder of a run given by name or path. Raises ValueError when there is none."""
    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.toml").is_file():
            return folder
    raise ValueError(f"{run}: no such run; looked for {run}/config.toml and runs/{run}/config.toml in {Path.cwd()}")


def compare_two(first: str, second: str, html: Path | None, say: Callable[[str], None]) -> None:
    """Say what differs between two runs. Ends with exit code 1 when their numbers do."""
    from miles_core.debug.compare import compare_runs, verdict, write_comparison

    a, b = find_run(first), find_run(second)
    findings = compare_runs(a, b)
    for finding in findings:
        say(f"{finding.what:9} {finding.words}")
    same, words = verdict(findings)
    say(words)
    if html is not None:
        say(str(write_comparison(a, b, html)))
    if not same:
        raise typer.Exit(1)


def _go(config: RunConfig, mode: Mode, *, resume: bool, replay: Path | None) -> None:
    from miles_core.compose import Request, compose
    from miles_core.interrupt import EXIT_INTERRUPTED
    from miles_core.loop import train

    request = Request(mode=mode, resume=resume, replay=replay)
    try:
        with compose(config, request, _say) as run:
            _say(f"{run.dir.root}: step {run.step} of {run.num_steps}")
            outcome = train(run)
            if outcome.step < run.num_steps and not outcome.interrupted:
                _say(f"the data ended after step {outcome.step} of {run.num_steps} (data.max_epochs = {config.data.max_epochs})")
            _finish(run, outcome)
    except KeyboardInterrupt:  # here, because the command line's library would end the process without a word
        _say(_stopped(config, request))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if outcome.interrupted:
        kept = f"nothing is lost; go on with: {_again()}" if request.is_resumable else _AGAIN
        _say(f"stopped after step {outcome.step}, {kept}")
        raise typer.Exit(EXIT_INTERRUPTED)


_AGAIN = "and this kind of run is short: start it again under another --name"


def _again() -> str:
    return shlex.join(["miles", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])


def _stopped(config: RunConfig, request: Request) -> str:
    """What a run that was ended at once has left behind, and the way on."""
    from miles_core.rundir import RunDir

    if not RunDir.of(config).config.is_file():
        return "stopped before the first step, nothing was written"
    if not request.is_resumable:
        return f"stopped at once, {_AGAIN}"
    return f"stopped at once, the work since the last checkpoint is lost; go on with: {_again()}"


def _finish(run: Run, outcome: Outcome) -> None:
    if outcome.checkpoint is not None:
        _say(f"checkpoint: {outcome.checkpoint}")
    try:
        from miles_core.debug.report import write_report

        _say(f"report: {write_report(run.dir.root)}")
    except ImportError as error:
        _say(f"no report: {error}")


def _as_recorded(config: RunConfig, recorded: Path, steps: int | None) -> RunConfig:
    """A replay lasts as long as the recording; settings that differ from the recorded ones are named."""
    from miles_core.config.dump import differences, read_config
    from miles_core.rundir import RunDir

    found = RunDir(recorded).recorded_steps()
    if not found:
        raise ValueError(f"{recorded}: no recorded samples to replay (samples/step_*.jsonl)")
    if steps is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"num_steps": found[-1]})})
    ignored = ("run.", "eval.", "checkpoint.", "engine.")
    changed = [line for line in differences(read_config(recorded), config) if not line.startswith(ignored)]
    for line in changed:
        _say(f"not as in {recorded}: {line}")
    return config.model_copy(update={"eval": config.eval.model_copy(update={"every": None})})


def _flags(name: str | None, steps: int | None) -> list[Override]:
    from miles_core.config.load import Override

    flags = [] if name is None else [Override(("run", "name"), name, name)]
    return flags if steps is None else [*flags, Override(("run", "num_steps"), steps, str(steps))]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
