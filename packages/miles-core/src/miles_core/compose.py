"""The composition root: from a configuration to a `Run`. Everything is checked before the first file is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miles_core.checkpoint import Checkpoint, CheckpointStore
from miles_core.config.dump import differences, read_config
from miles_core.config.schema import RunConfig
from miles_core.data.load import load_prompts, load_sft
from miles_core.data.source import PromptSource
from miles_core.eval.evaluate import Evaluation, Evaluator
from miles_core.feed import Feed, ReplayFeed, RolloutFeed, SftFeed
from miles_core.interrupt import StopRequest
from miles_core.memory import prepare_heap
from miles_core.models import LoadedModel, load_model, prompt_room, use_threads
from miles_core.progress import make_progress
from miles_core.rollout import Scorer
from miles_core.run import Run
from miles_core.rundir import RunDir, RunLock
from miles_core.trainer.fsdp import FsdpTrainer
from miles_rollout.engine import Engine

Mode = Literal["train", "sft", "rollout"]
Say = Callable[[str], None]

FREE_ON_RESUME = ("run.num_steps", "run.threads", "run.dir", "eval.", "checkpoint.", "engine.")
"""What a resumed run may change: none of it alters a step that is already done, or the bits of the next."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for beside the configuration."""

    mode: Mode = "train"
    resume: bool = False
    replay: Path | None = None
    """The run directory whose samples are trained on again."""


def compose(config: RunConfig, request: Request, say: Say) -> Run:
    """Build every part, check that they fit, then make (or take up) the run directory.

    Raises ValueError, FileExistsError or ImportError with the remedy in the message; nothing is written then.
    """
    use_threads(config.run.threads)
    run_dir = RunDir.of(config)
    checkpoint = None
    if request.resume:
        checkpoint = _resumable(config, run_dir, say)
    else:
        run_dir.check_new()
    with ExitStack() as stack:
        model = load_model(config, say)
        prepare_heap(sum(weight.nbytes for weight in model.decoder.parameters()))
        runner = stack.enter_context(asyncio.Runner())
        run = Run(
            config=config,
            dir=run_dir,
            tokenizer=model.tokenizer,
            runner=runner,
            progress=make_progress(config.run.num_steps, checkpoint.step if checkpoint else 0),
            stop=StopRequest(say),
            **_parts(config, request, model, runner, stack, say),
        )
        if not request.resume:
            run_dir.create(config)
        stack.enter_context(RunLock(run_dir))
        if request.resume:
            _take_up(run, checkpoint)
        run.closers.append(stack.pop_all().close)
    return run


def _parts(
    config: RunConfig, request: Request, model: LoadedModel, runner: asyncio.Runner, stack: ExitStack, say: Say
) -> dict[str, Any]:
    """Feed, trainer, engine and evaluator of a run."""
    needs_engine = request.replay is None and (request.mode != "sft" or config.eval.every is not None)
    scorer = stack.enter_context(Scorer(config.reward)) if needs_engine else None
    evaluator = None if scorer is None else _evaluator(config, model, scorer, say)
    engine: Engine | None = None
    if needs_engine:
        own = model.decoder if request.mode == "rollout" else deepcopy(model.decoder)
        engine = _engine(config, model, own, weight_version=0 if request.mode == "rollout" else -1)
        stack.callback(lambda: runner.run(engine.close()))
    trainer = None
    if request.mode != "rollout":
        updates = config.run.num_steps * (1 if request.mode == "sft" else config.trainer.updates_per_step)
        trainer = FsdpTrainer(model.decoder, config.algorithm, config.trainer, config.optimizer, total_updates=updates)
    feed = _feed(config, request, model, engine, scorer, runner, say)
    return {"feed": feed, "trainer": trainer, "engine": engine, "evaluator": evaluator}


