"""Parity: the same tokens through every schedule an engine or a trainer may choose, compared bit by bit.

Legend: S = sequences, L = tokens of one sequence, T = tokens of one forward, Hkv = key/value heads, D = head size.

The yardstick is each sequence alone in one training forward on one thread. Against it: packed training forwards with and
without shared prompts, chunked prefill, cached prefixes, paged decode in batches of many sizes, and random mixtures of all.
Any model with the decoder's three methods can be measured, so a negative control is the same call with another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from miles_kernels.nn.config import MOE_FAMILIES, DecoderConfig, Family, RopeConfig
from miles_kernels.nn.decoder import KVStore, PackedKV
from miles_kernels.ops.attention import AttentionPlan, Segment, decode_plan, packed_plan, plan_attention, table_plan
from miles_kernels.ops.logprob import LogprobOutput, logprob_from_logits
from miles_kernels.probe import threads

Steps = Iterator[list[tuple[int, int]]]
"""Per engine step, how many tokens each named sequence advances."""


class Model(Protocol):
    """What parity needs of a decoder."""

    config: DecoderConfig

    def __call__(self, token_ids: Tensor, positions: Tensor, kv: KVStore) -> Tensor:
        """Hidden states [T, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] fp32: the engine's side."""
        ...

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> LogprobOutput:
        """The trainer's side."""
        ...


def tiny_config(family: Family, *, tie_word_embeddings: bool = False) -> DecoderConfig:
    """A two-layer model whose vocabulary is longer than one log-probability chunk."""
    moe: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    glm: dict[str, Any] = {"first_k_dense_replace": 1, "shared_intermediate_size": 64, "n_group": 4, "topk_group": 2}
    glm |= {"use_qk_norm": True, "routed_scaling_factor": 1.5, "rope": RopeConfig(partial_rotary_factor=0.5)}
    return DecoderConfig(
        family=family,
        vocab_size=4500,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=family in ("qwen2", "glm4_moe"),
        **(moe if family in MOE_FAMILIES else {}),
        **(glm if family == "glm4_moe" else {}),
    )


@dataclass(frozen=True)
class Workload:
    """S sequences in groups that share a prompt; `tokens[s]` is prompt and completion."""

    tokens: tuple[Tensor, ...]
    prompt_lens: tuple[int, ...]
    leaders: tuple[int, ...]
    """The first sequence of each one's group; its own index for the first itself."""
    temperature: tuple[float, ...]

    @property
    def offsets(self) -> list[int]:
        """Where each sequence begins in flat results, and the total."""
        out = [0]
        for tokens in self.tokens:
            out.append(out[-1] + len(tokens))
        return out

    @classmethod
    def random(cls, vocab: int, seed: int, *, groups: int = 8, group_size: int = 8) -> Workload:
        """Prompts of 1 to 30 tokens and one longer than a key block of 128; completions of 1 to 10."""
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        lengths = [139, 1] + [number(2, 30) for _ in range(groups)]
        tokens, prompt_lens, leaders, temperature = [], [], [], []
        for group in range(groups):
            prompt = torch.randint(vocab, (lengths[group],), generator=generator)
            leader = len(tokens)
            for _ in range(group_size):
                tokens.append(torch.cat((prompt, torch.randint(vocab, (number(1, 10),), generator=generator))))
                prompt_lens.append(len(prompt))
                leaders.append(leader)
                temperature.append((1.0, 0.7, 1.3)[number(0, 2)])
        return cls(tuple(tokens), tuple(prompt_lens), tuple(leaders), tuple(temperature))


