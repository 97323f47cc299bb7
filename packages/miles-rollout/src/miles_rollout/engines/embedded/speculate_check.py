"""Does speculation change anything? Requests of all kinds through engines with and without drafts, compared bit for bit.

`miles-spec verify-lossless` is this module's command. The model is tiny and random, so that the million tokens are cheap and
the distributions are far from sharp.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import CATCH_UP, EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Delivery, Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams
from miles_spec.draft import Draft, ForestDraft, NgramDraft, SuffixDraft
from miles_spec.models import DraftModel, Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft
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
DRAFTS = (
    "none", "ngram", "suffix", "random", "perfect", "nearly", "mixed", "forest", "mtp", "mtp tree", "mtp distinct", "eagle3",
    "eagle3 tree", "swap",
)  # fmt: skip
"""Names of drafts; "nearly" errs at one token in five, "forest" is a tree of several, "mtp distinct" has three layers, "swap"
changes the draft every few steps, and the weights of those that have any."""
TREES = ((2, 1), (3, 1, 1), (2, 2, 2), (4,), (1, 2, 1, 1))
_ENOUGH = 20
"""Runs that differ, after which there is nothing to add."""
Results = dict[str, GenerateResult]


@dataclass(frozen=True)
class World:
    """Where it is compared: the model's shape, the device, and how large a round is."""

    shape: DecoderConfig = SHAPE
    tokenizer: CharTokenizer = TOKENIZER
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    num_requests: int = 12

    def decoder(self, seed: int = 0) -> Decoder:
        """The policy with weights of `seed`."""
        contract = Contract.for_device(self.device, str(self.dtype).removeprefix("torch."))
        made = random_decoder(self.shape, seed, contract=contract, dtype=self.dtype, device=self.device)
        return made.requires_grad_(False)

    def model(self, name: str, policy: Decoder) -> DraftModel:
        """A draft model by the first word of its name: layers that start as the policy's last one, and 3 random ones."""
        ids = range(4, self.shape.vocab_size, 2)
        if name.startswith("eagle3"):
            config = Eagle3Config.of(self.shape, draft_vocab_size=len(ids))
            return Eagle3Draft.from_trunk(policy, config, draft_ids=ids).requires_grad_(False)
        if name == "mtp distinct":
            return MtpDraft.from_trunk(policy, MtpConfig.of(self.shape, num_layers=3, layout="mimo")).requires_grad_(False)
        return MtpDraft.from_trunk(policy).requires_grad_(False)


_CPU = World()


def world_of(device: str) -> World:
    """A tiny model in float32 on the CPU; on CUDA one in bfloat16 of the sizes its kernels are made for."""
    if device == "cpu":
        return World()
    if device != "cuda":
        raise ValueError(f"device {device!r} must be cpu or cuda")
    tokenizer = CharTokenizer("".join(chr(code) for code in range(97, 97 + 508)))
    shape = replace(SHAPE, vocab_size=tokenizer.vocab_size, hidden_size=256, intermediate_size=512, head_dim=64)
    return World(shape, tokenizer, "cuda", torch.bfloat16, 40)


@dataclass(frozen=True)
class Arm:
    """One way to serve: a draft, its length, and how much room there is."""

    draft: str
    num_draft: int
    adaptive: bool
    config: EmbeddedConfig
    shaken: bool = False
    """Everything running is sent back to the queue now and then."""

    def __str__(self) -> str:
        tree = f" {self.config.draft_tree}" if self.config.draft_tree else ""
        graphs = "" if not self.config.cuda_graphs else " graphs" if self.config.cuda_graph_drafts else " plain graphs"
        kind = f"{self.draft} x{self.num_draft}{tree}{' adaptive' if self.adaptive else ''}{graphs}{' shaken' * self.shaken}"
        room = f"{self.config.num_pages} pages, {self.config.max_running} rows"
        return f"{kind}, {room}, catching up: {self.config.draft_catch_up}"


@dataclass
class Report:
    """What was compared."""

    num_tokens: int = 0
    num_different: int = 0
    num_retractions: int = 0
    num_accepted: int = 0
    num_drafted: int = 0
    num_on_device: int = 0
    """Steps that drafted, verified and accepted on the device alone."""
    seconds: float = 0.0
    arms: set[str] = field(default_factory=set)
    differing: list[str] = field(default_factory=list)


