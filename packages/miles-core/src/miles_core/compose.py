"""The composition root: from a configuration to a `Run`. Everything is checked before the first file is written."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from miles_core.checkpoint import Checkpoint, CheckpointStore
from miles_core.config.dump import read_config
from miles_core.config.idle import idle_settings
from miles_core.config.resume import changes_on_resume
from miles_core.config.schema import RunConfig
from miles_core.data.load import load_prompts, load_sft
from miles_core.data.source import PromptSource
from miles_core.draft.build import engine_settings, load_draft, with_draft
from miles_core.draft.served import Comparison, ServedFeed
from miles_core.draft.trainer import DraftingTrainer
from miles_core.eval.evaluate import Evaluation, Evaluator
from miles_core.eval.held_out import load_held_out
from miles_core.feed import Feed, ReplayFeed, RolloutFeed, SftFeed
from miles_core.interrupt import StopRequest
from miles_core.memory import prepare_heap
from miles_core.memory.ahead import prepare_host
from miles_core.memory.check import require_room, while_building
from miles_core.memory.jobs import device_of_run, job_of_run
from miles_core.memory.plan import make_plan
from miles_core.memory.run import RunMemory
from miles_core.memory.slabs import HostSlabs
from miles_core.memory.trainer import TrainerMemory
from miles_core.models import LoadedModel, load_model, load_shape, prompt_room, use_threads
from miles_core.progress import make_progress
from miles_core.rollout import Scorer, load_producer
from miles_core.rollout.service import ServiceEngine
from miles_core.run import Run
from miles_core.rundir import RunDir, RunLock
from miles_core.serviced import open_service, publish_from_here, publish_from_workers, weights_folder
from miles_core.sync.inprocess import publish
from miles_core.trainer.base import Trainer
from miles_core.trainer.fsdp import FsdpTrainer
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engine import Engine, MemoryEngine
from miles_rollout.text import Tokenizer

Mode = Literal["train", "sft", "rollout"]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for beside the configuration."""

    mode: Mode = "train"
    resume: bool = False
    replay: Path | None = None
    """The run directory whose samples are trained on again."""

    @property
    def is_resumable(self) -> bool:
        """Generating alone and replaying are short: they are started again instead."""
        return self.mode != "rollout" and self.replay is None


class Text(NamedTuple):
    """What reading data takes of a model: no weights."""

    tokenizer: Tokenizer
    shape: DecoderConfig


def compose(config: RunConfig, request: Request, say: Say) -> Run:
    """Build every part, check that they fit, then make (or take up) the run directory.

    Raises ValueError, FileExistsError or ImportError with the remedy in the message; nothing is written then.
    """
    config.require_one_driver()
    if request.mode != "rollout" and _needs_engine(config, request):
        config.require_equal_numbers()
    use_threads(config.run.threads)
    for line in idle_settings(config, request.mode):
        say(line)
    run_dir = RunDir.of(config)
    checkpoint = None
    if request.resume:
        checkpoint = _resumable(config, run_dir, say)
    else:
        run_dir.check_new(resumable=request.is_resumable)
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        with while_building():
            make = _cluster_parts if config.clustered else _parts
            if request.mode == "rollout" and config.service.url is not None:
                make = _served_rollout
            parts = make(config, request, run_dir, runner, stack, say)
        run = Run(
            config=config,
            dir=run_dir,
            runner=runner,
            progress=make_progress(config.run.num_steps, checkpoint.step if checkpoint else 0),
            stop=StopRequest(say),
            **parts,
        )
        if not request.resume:
            run_dir.create(config, resumable=request.is_resumable)
        stack.enter_context(RunLock(run_dir))
        if request.resume:
            _take_up(run, checkpoint)
        run.closers.append(stack.pop_all().close)
    return run


def _needs_engine(config: RunConfig, request: Request) -> bool:
    return request.replay is None and (request.mode != "sft" or config.eval.every is not None)


