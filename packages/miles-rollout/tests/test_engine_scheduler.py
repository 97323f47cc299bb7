"""Scheduler without a model: nothing is lost, budgets hold, the pool never leaks, and it always comes to an end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.pages import PagePool
from miles_rollout.engines.embedded.prefix import PrefixCache
from miles_rollout.engines.embedded.scheduler import Batch, Scheduler
from miles_rollout.engines.embedded.state import Job, Sequence
from miles_rollout.engines.embedded.tables import Tables
from miles_rollout.wire import GenerateRequest, SamplingParams

PAGE = 16


@dataclass
class Harness:
    """A scheduler driven by a fake model. `written[slot]` is the prefix of tokens whose key and value the slot holds."""

    config: EmbeddedConfig
    num_pages: int
    finished: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    num_computed: int = 0

    def __post_init__(self) -> None:
        self.pool = PagePool(self.num_pages)
        self.cache = PrefixCache(self.pool, PAGE, self.config.prefix_cache)
        self.tables = Tables(self.config.max_running, PAGE)
        self.scheduler = Scheduler(self.config, self.pool, self.cache, self.tables)
        self.written: dict[int, tuple[int, ...]] = {}

    def add(self, arrival: int, prompt: tuple[int, ...], new: int, n: int = 1) -> Job:
        request = GenerateRequest(request_id=str(arrival), input_ids=prompt, sampling=SamplingParams(max_new_tokens=new, n=n))
        job = Job(request, arrival, frozenset())
        self.scheduler.add(job)
        return job

    def compute(self, seq_tokens: tuple[int, ...], position: int, slot: int, row: int) -> None:
        self.num_computed += 1
        self.written[slot] = seq_tokens[: position + 1]
        seen = [self.written[s] for s in self.tables.slots[row, : position + 1].tolist()]
        assert seen == [seq_tokens[: p + 1] for p in range(position + 1)], "attention would read somebody else's keys"
        assert not self.tables.slots[row, position + 1 :].any(), "a slot is visible before it is written"

    def forward(self, batch: Batch) -> torch.Tensor:
        tables = self.tables
        by_row = {seq.row: seq for seq in self.scheduler.decoding}
        assert len(batch.rows) + sum(c.stop - c.start for c in batch.chunks) <= self.config.max_batched_tokens
        assert len(set(batch.rows.tolist())) == len(batch.rows)
        for row in batch.rows.tolist():
            seq, position = by_row[row], int(tables.position[row])
            assert position == seq.num_tokens - 1 < tables.capacity[row]
            assert tables.last_token[row] == seq.token_ids()[-1]
            slot = int(tables.slots_at(np.array([row]), np.array([position]))[0])
            assert slot == tables.slots_of(seq.pages, position, position + 1)[0]
            tables.slots[row, position] = slot
            self.compute(seq.token_ids(), position, slot, row)
        for chunk in batch.chunks:
            assert 0 < chunk.stop - chunk.start <= self.config.prefill_chunk
            slots = tables.slots_of(chunk.seq.pages, chunk.start, chunk.stop)
            assert chunk.seq.tokens.tolist() == list(chunk.seq.token_ids())
            for position, slot in zip(range(chunk.start, chunk.stop), slots.tolist(), strict=True):
                tables.slots[chunk.seq.row, position] = slot
                self.compute(chunk.seq.token_ids(), position, slot, chunk.seq.row)
        return torch.zeros(len(batch.rows) + sum(c.is_last for c in batch.chunks), 4)

    def step(self) -> None:
        scheduler = self.scheduler
        batch = scheduler.schedule()
        logits = self.forward(batch)
        scheduler.advance(batch, logits)
        forks = scheduler.fork()
        for source, target, count in scheduler.take_copies():
            for i in range(count):
                self.written[target * PAGE + i] = self.written[source * PAGE + i]
        rows = scheduler.decode_rows()
        assert [seq.row for seq in scheduler.decoding] == rows.tolist()
        assert scheduler.num_running <= self.config.max_running
        assert len(rows) == len(logits) + sum(len(fork.siblings) for fork in forks)
        assert len(rows) or not batch.is_empty or scheduler.unblock(), "nothing can move"
        for seq in list(scheduler.decoding):
            assert self.tables.position[seq.row] == seq.num_tokens
            self.append(seq)

    def append(self, seq: Sequence) -> None:
        token = hash((seq.token_ids(), seq.sample_id)) % 3
        seq.output.append(token)
        self.tables.last_token[seq.row] = token
        if len(seq.output) == seq.job.request.sampling.max_new_tokens:
            seq.finish_reason = "length"
            self.scheduler.finish(seq)
            self.finished[seq.order] = seq.output

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "not finished"
        assert self.pool.num_owned == 0, "pages leaked"
        assert not self.tables.slots.any() and self.tables.num_free == self.config.max_running
        assert not np.any(self.tables.capacity)


def expected(prompt: tuple[int, ...], new: int, sample_id: int) -> list[int]:
    """What the fake model samples, without an engine."""
    output: list[int] = []
    for _ in range(new):
        output.append(hash((prompt + tuple(output), sample_id)) % 3)
    return output


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_everything_finishes_with_the_right_tokens_under_any_budget(seed: int):
    rng = random.Random(seed)
    max_running = rng.randint(1, 8)
    config = EmbeddedConfig(
        max_running=max_running,
        max_batched_tokens=max_running + rng.choice([0, 3, 20, 200]),
        prefill_chunk=rng.choice([1, 7, 16, 64]),
        prefix_cache=rng.random() < 0.7,
    )
    jobs = []
    shared = tuple(rng.randrange(3) for _ in range(40))
    for arrival in range(rng.randint(1, 10)):
        own = tuple(rng.randrange(3) for _ in range(rng.randint(1, 40)))
        prompt = shared[: rng.choice([0, 16, 32, 40])] + own
        jobs.append((arrival, prompt, rng.randint(1, 40), rng.randint(1, 5)))
    need = max(-(-(len(prompt) + new - 1) // PAGE) for _, prompt, new, _ in jobs)
    harness = Harness(config, need + rng.choice([0, 0, 1, 4, 100]))
    queue = list(jobs)
    while queue or harness.scheduler.has_work:
        while queue and rng.random() < 0.6:
            harness.add(*queue.pop(0))
        if rng.random() < 0.05:
            harness.scheduler.retract_all()
            harness.written.clear()
        if harness.scheduler.has_work:
            harness.step()
    harness.run()
    for arrival, prompt, new, n in jobs:
        for index in range(n):
            assert harness.finished[(arrival, index)] == expected(prompt, new, index)


def test_siblings_share_one_prefill_and_copy_only_the_partial_page():
    harness = Harness(EmbeddedConfig(max_running=8, prefix_cache=False), num_pages=100)
    harness.add(0, tuple(range(40)), new=1, n=8)
    harness.step()
    assert harness.num_computed == 40
    assert not harness.scheduler.has_work and harness.pool.num_owned == 0


def test_siblings_without_a_row_start_later_from_the_held_prompt():
    harness = Harness(EmbeddedConfig(max_running=2, max_batched_tokens=64, prefix_cache=False), num_pages=100)
    harness.add(0, tuple(range(40)), new=3, n=6)
    harness.run()
    assert harness.num_computed == 40 + 6 * 2, "the prompt once, and all but the last token of each completion"


def test_prompts_that_start_alike_compute_the_common_pages_once():
    harness = Harness(EmbeddedConfig(max_running=16), num_pages=100)
    common = tuple(range(48))
    for arrival in range(8):
        harness.add(arrival, (*common, arrival), new=1)
    harness.run()
    assert harness.num_computed == 48 + 8
    assert harness.scheduler.num_cached_tokens == 7 * 48


def test_without_room_the_youngest_gives_way_and_the_oldest_never_does():
    harness = Harness(EmbeddedConfig(max_running=4, prefix_cache=False), num_pages=6)
    jobs = [harness.add(arrival, tuple(range(10)), new=60) for arrival in range(3)]
    seen = []
    while harness.scheduler.has_work:
        harness.step()
        seen.append(tuple(job.sequences[0].row >= 0 for job in jobs))
        if not jobs[0].sequences[0].finish_reason:
            assert seen[-1][0], "the oldest was retracted"
    assert harness.scheduler.num_retractions > 0
    assert [len(job.sequences[0].output) for job in jobs] == [60, 60, 60]


def test_long_prefill_does_not_stop_decoding():
    harness = Harness(EmbeddedConfig(max_running=4, max_batched_tokens=16, prefill_chunk=16), num_pages=100)
    first = harness.add(0, (1, 2), new=30)
    harness.step()
    harness.add(1, tuple(range(100)), new=1)
    for i in range(5):
        harness.step()
        assert len(first.sequences[0].output) == 2 + i


def test_finish_takes_out_waiting_and_running_sequences():
    harness = Harness(EmbeddedConfig(max_running=1), num_pages=100)
    jobs = [harness.add(arrival, tuple(range(20)), new=10, n=2) for arrival in range(2)]
    harness.step()
    for job in jobs:
        for seq in job.sequences:
            seq.finish_reason = "abort"
            harness.scheduler.finish(seq)
    harness.run()
    assert all(job.hold is None and job.leader is None for job in jobs)


def test_rows_that_move_on_while_pages_are_sought_get_pages_too():
    """Without a page for one row, what is on its way is taken in: it may bring another row to the end of its own pages."""
    config = EmbeddedConfig(max_running=4, max_batched_tokens=64, prefix_cache=False)
    pool, tables = PagePool(8), Tables(4, PAGE)
    held: list[int] = []
    moved: list[int] = []

    def settle() -> bool:
        if moved or not held:
            return False
        moved.append(first.row)
        tables.position[first.row] += 2  # it had two draft tokens accepted
        pool.release(held[:2])
        return True

    scheduler = Scheduler(config, pool, PrefixCache(pool, PAGE, False), tables, None, settle)
    jobs = [
        Job(GenerateRequest(request_id=str(i), input_ids=(5,) * size, sampling=SamplingParams(max_new_tokens=40)), i, frozenset())
        for i, size in enumerate((13, PAGE))
    ]
    for job in jobs:
        scheduler.add(job)
    first, second = (job.sequences[0] for job in jobs)
    scheduler.advance(scheduler.schedule(), torch.zeros((2, 4)))
    held += pool.take(pool.num_available) or []
    scheduler.advance(Batch(np.array([first.row]), ahead=2), None)
    assert tables.position[first.row] == 14 and tables.position[second.row] == PAGE == tables.capacity[second.row]
    batch = scheduler.schedule()
    assert moved and set(batch.rows.tolist()) == {first.row, second.row}
    assert (tables.capacity[batch.rows] > tables.position[batch.rows]).all(), "a row computes a position it has no page for"


def test_a_row_in_new_hands_knows_no_pages_of_its_last_owner():
    tables = Tables(1, PAGE)
    job = Job(GenerateRequest(request_id="a", input_ids=(5,) * 20, sampling=SamplingParams(max_new_tokens=9)), 0, frozenset())
    seq = job.sequences[0]
    seq.pages = [3, 7]
    tables.open(seq)
    assert tables.slots_at(np.array([0]), np.array([17])).tolist() == [7 * PAGE + 1]
    tables.close(seq)
    assert not tables.pages.any() and not tables.slots.any()