def _feed(
    config: RunConfig,
    request: Request,
    model: LoadedModel,
    engine: Engine | None,
    scorer: Scorer | None,
    runner: asyncio.Runner,
    say: Say,
) -> Feed:
    if request.replay is not None:
        return ReplayFeed(request.replay / "samples", config.rollout, config.algorithm)
    data, seed = config.data, config.run.seed
    if request.mode == "sft":
        examples, report = load_sft(data.train, model.tokenizer, data)
        _report(report.lines(), "train", say)
        count = config.sft.sequences_per_step
        return SftFeed(examples, sequences_per_step=count, seed=seed, shuffle=data.shuffle, max_epochs=data.max_epochs)
    assert engine is not None and scorer is not None
    prompts, report = load_prompts(data.train, model.tokenizer, data, max_tokens=prompt_room(model.decoder.config, config))
    _report(report.lines(), "train", say)
    scorer.check_prompts(prompts)
    source = PromptSource(prompts, seed=seed, shuffle=data.shuffle, max_epochs=data.max_epochs)
    sampling = config.sampling.params(seed=seed, n=config.rollout.group_size)
    return RolloutFeed(source, engine, scorer, sampling, config.rollout, config.algorithm, runner.run)


def _evaluator(config: RunConfig, model: LoadedModel, scorer: Scorer, say: Say) -> Evaluator | None:
    if config.eval.every is None:
        return None
    room = prompt_room(model.decoder.config, config, held_out=True)
    prompts, report = load_prompts(config.data.eval, model.tokenizer, config.data, max_tokens=room)
    _report(report.lines(), "eval", say)
    return Evaluator(prompts, scorer, config.eval, config.sampling, config.rollout, seed=config.run.seed)


def _engine(config: RunConfig, model: LoadedModel, decoder: Any, *, weight_version: int) -> Engine:
    """The rollout engine, by name."""
    if config.rollout.engine != "embedded":
        raise ValueError(f'rollout.engine = "{config.rollout.engine}" is not known here; known is embedded')
    from miles_rollout.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(decoder, model.tokenizer, config.engine.embedded(), model=model.name, weight_version=weight_version)


def _report(lines: list[str], what: str, say: Say) -> None:
    for line in lines:
        say(f"data.{what}: {line}")


def _resumable(config: RunConfig, run_dir: RunDir, say: Say) -> Checkpoint | None:
    """The verified checkpoint to go on from; None when the run never came that far."""
    run_dir.check_resumable()
    changed = [line for line in differences(read_config(run_dir.root), config) if not line.startswith(FREE_ON_RESUME)]
    if changed:
        shown = "\n".join(f"  {line}" for line in changed)
        raise ValueError(
            f"{run_dir.root}: resuming with other settings would be another run:\n{shown}\n"
            "Use the same settings, or another --name"
        )
    store = CheckpointStore(run_dir.root, config.checkpoint.keep_last)
    if store.latest() is None:
        say(f"{run_dir.root}: no complete checkpoint yet, starting again from step 0")
        return None
    return store.load()


def _take_up(run: Run, checkpoint: Checkpoint | None) -> None:
    """Go on in an existing directory, under its lock."""
    run.store.recover()
    if checkpoint is None:
        run.dir.rewind(-1)
    else:
        run.restore(checkpoint)
    run.dir.write_config(run.config)


def evaluate_once(config: RunConfig, say: Say) -> Evaluation:
    """Evaluate the configured model on the held-out prompts; writes nothing. Raises ValueError when data.eval is empty."""
    use_threads(config.run.threads)
    if not config.data.eval:
        raise ValueError("data.eval names no held-out prompts; give some with --data.eval SOURCE")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"every": 1})})
    model = load_model(config, say)
    with Scorer(config.reward) as scorer, asyncio.Runner() as runner:
        evaluator = _evaluator(config, model, scorer, say)
        assert evaluator is not None
        engine = _engine(config, model, model.decoder, weight_version=0)
        try:
            return runner.run(evaluator.evaluate(engine))
        finally:
            runner.run(engine.close())