def _parts(
    config: RunConfig, request: Request, run_dir: RunDir, runner: asyncio.Runner, stack: ExitStack, say: Say
) -> dict[str, Any]:
    """Feed, trainer, engine, publisher and evaluator of a run, all in this process, or with a service for an engine."""
    if config.model.device != "cpu":
        require_room(config, load_shape(config.model, say)[0], request.mode)
    slabs = prepare_host(config, say) if request.mode != "rollout" else None
    if slabs is not None:
        stack.callback(slabs.forget)  # of a start that fails
    model = load_model(config, say, divided=request.mode == "rollout" and config.engine.tensor_parallel > 1)
    prepare_heap(sum(weight.nbytes for weight in model.decoder.parameters()))
    text = Text(model.tokenizer, model.decoder.config)
    scorer = stack.enter_context(Scorer(config.reward)) if _needs_engine(config, request) else None
    evaluator = None if scorer is None else _evaluator(config, text, scorer, stack, say)
    engine: Engine | None = None
    service: ServiceEngine | None = None
    draft = load_draft(config, model.decoder)
    if scorer is not None and config.service.url is not None:
        engine = service = open_service(config, runner, stack, say)
    elif scorer is not None:
        own = model.decoder if request.mode == "rollout" else deepcopy(model.decoder)
        version = 0 if request.mode == "rollout" else -1
        engine = make_engine(config, model, own, weight_version=version, draft=deepcopy(draft))
        stack.callback(lambda: runner.run(engine.close()))
    trainer, released = None, _make_room(config, request, engine, runner)
    if request.mode != "rollout":
        trainer = make_trainer(config, request.mode, model.decoder, slabs)
        trainer = trainer if draft is None else with_draft(trainer, config, draft)
    publisher = None
    if trainer is not None and service is not None:
        publisher = publish_from_here(config, model.decoder.config, trainer, service, runner, stack)
    elif trainer is not None and engine is not None:
        publisher = partial(_publish, runner, trainer, engine)
    feed = _feed(config, request, text, engine, scorer, runner, say)
    memory = _memory(config, trainer, engine, runner, run_dir, released)
    if draft is not None and engine is not None and request.mode != "sft":
        comparison = _comparison(config, model, trainer, runner, stack)
        feed = ServedFeed(feed, engine, trainer if isinstance(trainer, DraftingTrainer) else None, comparison, runner.run)
    return {
        "feed": feed, "trainer": trainer, "engine": engine, "publisher": publisher, "evaluator": evaluator,
        "tokenizer": model.tokenizer, "memory": memory,
    }  # fmt: skip


def _served_rollout(
    config: RunConfig, request: Request, run_dir: RunDir, runner: asyncio.Runner, stack: ExitStack, say: Say
) -> dict[str, Any]:
    """Rollouts of a service with the weights it has. This process holds none."""
    shape, tokenizer = load_shape(config.model, say)
    text = Text(tokenizer, shape)
    scorer = stack.enter_context(Scorer(config.reward))
    engine = open_service(config, runner, stack, say, published=False)
    evaluator = _evaluator(config, text, scorer, stack, say)
    feed = _feed(config, request, text, engine, scorer, runner, say)
    return {
        "feed": feed, "trainer": None, "engine": engine, "publisher": None, "evaluator": evaluator, "tokenizer": text.tokenizer
    }  # fmt: skip


def _make_room(config: RunConfig, request: Request, engine: Engine | None, runner: asyncio.Runner) -> tuple[str, ...]:
    """Where the two take turns, the engine's keys and values go before the trainer comes; the tags that went."""
    if not config.memory.sleep or request.mode == "rollout" or not isinstance(engine, MemoryEngine):
        return ()
    runner.run(engine.release_memory(("kv_cache",)))
    return ("kv_cache",)


def _memory(
    config: RunConfig,
    trainer: Trainer | None,
    engine: Engine | None,
    runner: asyncio.Runner,
    run_dir: RunDir,
    released: tuple[str, ...],
) -> RunMemory | None:
    """The memory of a run whose trainer can say what it holds."""
    held = getattr(getattr(trainer, "inner", trainer), "memory", None)
    if not isinstance(held, TrainerMemory):
        return None
    known = engine if isinstance(engine, MemoryEngine) else None
    return RunMemory(held, known, runner.run, config.memory, run_dir.root / "memory", released=released)