def random_requests(rng: random.Random, count: int, shape: DecoderConfig = SHAPE) -> list[GenerateRequest]:
    """Requests with all kinds of sampling, stop rules and lengths, some up to the context limit."""
    limit, vocab = shape.max_position_embeddings, shape.vocab_size
    common = tuple(rng.randrange(4, vocab) for _ in range(40))
    requests = []
    for i in range(count):
        ids = common[: rng.choice([0, 0, 16, 37])] + tuple(rng.randrange(4, vocab) for _ in range(rng.randint(1, 30)))
        room = limit - len(ids)
        new = room if rng.random() < 0.05 else rng.choice([1, 2, 5, 20, 40, 60])
        n = rng.choice([1, 1, 2, 4])
        sampling = SamplingParams(
            n=n,
            max_new_tokens=new,
            min_new_tokens=rng.choice([0, 0, min(new, 7)]),
            temperature=rng.choice([1.0, 1.0, 0.6, 0.3, 0.0, 4.0]),
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


def unfiltered(request: GenerateRequest) -> GenerateRequest:
    """The same without what changes the policy's distribution: such rows can be drafted for on the device alone."""
    free = msgspec.structs.replace(request.sampling, top_k=-1, top_p=1.0, min_p=0.0, min_new_tokens=0)
    return msgspec.structs.replace(request, sampling=free)


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


def difference(results: Results, reference: Results) -> str:
    """How many completions differ, and where the first one does."""
    found = []
    for name in sorted(reference):
        for mine, theirs in zip(results[name].completions, reference[name].completions, strict=True):
            pairs = [(getattr(mine, part), getattr(theirs, part)) for part in ("token_ids", "logprobs", "sampled_logprobs")]
            places = [next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), None) for pair in pairs]
            if mine != theirs:
                found.append(f"{name}[{mine.index}] of {len(theirs.token_ids)}, from token, logprob, sampled logprob {places}")
        if results[name].prompt_logprobs != reference[name].prompt_logprobs:
            found.append(f"{name} prompt log-probabilities")
    return f"{len(found)} differ; " + "; ".join(found[:3])


def serve(
    requests: Many[GenerateRequest],
    config: EmbeddedConfig,
    draft: Draft | DraftModel | None = None,
    between: Callable[[EngineCore, int], list[Delivery]] | None = None,
    *,
    model_seed: int = 0,
    world: World = _CPU,
) -> tuple[Results, dict[str, float]]:
    """Results of all requests from one engine, and its metrics. `between(core, step)` runs before every step."""
    decoder, tokenizer = world.decoder(model_seed), world.tokenizer
    core = EngineCore(decoder, tokenizer, config, num_pages=config.num_pages or 64, draft=draft)
    results: Results = {}
    with torch.inference_mode():
        for arrival, request in enumerate(requests):
            core.add(Job(request, arrival, frozenset(tokenizer.eos_token_ids)))
        step = 0
        while core.has_work:
            ready = between(core, step) if between is not None else []
            for job, item in ready + core.step():
                if not isinstance(item, GenerateResult):
                    raise AssertionError(f"{job.request.request_id}: {item}")
                results[job.request.request_id] = item
            step += 1
    return results, core.metrics()


def sequences_of(requests: Many[GenerateRequest], results: Results) -> list[tuple[int, ...]]:
    """Prompt and completion of every completion."""
    return [r.input_ids + c.token_ids for r in requests for c in results[r.request_id].completions]


def run_arm(
    arm: Arm, requests: Many[GenerateRequest], reference: Results, seed: int = 0, world: World = _CPU
) -> tuple[Results, dict[str, float]]:
    """The same requests with an arm's draft."""
    config = msgspec.structs.replace(arm.config, draft_tokens=arm.num_draft, draft_adaptive=arm.adaptive)
    known, vocab, policy = sequences_of(requests, reference), world.shape.vocab_size, world.decoder()
    forest = ForestDraft([NgramDraft(1, 1), RandomDraft(vocab, seed), ReplayDraft(known, vocab, 0.2, seed)])
    made: dict[str, Callable[[], Draft | DraftModel | None]] = {
        "none": lambda: None,
        "ngram": NgramDraft,
        "suffix": SuffixDraft,
        "random": lambda: RandomDraft(vocab, seed),
        "perfect": lambda: ReplayDraft(known),
        "nearly": lambda: ReplayDraft(known, vocab, 0.2, seed),
        "forest": lambda: forest,
        **{name: functools.partial(world.model, name, policy) for name in DRAFTS if name.startswith(("mtp", "eagle3"))},
    }
    if arm.draft == "mixed":
        history = [make() for name, make in made.items() if not name.startswith(("none", "forest", "mtp", "eagle3"))]
        return serve(requests, config, MixedDraft(history), _between(arm, []), world=world)  # type: ignore[arg-type]
    if arm.draft != "swap":
        return serve(requests, config, made[arm.draft](), _between(arm, []), world=world)
    drafts = [draft for name in made if "tree" not in name and (draft := made[name]()) is not None]
    return serve(requests, config, drafts[seed % len(drafts)], _between(arm, drafts), world=world)


