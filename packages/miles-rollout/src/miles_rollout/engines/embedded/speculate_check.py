"""Does speculation change anything? Requests of all kinds through engines with and without drafts, compared bit for bit.

`miles-spec verify-lossless` is this module's command. The model is tiny and random, so that the million tokens are cheap and
the distributions are far from sharp.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams
from miles_spec.draft import Draft, NgramDraft, SuffixDraft
from miles_spec.testing import MixedDraft, RandomDraft, ReplayDraft

TOKENIZER = CharTokenizer("abcdefghijklmnopqrst")
SHAPE = DecoderConfig(
    family="qwen3",
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=320,
    initializer_range=0.3,
)
DRAFTS = ("none", "ngram", "suffix", "random", "perfect", "nearly", "mixed", "swap")
"""Names of drafts; "nearly" errs at one token in five, "swap" changes the draft every few steps."""
Results = dict[str, GenerateResult]


@dataclass(frozen=True)
class Arm:
    """One way to serve: a draft, its length, and how much room there is."""

    draft: str
    num_draft: int
    adaptive: bool
    config: EmbeddedConfig

    def __str__(self) -> str:
        return f"{self.draft} x{self.num_draft}{' adaptive' if self.adaptive else ''}, {self.config.num_pages} pages"


@dataclass
class Report:
    """What was compared."""

    num_tokens: int = 0
    num_different: int = 0
    num_retractions: int = 0
    num_accepted: int = 0
    num_drafted: int = 0
    seconds: float = 0.0
    arms: set[str] = field(default_factory=set)
    differing: list[str] = field(default_factory=list)


def random_requests(rng: random.Random, count: int) -> list[GenerateRequest]:
    """Requests with all kinds of sampling, stop rules and lengths, some up to the context limit."""
    limit = SHAPE.max_position_embeddings
    common = tuple(rng.randrange(4, SHAPE.vocab_size) for _ in range(40))
    requests = []
    for i in range(count):
        ids = common[: rng.choice([0, 0, 16, 37])] + tuple(rng.randrange(4, SHAPE.vocab_size) for _ in range(rng.randint(1, 30)))
        room = limit - len(ids)
        new = room if rng.random() < 0.05 else rng.choice([1, 2, 5, 20, 40, 60])
        n = rng.choice([1, 1, 2, 4])
        sampling = SamplingParams(
            n=n,
            max_new_tokens=new,
            min_new_tokens=rng.choice([0, 0, min(new, 7)]),
            temperature=rng.choice([1.0, 1.0, 0.6, 0.3, 0.0]),
            top_k=rng.choice([-1, -1, -1, 4]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            stop=rng.choice([(), (), ("ab",), ("a", "fgh")]),
            stop_token_ids=rng.choice([(), (), (5, 9)]),
            ignore_eos=rng.random() < 0.6,
            seed=rng.randrange(2**40),
        )
        ids_of_samples = tuple(rng.randrange(2**50) for _ in range(n))
        wants = rng.random() < 0.2
        requests.append(
            GenerateRequest(
                request_id=f"r{i}", input_ids=ids, sampling=sampling, sample_ids=ids_of_samples, return_prompt_logprobs=wants
            )
        )
    return requests


def digest(results: Results) -> str:
    """A hash of all tokens, log-probability bits, texts and reasons, by request id."""
    total = hashlib.sha256()
    for name in sorted(results):
        result = results[name]
        for c in result.completions:
            total.update(repr((name, c.index, c.token_ids, c.text, c.finish_reason, c.matched_stop)).encode())
            total.update(np.asarray((c.logprobs, c.sampled_logprobs), np.float64).tobytes())
        total.update(np.asarray(result.prompt_logprobs or (), np.float64).tobytes())
    return total.hexdigest()


def serve(
    requests: Many[GenerateRequest],
    config: EmbeddedConfig,
    draft: Draft | None = None,
    between: Callable[[EngineCore, int], None] | None = None,
    *,
    model_seed: int = 0,
) -> tuple[Results, dict[str, float]]:
    """Results of all requests from one engine, and its metrics. `between(core, step)` runs before every step."""
    core = EngineCore(random_decoder(SHAPE, model_seed), TOKENIZER, config, num_pages=config.num_pages or 64, draft=draft)
    results: Results = {}
    with torch.inference_mode():
        for arrival, request in enumerate(requests):
            core.add(Job(request, arrival, frozenset(TOKENIZER.eos_token_ids)))
        step = 0
        while core.has_work:
            if between is not None:
                between(core, step)
            for job, item in core.step():
                if not isinstance(item, GenerateResult):
                    raise AssertionError(f"{job.request.request_id}: {item}")
                results[job.request.request_id] = item
            step += 1
    return results, core.metrics()


def sequences_of(requests: Many[GenerateRequest], results: Results) -> list[tuple[int, ...]]:
    """Prompt and completion of every completion."""
    return [r.input_ids + c.token_ids for r in requests for c in results[r.request_id].completions]


def run_arm(arm: Arm, requests: Many[GenerateRequest], reference: Results, seed: int = 0) -> tuple[Results, dict[str, float]]:
    """The same requests with an arm's draft."""
    config = msgspec.structs.replace(arm.config, draft_tokens=arm.num_draft, draft_adaptive=arm.adaptive)
    known = sequences_of(requests, reference)
    makers: dict[str, Callable[[], Draft | None]] = {
        "none": lambda: None,
        "ngram": NgramDraft,
        "suffix": SuffixDraft,
        "random": lambda: RandomDraft(SHAPE.vocab_size, seed),
        "perfect": lambda: ReplayDraft(known),
        "nearly": lambda: ReplayDraft(known, SHAPE.vocab_size, 0.2, seed),
    }
    if arm.draft in makers:
        return serve(requests, config, makers[arm.draft]())
    drafts = [draft for make in makers.values() if (draft := make()) is not None]
    if arm.draft == "mixed":
        return serve(requests, config, MixedDraft(drafts))

    def swap(core: EngineCore, step: int) -> None:
        assert core.speculator is not None
        if step % 3 == 0:
            core.speculator.use(drafts[step // 3 % len(drafts)])

    return serve(requests, config, drafts[0], swap)


def random_arms(rng: random.Random) -> Iterator[Arm]:
    """Every draft with every length and both kinds of control, over and over, in engines of all sizes."""
    while True:
        every = [(d, k, a) for d in DRAFTS for k in range(1, 9) for a in (False, True)]
        rng.shuffle(every)
        for draft, num_draft, adaptive in every:
            running = rng.choice([1, 4, 16])
            config = EmbeddedConfig(
                num_pages=rng.choice([20, 26, 64, 200]),
                max_running=running,
                max_batched_tokens=running + rng.choice([0, 8, 60, 400]),
                prefill_chunk=rng.choice([5, 64]),
                prefix_cache=rng.random() < 0.7,
            )
            yield Arm(draft, num_draft, adaptive, config)


def verify_lossless(
    num_tokens: int, seed: int = 0, arms_per_round: int = 8, report: Callable[[str], Any] = lambda line: None
) -> Report:
    """Compare engines with drafts against one without until `num_tokens` tokens were compared."""
    rng = random.Random(seed)
    arms, out, started = random_arms(rng), Report(), time.perf_counter()
    plain = EmbeddedConfig(num_pages=200, max_running=32, max_batched_tokens=512)
    while out.num_tokens < num_tokens:
        requests = random_requests(rng, 12)
        reference, _ = serve(requests, plain)
        expected = digest(reference)
        size = sum(len(c.token_ids) for result in reference.values() for c in result.completions)
        for _ in range(arms_per_round):
            arm = next(arms)
            results, metrics = run_arm(arm, requests, reference, rng.randrange(2**30))
            out.num_tokens += size
            out.arms.add(f"{arm.draft} x{arm.num_draft}{' adaptive' if arm.adaptive else ''}")
            out.num_retractions += int(metrics["num_retractions"])
            out.num_accepted += int(metrics.get("spec_num_accepted", 0))
            out.num_drafted += int(metrics.get("spec_num_drafted", 0))
            if digest(results) != expected:
                out.num_different += 1
                out.differing.append(str(arm))
                report(f"DIFFERENT: {arm}")
            if out.num_tokens >= num_tokens:
                break
    return replace(out, seconds=time.perf_counter() - started)


def main(num_tokens: int, seed: int = 0) -> int:
    """Print the comparison; exit code 1 when anything differs."""
    out = verify_lossless(num_tokens, seed, report=print)
    print(
        f"{out.num_tokens} tokens with drafts compared with plain decoding: {out.num_different} runs differ "
        f"({len(out.arms)} combinations of draft, length and control; {out.num_drafted} drafted, {out.num_accepted} accepted, "
        f"{out.num_retractions} retractions, {out.seconds:.0f} s)"
    )
    return 1 if out.num_different else 0
