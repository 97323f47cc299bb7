"""What drafts did for a step's rollouts: counted by the engine, and by the engines of other arms that make them again.

An arm's engine has the policy's weights of the step and a draft of its own. Sampling is keyed, so it has to make the very tokens
the run has recorded; that is checked token by token and bit by bit of the log-probabilities, and its time and counts are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_core.draft.trainer import PREFIX, DraftingTrainer
from miles_core.feed import Feed, Portion
from miles_core.sync.inprocess import publish
from miles_kernels.contract import Contract
from miles_rollout.engine import Engine
from miles_rollout.wire import GenerateRequest, GenerateResult, Sample, SamplingParams

_COUNTS = {"steps": "spec_num_verified", "drafted": "spec_num_drafted", "accepted": "spec_num_accepted"}
SHARED = {"ours": "draft", "adaptive": "draft"}
"""Arms of the comparison that serve another arm's draft."""


@dataclass(frozen=True, kw_only=True)
class _View:
    """The policy with one arm's draft, as `publish` wants it."""

    trainer: DraftingTrainer
    arm: str

    @property
    def contract(self) -> Contract:
        return self.trainer.contract

    def export_weights(self) -> Iterator[tuple[str, Any]]:
        yield from self.trainer.inner.export_weights()
        if self.arm != "none":
            for name, tensor in self.trainer.draft_weights(SHARED.get(self.arm, self.arm)):
                yield PREFIX + name, tensor


class Comparison:
    """Makes the rollouts of some steps again, once per arm. `engines` has an engine for each, of weight version -1."""

    def __init__(
        self,
        trainer: DraftingTrainer,
        engines: Mapping[str, Engine],
        sampling: SamplingParams,
        every: int,
        most: int | None = None,
    ) -> None:
        self._trainer, self._engines, self._sampling = trainer, dict(engines), sampling
        self.every, self._most = every, most
        self.warm: set[str] = set()

    async def run(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics "draft/ARM/..." of a step that has been rolled out but not trained on."""
        requests, recorded = _requests(samples, self._sampling)
        if self._most is not None:
            requests = requests[: max(1, self._most // self._sampling.n)]
        found: dict[str, float] = {}
        for arm, engine in self._engines.items():
            await publish(_View(trainer=self._trainer, arm=arm), engine, 2 * step)  # type: ignore[arg-type]
            if arm not in self.warm:  # the first pass of an engine also compiles and captures
                await asyncio.gather(*(engine.generate(request) for request in requests))
                await publish(_View(trainer=self._trainer, arm=arm), engine, 2 * step + 1)  # type: ignore[arg-type]
                self.warm.add(arm)
            before, started = engine.metrics(), time.perf_counter()
            results = await asyncio.gather(*(engine.generate(request) for request in requests))
            seconds = time.perf_counter() - started
            tokens, unequal = _differences(results, recorded)
            found |= {f"draft/{arm}/{name}": value for name, value in accept_metrics(before, engine.metrics()).items()}
            found |= {
                f"draft/{arm}/rollout_s": seconds,
                f"draft/{arm}/rollout_tokens_per_s": tokens / seconds,
                f"draft/{arm}/tokens_unequal": float(unequal),
            }
        plain = found.get("draft/none/rollout_s")
        if plain is not None:
            found |= {f"draft/{arm}/speedup": plain / found[f"draft/{arm}/rollout_s"] for arm in self._engines if arm != "none"}
        return found


class ServedFeed:
    """Another feed, with what the engine's draft did for it. `wait` runs a coroutine to its end."""

    def __init__(
        self,
        feed: Feed,
        engine: Engine,
        trainer: DraftingTrainer | None,
        comparison: Comparison | None,
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
    ) -> None:
        self._feed, self._engine, self._trainer, self._comparison, self._wait = feed, engine, trainer, comparison, wait
        self._cost: float | None = None
        """Time of a step with drafts over one without, as of the last comparison."""

    def next(self, step: int) -> Portion | None:
        """The portion, its metrics with "draft/accept_length" and the like."""
        before = self._engine.metrics()
        portion = self._feed.next(step)
        after = self._engine.metrics()
        if portion is None:
            return None
        portion.metrics.update({f"draft/{name}": value for name, value in accept_metrics(before, after).items()})
        if self._trainer is not None:
            self._trainer.served = _difference(before, after)
        compared = self._comparison
        if compared is not None and portion.samples and (step == 1 or step % compared.every == 0):
            portion.metrics.update(self._wait(compared.run(step, portion.samples)))
            speedup, length = (portion.metrics.get(f"draft/ours/{name}") for name in ("speedup", "accept_length"))
            self._cost = length / speedup if speedup and length else self._cost
        if self._cost is not None and "draft/accept_length" in portion.metrics:
            portion.metrics["draft/speedup_estimate"] = portion.metrics["draft/accept_length"] / self._cost
        return portion

    def state(self) -> dict[str, Any]:
        """The other feed's."""
        return self._feed.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._feed.load_state(state)


def accept_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Accept length and draft length between two readings of an engine's counters; empty when nothing was drafted."""
    counts = _difference(before, after)
    if not counts["steps"]:
        return {}
    found = {
        "accept_length": 1.0 + counts["accepted"] / counts["steps"],
        "draft_length": counts["drafted"] / counts["steps"],
        "num_verified": counts["steps"],
    }
    return found | ({"accept_rate": counts["accepted"] / counts["drafted"]} if counts["drafted"] else {})


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after.get(key, 0.0) - before.get(key, 0.0) for name, key in _COUNTS.items()}


def _requests(samples: Sequence[Sample], sampling: SamplingParams) -> tuple[list[GenerateRequest], dict[int, Sample]]:
    """The requests that made the samples, and the samples by id."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    requests = []
    for group_id, members in groups.items():
        ids = sorted(sample.sample_id for sample in members)
        first = members[0]
        if len(ids) != sampling.n:
            raise ValueError(f"group {group_id} has {len(ids)} samples, a request makes {sampling.n}: it cannot be made again")
        requests.append(
            GenerateRequest(
                request_id=f"again-{group_id}",
                input_ids=first.token_ids[: first.loss_mask.index(True)],
                sampling=sampling,
                sample_ids=tuple(ids),
            )
        )
    return requests, {sample.sample_id: sample for sample in samples}


def _differences(results: Sequence[GenerateResult], recorded: Mapping[int, Sample]) -> tuple[int, int]:
    """Tokens made again, and how many of them differ from the record in token or in a bit of the log-probability."""
    tokens = unequal = 0
    for result in results:
        for completion in result.completions:
            sample = recorded[completion.sample_id]
            first = sample.loss_mask.index(True)
            ours, theirs = completion.token_ids, sample.token_ids[first:]
            tokens += len(ours)
            unequal += abs(len(ours) - len(theirs))
            pairs = zip(ours, theirs, completion.logprobs, sample.rollout_logprobs[first:], strict=False)
            unequal += sum(a != b or p != q for a, b, p, q in pairs)
    return tokens, unequal