def _comparison(
    config: RunConfig, model: LoadedModel, trainer: Trainer | None, runner: asyncio.Runner, stack: ExitStack
) -> Comparison | None:
    """An engine for every arm the draft is compared with; None when there is none."""
    if not config.draft.compare or not isinstance(trainer, DraftingTrainer):
        return None
    engines: dict[str, Engine] = {}
    for arm in config.draft.compare:
        draft = None if arm == "none" else deepcopy(trainer.main.serving)
        made = make_engine(
            config, model, deepcopy(model.decoder), weight_version=-1, draft=draft, adaptive=arm == "adaptive"
        )  # fmt: skip
        stack.callback(_close, runner, made)
        engines[arm] = made
    sampling = config.sampling.params(seed=config.run.seed, n=config.rollout.group_size)
    return Comparison(trainer, engines, sampling, config.draft.compare_every, config.draft.compare_samples)


def _close(runner: asyncio.Runner, engine: Engine) -> None:
    runner.run(engine.close())


def _publish(runner: asyncio.Runner, trainer: Trainer, engine: Engine, version: int) -> None:
    runner.run(publish(trainer, engine, version))


def _cluster_parts(
    config: RunConfig, request: Request, run_dir: RunDir, runner: asyncio.Runner, stack: ExitStack, say: Say
) -> dict[str, Any]:
    """The same with trainer and engine in worker processes. This process holds no weights."""
    from miles_core.cluster.start import start

    shape, tokenizer = load_shape(config.model, say)
    text = Text(tokenizer, shape)
    scorer = stack.enter_context(Scorer(config.reward)) if _needs_engine(config, request) else None
    evaluator = None if scorer is None else _evaluator(config, text, scorer, stack, say)
    logs = run_dir.root.with_name(f".{run_dir.root.name}.logs-{os.getpid()}")
    stack.callback(_keep_logs, logs, run_dir.root)
    service = open_service(config, runner, stack, say) if scorer is not None and config.service.url is not None else None
    cluster = stack.enter_context(start(config, request.mode, logs, say, needs_engine=scorer is not None and service is None))
    trainer = cluster.trainer
    engine: Engine | None = service or cluster.engine
    if cluster.engine is not None:
        stack.callback(partial(_close, runner, cluster.engine))
    publisher: Callable[[int], Any] | None = cluster.publish if trainer is not None and engine is not None else None
    if trainer is not None and service is not None:
        publisher = partial(publish_from_workers, trainer, service, weights_folder(config))
    feed = _feed(config, request, text, engine, scorer, runner, say)
    return {
        "feed": feed, "trainer": trainer, "engine": engine, "publisher": publisher, "evaluator": evaluator, "tokenizer": tokenizer
    }  # fmt: skip


def _keep_logs(logs: Path, root: Path) -> None:
    """Workers start before there is a run directory; at the end their logs go there."""
    if logs.is_dir() and root.is_dir():
        shutil.copytree(logs, root / "logs", dirs_exist_ok=True)
    shutil.rmtree(logs, ignore_errors=True)


def make_trainer(config: RunConfig, mode: Mode, decoder: Decoder, slabs: HostSlabs | None = None) -> Trainer:
    """The training backend by name, one process of it, its state in `slabs` if they were prepared for that.

    Raises ImportError naming the extra when its library is missing.
    """
    updates = config.run.num_steps * (1 if mode == "sft" else config.trainer.updates_per_step)
    # no reference policy is held where nothing asks for one
    algorithm = config.algorithm.model_copy(update={"kl_coef": 0.0}) if mode == "sft" else config.algorithm
    if config.trainer.backend == "megatron":
        from miles_core.trainer.megatron.backend import MegatronTrainer

        return MegatronTrainer(decoder, algorithm, config.trainer, config.optimizer, total_updates=updates)
    job = job_of_run(config, decoder.config, mode, device_of_run(config), config.num_trainers)
    trainer = FsdpTrainer(
        decoder, algorithm, config.trainer, config.optimizer, total_updates=updates, memory=config.memory, slabs=slabs
    )  # fmt: skip
    trainer.memory.facts.plan = make_plan(job)
    return trainer


