"""Rollouts of many turns: a function of the user's lets policy and environment take turns, and every token is recorded.

The function decides what happens; what was sampled, under which weights and with which log-probability is written down here,
so such a rollout trains, replays and is checked bit by bit like any other.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from miles_core.data.record import Prompt, PromptGroup
from miles_core.imports import load_callable
from miles_rollout.engine import Engine, EngineRefusal
from miles_rollout.text import Tokenizer
from miles_rollout.waits import gather_all
from miles_rollout.wire import Completion, GenerateRequest, RewardStatus, Sample, SamplingParams, WeightSpan

RolloutFn = Callable[..., Awaitable[None]]
"""`async def play(rollout: Rollout, **options) -> None`, named by `rollout.producer`. It shares its event loop with all others,
so what blocks (a process, a file, a client that is not asynchronous) belongs into `await asyncio.to_thread(...)`."""
_OPEN = ("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "top_p", "top_k", "min_p")
"""Sampling settings that a turn may change; a sequence has one temperature, one seed and one continuation."""


class Rollout:
    """One trajectory in the making: the policy's turns come by `generate`, everything else by `append`.

    Example, named by `rollout.producer = "my_rollouts.py:play"`; the tokens of `append` are read and never trained:

        async def play(rollout):
            while turn := await rollout.generate(stop=("=",)):
                if turn.matched_stop != "=":
                    return
                rollout.append(calculate(turn.text))
    """

    def __init__(
        self, prompt: Prompt, sample_id: int, group_id: int, sampling: SamplingParams, engine: Engine, tokenizer: Tokenizer
    ) -> None:
        self.prompt = prompt
        self.sample_id, self.group_id = sample_id, group_id
        self.tokenizer = tokenizer
        self.answer: str | None = None
        """What the reward reads; unset means the text of the policy's last turn."""
        self.reward: float | None = None
        """Set it where the environment knows the reward: the configured one is then not asked."""
        self.metadata: dict[str, Any] = {}
        """Recorded with the sample and shown to the reward, beside the prompt's own."""
        self._engine, self._sampling = engine, msgspec.structs.replace(sampling, n=1)
        self._max_tokens = engine.info().max_context
        self._ids = list(prompt.input_ids)
        self._mask = [False] * len(self._ids)
        self._logprobs = [0.0] * len(self._ids)
        self._spans: list[WeightSpan] = []
        self._turns: list[dict[str, str]] = []
        self._last: Completion | None = None
        self._is_full = False
        self.engine_failed = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything so far, the prompt included."""
        return tuple(self._ids)

    @property
    def num_turns(self) -> int:
        """Turns of the policy."""
        return sum(turn["by"] == "policy" for turn in self._turns)

    @property
    def room(self) -> int:
        """Tokens that still fit into the engine's context."""
        return self._max_tokens - len(self._ids)

    async def generate(self, **changes: Any) -> Completion | None:
        """The policy's next turn, appended; None when the context is full or a turn was aborted, and the rollout is over.

        `changes` of [sampling] hold for this turn: max_new_tokens (cut to the room there is), stop, top_p and the like.
        Raises ValueError for a setting that all turns must share, EngineRefusal naming the prompt that never fitted.
        """
        wrong = sorted(set(changes) - set(_OPEN))
        if wrong:
            raise ValueError(f"generate: a turn cannot change {', '.join(wrong)}; it may change {', '.join(_OPEN)}")
        if self._last is not None and self._last.finish_reason == "abort":
            return None
        if self._last is not None and self.room < 1:
            self._is_full = True
            return None
        sampling = msgspec.structs.replace(self._sampling, **changes)
        most = sampling.max_new_tokens if self._last is None else min(sampling.max_new_tokens, self.room)
        sampling = msgspec.structs.replace(
            sampling, max_new_tokens=most, min_new_tokens=min(sampling.min_new_tokens, most), stop=tuple(sampling.stop)
        )
        sampling.validate()
        self._last = await self._ask(sampling)
        return self._last

    def append(self, more: str | Sequence[int]) -> None:
        """What the environment says: text (encoded without special tokens) or token ids. Never trained.

        Raises ValueError before the first turn; what stands before it belongs to the prompt.
        """
        if self._last is None:
            raise ValueError("append: before the policy's first turn; what is the same for every rollout belongs into the prompt")
        ids = self.tokenizer.encode(more, add_special_tokens=False) if isinstance(more, str) else list(more)
        if self.room < len(ids):
            self._is_full = True
            ids = ids[: max(0, self.room)]
        self._ids += ids
        self._mask += [False] * len(ids)
        self._logprobs += [0.0] * len(ids)
        self._turns.append({"by": "environment", "text": more if isinstance(more, str) else self.tokenizer.decode(ids)})

    def sample(self, *, failure: str = "", kind: Literal["error", "timeout"] = "error") -> Sample:
        """The trajectory as a record. With a `failure` it is kept to look at, carries no reward and is not trained."""
        text = self.answer if self.answer is not None else (self._last.text if self._last is not None else "")
        ended = "completed"
        if self._last is not None and self._last.finish_reason == "abort":
            ended = "aborted"
        elif self._is_full or (self._last is not None and self._last.finish_reason == "length"):
            ended = "truncated"
        given: RewardStatus = kind if failure else "pending" if self.reward is None else "ok"
        return Sample(
            sample_id=self.sample_id,
            group_id=self.group_id,
            prompt_id=self.prompt.prompt_id,
            token_ids=tuple(self._ids),
            loss_mask=tuple(self._mask),
            rollout_logprobs=tuple(self._logprobs),
            temperature=self._sampling.temperature or 1.0,  # greedy states its logprobs at temperature 1
            weight_spans=tuple(self._spans),
            text=text,
            label=self.prompt.label,
            status="failed" if failure else ended,  # type: ignore[arg-type]
            reward=self.reward if given == "ok" else None,
            reward_status=given,
            reward_detail=failure,
            metadata={**self.prompt.metadata, **self.metadata, "turns": self._turns},
        )

    async def _ask(self, sampling: SamplingParams) -> Completion:
        request = GenerateRequest(
            request_id=f"sample-{self.sample_id}-turn-{self.num_turns}",
            input_ids=tuple(self._ids),
            sampling=sampling,
            sample_ids=(self.sample_id,),
        )
        try:
            (made,) = (await self._engine.generate(request)).completions
        except EngineRefusal as error:
            self.engine_failed = True
            raise EngineRefusal(f"{self.prompt.prompt_id}: {error}") from error
        except Exception:
            self.engine_failed = True
            raise
        if len(made.logprobs) != len(made.token_ids):
            counts = f"{len(made.token_ids)} tokens, {len(made.logprobs)} logprobs"
            raise ValueError(f"engine: completion {made.sample_id} has {counts}")
        start = len(self._ids)
        self._spans += [WeightSpan(version=s.version, start=s.start + start, stop=s.stop + start) for s in made.weight_spans]
        self._ids += made.token_ids
        self._mask += [True] * len(made.token_ids)
        self._logprobs += made.logprobs
        self._turns.append({"by": "policy", "text": made.text})
        return made