def _between(arm: Arm, drafts: list[Draft | DraftModel]) -> Callable[[EngineCore, int], list[Delivery]]:
    """What disturbs an engine between its steps: other drafts, other weights of the draft, and an emptied batch."""

    def disturb(core: EngineCore, step: int) -> list[Delivery]:
        if drafts and step % 3 == 0:
            assert core.speculator is not None
            draft = drafts[step // 3 % len(drafts)]
            core.speculator.use(draft)
            if isinstance(draft, DraftModel):
                draft.load_named([(n, t * 1.01 if t.is_floating_point() else t) for n, t in draft.named_state()])
                core.speculator.forget()
        return core.retract_all() if arm.shaken and step in (5, 12, 40, 100) else []

    return disturb


def random_arms(rng: random.Random, world: World = _CPU, part: tuple[int, int] = (0, 1)) -> Iterator[Arm]:
    """Every draft with every length and both kinds of control, over and over, in engines of all sizes.

    `part` (i, n) leaves all but every n-th combination from the i-th to other processes.
    """
    on_cpu = world.device == "cpu"
    while True:
        every = [(d, k, a) for d in DRAFTS for k in range(1, 9) for a in (False, True)]
        every = every[part[0] :: part[1]]
        rng.shuffle(every)
        for draft, num_draft, adaptive in every:
            running = rng.choice([1, 4, 16] if on_cpu else [16, 48, 64])
            config = EmbeddedConfig(
                num_pages=rng.choice([20, 26, 64, 200] if on_cpu else [60, 200, 800]),
                max_running=running,
                max_batched_tokens=running + rng.choice([0, 8, 60, 400] if on_cpu else [60, 400, 1000]),
                prefill_chunk=rng.choice([5, 64]),
                prefix_cache=rng.random() < 0.7,
                draft_tree=rng.choice(TREES) if draft.endswith("tree") else (),
                cuda_graphs=rng.random() < 0.8,
                cuda_graph_drafts=rng.random() < 0.7,
                draft_catch_up=rng.choice(CATCH_UP),
            )
            yield Arm(draft, num_draft, adaptive, config, rng.random() < 0.15)


def verify_lossless(
    num_tokens: int,
    seed: int = 0,
    arms_per_round: int = 8,
    report: Callable[[str], Any] = lambda line: None,
    *,
    world: World = _CPU,
    seconds: float = 1e9,
    part: tuple[int, int] = (0, 1),
) -> Report:
    """Compare engines with drafts against one without until `num_tokens` tokens were compared, or `seconds` have passed.

    Every other round of requests samples without filters; parts begin with one kind or the other. A run that ends in an error
    differs, too. `part` is that of `random_arms`.
    """
    rng = random.Random(seed)
    arms, out, started = random_arms(rng, world, part), Report(), time.perf_counter()
    plain = EmbeddedConfig(num_pages=200 if world.device == "cpu" else 2000, max_running=32, max_batched_tokens=512)
    for number in itertools.count():
        if out.num_tokens >= num_tokens or time.perf_counter() - started > seconds or out.num_different >= _ENOUGH:
            break
        requests = random_requests(rng, world.num_requests, world.shape)
        requests = [unfiltered(request) for request in requests] if (number + part[0]) % 2 else requests
        reference, _ = serve(requests, plain, world=world)
        expected = digest(reference)
        size = sum(len(c.token_ids) for result in reference.values() for c in result.completions)
        for _ in range(arms_per_round):
            arm = next(arms)
            out.arms.add(f"{arm.draft} x{arm.num_draft}{' adaptive' if arm.adaptive else ''}")
            try:
                results, metrics = run_arm(arm, requests, reference, rng.randrange(2**30), world)
            except AssertionError as error:
                out.num_different += 1
                out.differing.append(f"{arm}: {error}")
                report(f"FAILED: {arm}: {error}")
                continue
            out.num_tokens += size
            out.num_retractions += int(metrics["num_retractions"])
            out.num_accepted += int(metrics.get("spec_num_accepted", 0))
            out.num_drafted += int(metrics.get("spec_num_drafted", 0))
            out.num_on_device += int(metrics.get("spec_num_on_device", 0))
            if digest(results) != expected:
                out.num_different += 1
                out.differing.append(f"{arm}: {difference(results, reference)}")
                report(f"DIFFERENT: {out.differing[-1]}")
            if out.num_tokens >= num_tokens or time.perf_counter() - started > seconds:
                break
        report(f"round {number + 1}: {out.num_tokens} tokens compared so far, {out.num_different} runs differ")
    return replace(out, seconds=time.perf_counter() - started)


def main(num_tokens: int, seed: int = 0, device: str = "cpu", seconds: float = 1e9, part: tuple[int, int] = (0, 1)) -> int:
    """Print the comparison; exit code 1 when anything differs."""
    show = functools.partial(print, flush=True)
    out = verify_lossless(num_tokens, seed, report=show, world=world_of(device), seconds=seconds, part=part)
    print(
        f"{out.num_tokens} tokens with drafts compared with plain decoding: {out.num_different} runs differ "
        f"({len(out.arms)} combinations of draft, length and control; {out.num_drafted} drafted, {out.num_accepted} accepted, "
        f"{out.num_on_device} steps on the device alone, {out.num_retractions} retractions, {out.seconds:.0f} s)"
    )
    return 1 if out.num_different else 0