def _feed(
    config: RunConfig,
    request: Request,
    text: Text,
    engine: Engine | None,
    scorer: Scorer | None,
    runner: asyncio.Runner,
    say: Say,
) -> Feed:
    if request.replay is not None:
        return ReplayFeed(request.replay / "samples", config.rollout, config.algorithm)
    data, seed = config.data, config.run.seed
    if request.mode == "sft":
        examples, report = load_sft(data.train, text.tokenizer, data)
        _report(report.lines(), say)
        count = config.sft.sequences_per_step
        return SftFeed(examples, sequences_per_step=count, seed=seed, shuffle=data.shuffle, max_epochs=data.max_epochs)
    assert engine is not None and scorer is not None
    prompts, report = load_prompts(data.train, text.tokenizer, data, max_tokens=prompt_room(text.shape, config))
    _report(report.lines(), say)
    scorer.check_prompts(prompts)
    source = PromptSource(prompts, seed=seed, shuffle=data.shuffle, max_epochs=data.max_epochs)
    sampling = config.sampling.params(seed=seed, n=config.rollout.group_size)
    producer = load_producer(config.rollout, text.tokenizer)
    return RolloutFeed(source, engine, scorer, sampling, config.rollout, config.algorithm, runner.run, producer)


def _evaluator(config: RunConfig, text: Text, scorer: Scorer, stack: ExitStack, say: Say) -> Evaluator | None:
    if config.eval.every is None:
        return None
    prompts = load_held_out(config, text.tokenizer, text.shape, say)
    if config.eval.reward is not None:
        scorer = stack.enter_context(Scorer(config.eval.reward))
    producer = load_producer(config.rollout, text.tokenizer)
    return Evaluator(prompts, scorer, config.eval, config.sampling, config.rollout, seed=config.run.seed, producer=producer)


def make_engine(
    config: RunConfig,
    model: LoadedModel,
    decoder: Any,
    *,
    weight_version: int,
    draft: Any = None,
    adaptive: bool | None = None,
) -> Engine:
    """The rollout engine, by name, with a draft model that takes its weights from every update."""
    from miles_rollout.engines.embedded.engine import EmbeddedEngine

    settings = engine_settings(config, adaptive=adaptive)
    where = config.model.device if decoder.embed_tokens.is_meta else None
    return EmbeddedEngine(
        decoder, model.tokenizer, settings, model=model.name, weight_version=weight_version, draft=draft, device=where,
        weights=model.weights,
    )  # fmt: skip


def _report(lines: list[str], say: Say) -> None:
    for line in lines:
        say(f"data.train: {line}")


def _resumable(config: RunConfig, run_dir: RunDir, say: Say) -> Checkpoint | None:
    """The verified checkpoint to go on from; None when the run never came that far."""
    run_dir.check_resumable()
    changes = changes_on_resume(read_config(run_dir.root), config)
    if changes.refused:
        shown = "\n".join(f"  {line}" for line in changes.refused)
        raise ValueError(
            f"{run_dir.root}: resuming with other settings would be another run:\n{shown}\n"
            "Use the same settings, or another --name"
        )
    for line in changes.noticed:
        say(f"{line}: the run goes on, not with the bits it would have had")
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
    """Evaluate the configured model on the held-out prompts; writes nothing. Raises ValueError when there are none."""
    use_threads(config.run.threads)
    if not config.data.eval and not config.eval.sets:
        raise ValueError("data.eval names no held-out prompts; give some with --data.eval SOURCE")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"every": 1})})
    if config.service.url is not None:
        say("service.url: an evaluation has an engine of its own, and leaves the service alone")
    model = load_model(config, say, divided=config.engine.tensor_parallel > 1)
    with ExitStack() as stack, asyncio.Runner() as runner:
        scorer = stack.enter_context(Scorer(config.eval.reward or config.reward))
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"reward": None})})
        evaluator = _evaluator(config, Text(model.tokenizer, model.decoder.config), scorer, stack, say)
        assert evaluator is not None
        engine = make_engine(config, model, model.decoder, weight_version=0)
        try:
            return runner.run(evaluator.evaluate(engine))
        finally:
            runner.run(engine.close())