class TurnProducer:
    """Runs the user's function once for every completion of a group; what fails or hangs is a sample that says so.

    Raises ValueError when there is no such function, it is not `async`, or it does not take the options.
    """

    def __init__(self, name: str, options: Mapping[str, Any], tokenizer: Tokenizer, *, deadline_s: float) -> None:
        self._name, self._options, self._tokenizer, self._deadline_s = name, options, tokenizer, deadline_s
        self._function: RolloutFn = load_callable(name, purpose="rollout.producer")
        if not inspect.iscoroutinefunction(self._function):
            raise ValueError(f"rollout.producer {name}: it must be `async def`, so that many rollouts can wait at one time")
        try:
            inspect.signature(self._function).bind("rollout", **options)
        except TypeError as error:
            raise ValueError(
                f"rollout.producer {name}: it must take (rollout) and the names in rollout.producer_options: {error}"
            ) from None

    async def __call__(self, group: PromptGroup, engine: Engine, sampling: SamplingParams) -> list[Sample]:
        """`sampling.n` samples of one prompt, in order of their ids."""
        first = group.group_id * sampling.n
        ids = range(first, first + sampling.n)
        return await gather_all(self._one(group, engine, sampling, sample_id) for sample_id in ids)

    async def _one(self, group: PromptGroup, engine: Engine, sampling: SamplingParams, sample_id: int) -> Sample:
        rollout = Rollout(group.prompt, sample_id, group.group_id, sampling, engine, self._tokenizer)
        where = f"{self._name}, sample {sample_id} ({group.prompt.prompt_id})"
        clock = asyncio.timeout(self._deadline_s)
        try:
            async with clock:
                await self._function(rollout, **self._options)
        except Exception as error:
            if rollout.engine_failed:
                raise  # no fault of this rollout: the run ends with what the engine said
            if clock.expired():
                failure = f"{where}: not over after rollout.deadline_s = {self._deadline_s:g}"
                return rollout.sample(failure=failure, kind="timeout")
            return rollout.sample(failure=f"{where}: {type(error).__name__}: {error}")
        if rollout.num_turns == 0:
            return rollout.sample(failure=f"{where}: it returned without a turn of the policy; call rollout.generate()")
        if rollout.reward is not None and not math.isfinite(rollout.reward):
            return rollout.sample(failure=f"{where}: its reward {rollout.reward} is not finite")
        return rollout.sample()
