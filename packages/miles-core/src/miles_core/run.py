"""A run in progress: the parts the loop drives, and what each beat of the loop means for them. Built in `compose`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from miles_core.background import BackgroundSaver
from miles_core.checkpoint import Checkpoint, CheckpointStore
from miles_core.config.schema import RunConfig
from miles_core.eval.evaluate import Evaluation, Evaluator
from miles_core.feed import Feed, Portion
from miles_core.interrupt import StopRequest
from miles_core.memory import peak_rss_bytes, release_freed
from miles_core.memory.run import RunMemory
from miles_core.metrics import StepClock
from miles_core.profile import ProfilingClock
from miles_core.progress import Progress
from miles_core.rundir import RunDir
from miles_core.trainer.base import StepStats, Trainer
from miles_core.trainer.batch import TrainBatch
from miles_rollout.engine import Engine
from miles_rollout.text import Tokenizer
from miles_rollout.wire import write_samples

STATE_SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of the loop ended."""

    step: int
    interrupted: bool
    checkpoint: Path | None


@dataclass(kw_only=True)
class Run:
    """Everything a step touches. `trainer` is None when a run only generates, `engine` when it only trains."""

    config: RunConfig
    dir: RunDir
    feed: Feed
    trainer: Trainer | None
    engine: Engine | None
    publisher: Callable[[int], object] | None
    """Brings the engine to the trainer's weights, as the version it is given; None when one of the two is missing."""
    evaluator: Evaluator | None
    tokenizer: Tokenizer
    progress: Progress
    stop: StopRequest
    runner: asyncio.Runner
    memory: RunMemory | None = None
    """Of a trainer in this process."""
    closers: list[Callable[[], None]] = field(default_factory=list)
    step: int = 0
    saved_step: int | None = None

    def __post_init__(self) -> None:
        keep = self.config.checkpoint
        best = keep.keep_best is not None
        self.store = CheckpointStore(self.dir.root, keep.keep_last, keep_every=keep.keep_every, keep_best=best)
        self.saver = BackgroundSaver(self.store) if keep.asynchronous else None
        self.last_metrics: dict[str, float] = {}
        self._warned = False

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.run.num_steps

    def clock(self) -> StepClock:
        """What times the parts of the next step, and records them where `run.profile_steps` asks for it."""
        due = self.step + 1 in self.config.run.profile_steps
        return ProfilingClock(self.dir.profile, self.step + 1) if due else StepClock()

    def begin(self) -> None:
        """Publish the weights as they are; a run that starts also evaluates them, as step 0."""
        self.publish()
        if self.step == 0 and self.saved_step is None:
            clock = StepClock()
            with clock("eval"):
                scores = self.evaluate(at_start=True)
            if scores is not None:
                self.record(Portion(batch=None), None, scores, clock)

    def write_samples(self, portion: Portion) -> None:
        """Record what was sampled, before anything is done with it."""
        if portion.samples:
            write_samples(self.dir.step_samples(self.step + 1), portion.samples)

    def train_on(self, portion: Portion) -> StepStats | None:
        """One optimizer step; None when there is nothing to train on, or no trainer."""
        trainer, batch = self.trainer, portion.batch
        if trainer is None or batch is None:
            return None
        return trainer.step(batch) if self.memory is None else self.memory.training(lambda: trainer.step(batch))

    def publish(self) -> None:
        """Bring the engine to the trainer's weights, as version `step`."""
        publisher = self.publisher
        if publisher is not None:
            publisher(self.step) if self.memory is None else self.memory.publishing(lambda: publisher(self.step))
            release_freed()

    def evaluate(self, *, at_start: bool = False, at_end: bool = False) -> dict[str, float] | None:
        """Metrics on the held-out prompts if that is due now. Their tokens, too, are compared with the trainer bit by bit."""
        every = self.config.eval.every
        if self.evaluator is None or self.engine is None or every is None:
            return None
        if not (at_start or at_end or self.step % every == 0 or self.step == self.num_steps):
            return None
        result = self.runner.run(self.evaluator.evaluate(self.engine))
        write_samples(self.dir.eval_samples(self.step), result.samples)
        metrics = {**result.metrics, **self._verify(result)}
        release_freed()
        if at_start and "eval/tokens_unequal" in metrics:
            metrics |= {
                "mismatch/tokens_unequal": metrics["eval/tokens_unequal"],
                "mismatch/max_abs": metrics["eval/mismatch_max_abs"],
            }
        return metrics

    def _verify(self, result: Evaluation) -> dict[str, float]:
        trainer = self.trainer
        if trainer is None:
            return {}
        batch = TrainBatch.from_samples(result.samples, [0.0] * len(result.samples))
        assert batch.rollout_logprobs is not None
        found = self._between_rollouts(lambda: trainer.forward_logprobs(batch))
        ours, theirs = found.numpy(), batch.rollout_logprobs.numpy()
        unequal = int((ours.view("int32") != theirs.view("int32")).sum())
        return {"eval/tokens_unequal": unequal, "eval/mismatch_max_abs": float(abs(ours - theirs).max())}

    def record(self, portion: Portion, stats: StepStats | None, scores: dict[str, float] | None, clock: StepClock) -> None:
        """One row of metrics, on disk and on the screen."""
        row = {**portion.metrics, **(stats.metrics() if stats else {}), **(scores or {}), **clock.metrics()}
        row["perf/peak_rss_bytes"] = peak_rss_bytes()
        if self.memory is not None:
            row |= self.memory.metrics()
        tokens = row.get("rollout/num_tokens", row.get("train/num_tokens", 0.0))
        if tokens:
            row["perf/tokens_per_s"] = tokens / row["perf/step_s"]
        for part in ("rollout", "train"):
            if row.get(f"{part}/num_tokens") and row.get(f"perf/{part}_s"):
                row[f"perf/{part}_tokens_per_s"] = row[f"{part}/num_tokens"] / row[f"perf/{part}_s"]
        if self.trainer is not None:
            row["train/weight_version"] = self.step
        self.dir.metrics.append(self.step, row)
        self.last_metrics = row
        self.progress.step(self.step, row)

    def checkpoint(self, *, now: bool = False) -> None:
        """Save if it is due: every so many steps, and whenever `now` is set and this step is not saved yet."""
        trainer, every = self.trainer, self.config.checkpoint.every
        due = now or (every > 0 and self.step % every == 0)
        if trainer is None or not due or self.saved_step == self.step:
            return

        def write_trainer(path: Path) -> None:
            self._between_rollouts(lambda: trainer.save(path))
            self.tokenizer.save(path / "model")

        def write_state(path: Path) -> None:
            state = {"schema": STATE_SCHEMA, "step": self.step, "feed": self.feed.state()}
            path.write_text(json.dumps(state) + "\n", encoding="utf-8")

        parts = {"trainer": write_trainer, "state.json": write_state}
        score = self._score()
        if score is None and not now:
            self._warn_unscored()
        if self.saver is not None:
            self.saver.save(self.step, parts, score=score)
        else:
            self.store.save(self.step, parts, score=score)
        self.saved_step = self.step

    def _between_rollouts(self, work: Callable[[], T]) -> T:
        """What the trainer does in the engine's turn."""
        return work() if self.memory is None else self.memory.between_rollouts(work)

    def _score(self) -> float | None:
        """The metric that `checkpoint.keep_best` names, as of this step; None where it was not measured."""
        name = self.config.checkpoint.keep_best
        return None if name is None else self.last_metrics.get(name)

    def _warn_unscored(self) -> None:
        """Say once that what `checkpoint.keep_best` names was not measured, or it would keep nothing without a word."""
        name = self.config.checkpoint.keep_best
        if name is None or self._warned:
            return
        self._warned = True
        near = ", ".join(get_close_matches(name, self.last_metrics, n=3))
        self.progress.say(
            f'checkpoint.keep_best = "{name}": step {self.step} measured no such number'
            + (f"; near it: {near}" if near else "")
            + "; only checkpoints of steps that do can be the best (see eval.every and checkpoint.every)"
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a verified checkpoint; what the run wrote after it is forgotten."""
        assert self.trainer is not None
        state = json.loads(checkpoint.part("state.json").read_text(encoding="utf-8"))
        if state["schema"] != STATE_SCHEMA:
            raise ValueError(
                f"{checkpoint.path}: state schema {state['schema']}, this build reads {STATE_SCHEMA}; "
                "use the version that wrote it"
            )
        self.trainer.load(checkpoint.part("trainer"))
        self.feed.load_state(state["feed"])
        self.step = self.saved_step = int(state["step"])
        self.dir.rewind(self.step)

    def finish(self) -> Outcome:
        """Save where the run stands."""
        self.checkpoint(now=True)
        if self.saver is not None:
            self.saver.wait()
        path = None if self.saved_step is None else self.store.path(self.saved_step)
        return Outcome(step=self.step, interrupted=self.stop.requested and self.step < self.num_steps, checkpoint=path)

    def close(self) -> None:
        """Release engine, scorer, event loop and lock, in the reverse order of their making. Idempotent.

        After an error, too, a checkpoint that is under way gets to the disk before the lock goes.
        """
        if self.saver is not None:
            try:
                self.saver.wait()
            except Exception as error:  # the run's own error is on its way, and this one beside it
                self.progress.say(f"the checkpoint under way has failed: {error}")
        while self.closers:
            self.closers.pop()()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