class Trace:
    """What a schedule computed, flat over all sequences: hidden states, and log p of each next token."""

    def __init__(self, work: Workload, hidden_size: int, dtype: torch.dtype) -> None:
        self.work, self.offsets = work, work.offsets
        total = self.offsets[-1]
        self.token_ids = torch.cat(work.tokens)
        self.targets = self.token_ids.roll(-1)  # the last token of a sequence predicts some token, always the same
        self.temperature = torch.cat([torch.full((len(t),), x) for t, x in zip(work.tokens, work.temperature, strict=True)])
        self.hidden = torch.zeros(total, hidden_size, dtype=dtype)
        self.logprob = torch.zeros(total)
        self.known = torch.zeros(total, dtype=torch.bool)

    def rows(self, seq: int, start: int, stop: int) -> Tensor:
        """Flat indices of positions start .. stop of a sequence."""
        return torch.arange(self.offsets[seq] + start, self.offsets[seq] + stop)

    def put(self, rows: Tensor, hidden: Tensor, logprob: Tensor) -> None:
        """Record results; a position computed twice must not be."""
        assert not self.known[rows].any(), "a schedule computed a position twice"
        self.hidden[rows], self.logprob[rows], self.known[rows] = hidden.detach(), logprob.detach(), True


class SlotStore:
    """A paged cache for tests: pools [Hkv, N, D] per layer, written at the slots of the current step."""

    def __init__(self, config: DecoderConfig, num_slots: int, dtype: torch.dtype) -> None:
        shape = (config.num_key_value_heads, num_slots, config.head_dim)
        self.pools = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(config.num_hidden_layers)]
        self.plan = AttentionPlan((), 0)
        self.slots = torch.empty(0, dtype=torch.int64)

    def begin(self, plan: AttentionPlan, slots: Tensor) -> None:
        """The next forward attends by `plan` and writes to `slots` [T]."""
        self.plan, self.slots = plan, slots

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [T, Hkv, D]; return the layer's pools."""
        k_pool, v_pool = self.pools[layer]
        k_pool[:, self.slots], v_pool[:, self.slots] = k.transpose(0, 1), v.transpose(0, 1)
        return k_pool, v_pool

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's pools and the slots of the current step."""
        return *self.pools[layer], self.slots


def run_packed(model: Model, work: Workload, order: Sequence[int], *, per_forward: int, share_prompts: bool) -> Trace:
    """Training forwards (with autograd) of `per_forward` sequences each, in `order`; prompts once per group if shared."""
    trace = _trace(model, work)
    for start in range(0, len(order), per_forward):
        chosen = list(order[start : start + per_forward])
        pieces, parents, rows, places = [], [], [], []
        prompt_at: dict[int, tuple[int, int]] = {}  # leader -> (piece, first packed token) of its group's prompt
        length = 0
        for seq in chosen:
            prompt = work.prompt_lens[seq] if share_prompts else 0
            parent = -1
            if prompt:
                leader = work.leaders[seq]
                if leader not in prompt_at:
                    prompt_at[leader] = (len(pieces), length)
                    pieces.append(work.tokens[seq][:prompt])
                    parents.append(-1)
                    length += prompt
                parent, first = prompt_at[leader]
                places.append(torch.arange(first, first + prompt))
            rest = work.tokens[seq][prompt:]
            places.append(torch.arange(length, length + len(rest)))
            pieces.append(rest)
            parents.append(parent)
            length += len(rest)
            rows.append(trace.rows(seq, 0, len(work.tokens[seq])))
        plan, positions = packed_plan([len(p) for p in pieces], parents)
        with torch.enable_grad():
            hidden = model(torch.cat(pieces), positions, PackedKV(plan)).index_select(0, torch.cat(places))
            flat = torch.cat(rows)
            out = model.logprob(hidden, trace.targets[flat], trace.temperature[flat])
        trace.put(flat, hidden, out.logprob)
    return trace


def run_paged(
    model: Model, work: Workload, steps: Steps, *, seed: int, page_size: int = 16, cached_prefix: bool = False
) -> Trace:
    """Engine steps over a paged cache with shuffled physical pages.

    With `cached_prefix` the group leaders' prompts are computed first, and the others start on the leader's pages.
    """
    trace = _trace(model, work)
    generator = torch.Generator().manual_seed(seed)
    longest = -(-max(len(t) for t in work.tokens) // page_size)
    pages = torch.randperm(len(work.tokens) * longest, generator=generator).view(len(work.tokens), longest)
    table = (pages[:, :, None] * page_size + torch.arange(page_size)).view(len(work.tokens), -1)
    done = [0] * len(work.tokens)
    store = SlotStore(model.config, table.numel(), trace.hidden.dtype)
    with torch.inference_mode():
        if cached_prefix:
            leaders = sorted(set(work.leaders))
            _step(model, trace, store, table, done, [(seq, work.prompt_lens[seq]) for seq in leaders])
            for seq, leader in enumerate(work.leaders):
                if seq != leader:  # whole pages only, and the last prompt token is computed for its logits
                    done[seq] = (work.prompt_lens[seq] - 1) // page_size * page_size
                    table[seq, : done[seq]] = table[leader, : done[seq]]
        for step in steps:
            capped = [(seq, min(count, len(work.tokens[seq]) - done[seq])) for seq, count in step]
            advance = [(seq, count) for seq, count in capped if count > 0]
            if advance:
                _step(model, trace, store, table, done, advance)
    return trace


def _step(model: Model, trace: Trace, store: SlotStore, table: Tensor, done: list[int], advance: list[tuple[int, int]]) -> None:
    """One engine step; plans through the three planners an engine may use."""
    assert len({seq for seq, _ in advance}) == len(advance), "a step names a sequence twice"
    seqs, counts = torch.tensor([seq for seq, _ in advance]), torch.tensor([count for _, count in advance])
    firsts = torch.tensor([done[seq] for seq, _ in advance])
    starts = counts.cumsum(0) - counts
    length = int(counts.sum())
    owner = torch.repeat_interleave(seqs, counts)
    positions = torch.arange(length) + torch.repeat_interleave(firsts - starts, counts)
    if length == len(advance):
        plan = decode_plan(table[seqs], firsts + 1)
    elif length % 2:
        runs = zip(seqs.tolist(), starts.tolist(), counts.tolist(), firsts.tolist(), strict=True)
        plan = plan_attention([Segment(start, n, first, table[seq, : first + n]) for seq, start, n, first in runs])
    else:
        plan = table_plan(table[seqs], counts.tolist(), firsts.tolist())
    for seq, count in advance:
        done[seq] += count
    rows = torch.tensor(trace.offsets)[owner] + positions
    store.begin(plan, table[owner, positions])
    hidden = model(trace.token_ids[rows], positions, store)
    trace.put(rows, hidden, logprob_from_logits(model.logits(hidden), trace.targets[rows], trace.temperature[rows]).logprob)


def _trace(model: Model, work: Workload) -> Trace:
    dtype = next(model.parameters()).dtype  # type: ignore[attr-defined]
    return Trace(work, model.config.hidden_size, dtype)


def decode_steps(work: Workload, order: Sequence[int], batch: int, *, from_start: bool = False) -> Steps:
    """Prompts whole (or token by token), then one token per step for `batch` sequences at a time."""
    for start in range(0, len(order), batch):
        running = order[start : start + batch]
        if not from_start:
            yield [(seq, work.prompt_lens[seq]) for seq in running]
        for _ in range(max(len(work.tokens[seq]) for seq in running)):
            yield [(seq, 1) for seq in running]


def cached_decode_steps(work: Workload, order: Sequence[int], batch: int) -> Steps:
    """The uncached rest of each prompt, then decode."""
    for start in range(0, len(order), batch):
        running = order[start : start + batch]
        yield [(seq, 1 if seq == work.leaders[seq] else work.prompt_lens[seq]) for seq in running]
        for _ in range(max(len(work.tokens[seq]) for seq in running)):
            yield [(seq, 1) for seq in running]


def chunked_steps(work: Workload, order: Sequence[int], batch: int, chunk: int) -> Steps:
    """Every sequence in chunks of `chunk` tokens, `batch` sequences per step."""
    for start in range(0, len(order), batch):
        running = order[start : start + batch]
        for _ in range(-(-max(len(work.tokens[seq]) for seq in running) // chunk)):
            yield [(seq, chunk) for seq in running]


def random_steps(work: Workload, seed: int) -> Steps:
    """Continuous batching at its wildest: random subsets in random order, decoding mixed with chunks of any size."""
    generator = torch.Generator().manual_seed(seed)
    left = [len(tokens) for tokens in work.tokens]
    while any(left):
        alive = [seq for seq, count in enumerate(left) if count]
        size = int(torch.randint(1, min(64, len(alive)) + 1, (), generator=generator))
        step = []
        for index in torch.randperm(len(alive), generator=generator)[:size].tolist():
            count = int(torch.randint(-60, 60, (), generator=generator))
            step.append((alive[index], min(max(count, 1), left[alive[index]])))
        for seq, count in step:
            left[seq] -= count
        yield step


@dataclass(frozen=True)
class ParityRow:
    """One schedule against the yardstick. `max_abs` is over log-probabilities."""

    schedule: str
    num_threads: int
    num_tokens: int
    unequal_logprob: int
    unequal_hidden: int
    max_abs: float

    @property
    def equal(self) -> bool:
        """Whether every token agreed bitwise, in hidden state and log-probability."""
        return self.unequal_logprob == self.unequal_hidden == 0


def compare(trace: Trace, yardstick: Trace, schedule: str, num_threads: int) -> ParityRow:
    """Count tokens whose hidden state or log-probability differs in any bit (NaN counts as unequal)."""
    rows = trace.known
    assert bool(rows.any()) and bool(yardstick.known.all())
    logprob = ~(trace.logprob[rows] == yardstick.logprob[rows])
    hidden = ~(trace.hidden[rows] == yardstick.hidden[rows]).all(-1)
    largest = (trace.logprob[rows] - yardstick.logprob[rows]).abs().max().item()
    return ParityRow(schedule, num_threads, int(rows.sum()), int(logprob.sum()), int(hidden.sum()), largest)


def schedules(model: Model, work: Workload, seed: int) -> dict[str, Callable[[], Trace]]:
    """All schedules by name, each a call that runs it."""
    generator = torch.Generator().manual_seed(seed)
    count = len(work.tokens)
    order = torch.randperm(count, generator=generator).tolist()
    few = order[:3]
    longest = [0, *(seq for seq in few if seq != 0)]  # sequence 0 has the prompt that crosses a key block

    def cached(batch: int, page_size: int) -> Trace:
        steps = cached_decode_steps(work, order, batch)
        return run_paged(model, work, steps, seed=seed, page_size=page_size, cached_prefix=True)

    return {
        "packed": lambda: run_packed(model, work, order, per_forward=count, share_prompts=False),
        "packed, split": lambda: run_packed(model, work, order, per_forward=-(-count // 5), share_prompts=False),
        "packed, shared prompts": lambda: run_packed(model, work, order, per_forward=count, share_prompts=True),
        "packed, shared, split": lambda: run_packed(model, work, sorted(order), per_forward=-(-count // 3), share_prompts=True),
        "decode, batch 64": lambda: run_paged(model, work, decode_steps(work, order, 64), seed=seed),
        "decode, batch 17, page 1": lambda: run_paged(model, work, decode_steps(work, order, 17), seed=seed, page_size=1),
        "decode, batch 1": lambda: run_paged(model, work, decode_steps(work, few, 1), seed=seed),
        "decode from first token": lambda: run_paged(model, work, decode_steps(work, longest, 4, from_start=True), seed=seed),
        "chunks of 7": lambda: run_paged(model, work, chunked_steps(work, order, 32, 7), seed=seed),
        "chunks of 16, page 64": lambda: run_paged(model, work, chunked_steps(work, order, 21, 16), seed=seed, page_size=64),
        "chunks of 100": lambda: run_paged(model, work, chunked_steps(work, order, 64, 100), seed=seed),
        "cached prefix, batch 64": lambda: cached(64, 16),
        "cached prefix, batch 13, page 4": lambda: cached(13, 4),
        "random mixture": lambda: run_paged(model, work, random_steps(work, seed), seed=seed),
    }


def run_parity(model: Model, *, seed: int = 0, num_threads: Sequence[int] = (1, 2)) -> Iterator[ParityRow]:
    """Compare every schedule, with every thread count, with each sequence alone on one thread."""
    work = Workload.random(model.config.vocab_size, seed)
    alone = list(range(len(work.tokens)))
    with threads(1):
        yardstick = run_packed(model, work, alone, per_forward=1, share_prompts=False)
    for name, run in schedules(model, work, seed + 1).items():
        for count in num_threads:
            with threads(count):
                trace = run()
            yield compare(trace, yardstick, name, count)
