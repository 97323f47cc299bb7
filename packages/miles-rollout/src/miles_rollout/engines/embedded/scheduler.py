"""Who computes what in the next step: continuous batching, chunked prefill, admission, retraction.

Order is (arrival, index) everywhere: the oldest are served first, the youngest give way. None of it changes a result:
every token is a pure function of its own sequence.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.pages import PagePool
from miles_rollout.engines.embedded.prefix import PrefixCache
from miles_rollout.engines.embedded.speculate import Speculator
from miles_rollout.engines.embedded.state import Job, PromptHold, Sequence
from miles_rollout.engines.embedded.tables import Tables


@dataclass(frozen=True)
class Chunk:
    """Positions [start, stop) of a sequence that is being prefilled."""

    seq: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the next token can be sampled after this chunk."""
        return self.stop == self.seq.num_tokens


@dataclass(frozen=True)
class Batch:
    """One forward pass: each decoding row's last token and its draft tokens, then the chunks' tokens."""

    rows: np.ndarray
    """[R] int64, rows of the decoding sequences."""
    chunks: list[Chunk] = field(default_factory=list)
    drafts: Drafts | None = None
    """None when no row has any."""
    ahead: int = 0
    """Tokens that the device drafts for each decoding row by itself, 0 for none; `drafts` is None then."""
    unsure: np.ndarray | None = None
    """[R] bool, with `ahead`: rows whose position only the device knows; None: all, as `goes_on` says."""
    goes_on: bool = False
    """With `ahead`: the rows are those of the step before, which was such a step as well, and nothing came between."""
    reach: int = 0
    """With `ahead`: positions below this may be touched."""

    @property
    def num_decode_tokens(self) -> int:
        """Tokens of the decoding rows."""
        return len(self.rows) * (1 + self.ahead) + (0 if self.drafts is None else len(self.drafts.tokens))

    @property
    def is_empty(self) -> bool:
        """Nothing to compute."""
        return not len(self.rows) and not self.chunks


@dataclass(frozen=True)
class Fork:
    """Siblings that start from a computed prompt in this step, and its logits [1, V]."""

    logits: torch.Tensor
    siblings: list[Sequence]


_NO_ROWS: np.ndarray = np.zeros(0, np.int64)
_NOBODY: np.ndarray = np.zeros(0, np.int64)
"""Rows that no step has: compared by identity."""


def _nothing_in_flight() -> bool:
    return False


class Scheduler:
    """Moves sequences between waiting, prefilling and decoding, and pages between them.

    It may be one step ahead of the tokens the host has seen: positions count what was started, outputs what has arrived.
    Before a running sequence gives way, `settle` takes in what is on its way and says whether there was any; that may end a
    sequence and spare the other.
    """

    def __init__(
        self,
        config: EmbeddedConfig,
        pool: PagePool,
        cache: PrefixCache,
        tables: Tables,
        speculator: Speculator | None = None,
        settle: Callable[[], bool] = _nothing_in_flight,
    ) -> None:
        self._config = config
        self.most_tokens = config.max_batched_tokens
        """Of one pass. Shrinks when the device had no room for so many."""
        self._settle = settle
        self._pool = pool
        self._cache = cache
        self._tables = tables
        self._speculator = speculator
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self._rows = _NO_ROWS
        self._rows_stale = False
        self._unsure = np.zeros(config.max_running, np.int64)
        """The use of a row whose last step was made on the device alone, 0 for others: `position` may be behind by `_reach`."""
        self._reach = 0
        self._limits, self._bound, self._bound_at = _NO_ROWS, 0, -1
        """Of `_ahead_rows`: positions never computed, and those all pages hold when `Tables.num_changes` was `_bound_at`."""
        self._ahead_rows, self._ahead_of = _NOBODY, 0
        """Rows of the last step, if it was made on the device alone, and the generation of the draft it was made with."""
        self._slack, self._slack_rows = 0, _NO_ROWS
        """Steps until the first of `_slack_rows` needs a page or has all its tokens started."""
        self._holders: list[Job] = []
        self._copies: list[tuple[int, int, int]] = []
        self.num_retractions = 0
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.num_running)

    @property
    def num_running(self) -> int:
        """Sequences that own a row."""
        return self._config.max_running - self._tables.num_free

    def add(self, job: Job) -> None:
        """Queue all completions of a request."""
        self.waiting.extend(job.sequences)

    def schedule(self) -> Batch:
        """The next forward pass: every sequence with a token left to start, then as much prefill as the budget allows."""
        self._give_room_to_decode()
        budget = max(0, self.most_tokens - len(self.decoding))
        drafts, ahead = self._draft(budget)
        budget -= len(self.decoding) * ahead if drafts is None else len(drafts.tokens)
        chunks: list[Chunk] = []
        if self.prefilling or self.waiting:
            for seq in self.prefilling:
                budget -= self._cut_chunk(seq, budget, chunks)
            self._admit(budget, chunks)
        rows = self.decode_rows()
        if not ahead:
            return Batch(rows, chunks, drafts)
        goes_on = rows is self._ahead_rows
        return Batch(rows, chunks, None, ahead, None if goes_on else self._is_unsure(rows), goes_on, self._bound)

    def advance(self, batch: Batch, logits: torch.Tensor | None) -> None:
        """Note what `batch` computed; `logits` [decode tokens + finished chunks, V] follow the decode tokens, then the chunks."""
        self._tables.position[batch.rows] += 1
        if batch.ahead:
            if batch.rows is not self._ahead_rows:
                self._unsure[batch.rows] = self._tables.tail.serial[batch.rows]
                self._ahead_rows = batch.rows
            self._reach, self._slack = batch.ahead, 0  # rows may move on by more than one position
            return
        if len(batch.rows):
            self._ahead_rows = _NOBODY
        if batch.drafts is not None:
            self._slack = 0
        finished = batch.num_decode_tokens
        for chunk in batch.chunks:
            seq = chunk.seq
            seq.num_computed = chunk.stop
            while seq.claims and seq.claims[0][0] <= seq.num_computed:
                self._cache.mark_ready(seq.claims.pop(0)[1])
            if chunk.is_last:
                assert logits is not None
                self._finish_prefill(seq, logits[finished : finished + 1])
                finished += 1

    @property
    def has_held(self) -> bool:
        """Whether `fork` has anything to look at."""
        return bool(self._holders)

    def fork(self) -> list[Fork]:
        """Start siblings of computed prompts, as rows and pages allow; they sample their first token in this step."""
        forks: list[Fork] = []
        for job in list(self._holders):
            hold = job.hold
            assert hold is not None
            started = []
            for seq in _fresh(job):
                if self._tables.num_free == 0 or not self._fork_pages(seq, hold):
                    break
                self._start_decoding(seq)
                started.append(seq)
            if started:
                forks.append(Fork(hold.logits, started))
            if not _fresh(job):
                self._drop_hold(job)
        if forks:
            self.waiting = [seq for seq in self.waiting if seq.row < 0]
        return forks

    def take_copies(self) -> list[tuple[int, int, int]]:
        """(source page, target page, tokens) that `fork` wants copied before the next forward pass."""
        copies, self._copies = self._copies, []
        return copies

    def forget_prefixes(self) -> None:
        """Empty the prefix cache; whoever runs keeps its pages."""
        self._cache.clear()

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is; its full pages stay in the prefix cache."""
        if seq.row >= 0:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
        job = seq.job
        if job.hold is not None and not _fresh(job):
            self._drop_hold(job)

    def retract_all(self) -> None:
        """Send everything running back to the queue and forget all keys and values, as after a weight update.

        No token may be on its way.
        """
        self.decode_rows()
        for seq in sorted(self.prefilling + self.decoding, key=lambda seq: seq.order, reverse=True):
            self._retract(seq)
        while self._holders:
            self._drop_hold(self._holders[-1])
        self._cache.clear()

    def unblock(self) -> bool:
        """Give up the youngest computed prompt, when nothing else can move; False when there is none."""
        if not self._holders:
            return False
        self._drop_hold(max(self._holders, key=lambda job: job.arrival))
        return True

    # ------------------------------------------------------------------ decode

    def decode_rows(self) -> np.ndarray:
        """[R] int64, rows of `decoding` in order. All of them draw a token in every step."""
        if self._rows_stale:
            self.decoding = [seq for seq in self.decoding if seq.row >= 0]
            self._rows = np.fromiter((seq.row for seq in self.decoding), np.int64, len(self.decoding))
            self._rows_stale = False
        return self._rows

    def _give_room_to_decode(self) -> None:
        """A page for every decoding sequence whose next token starts one; the youngest give theirs up if need be."""
        self._slack -= 1
        rows = self.decode_rows()
        if rows is self._ahead_rows:
            return  # they have what the last step may have touched; `_draft` sees to the rest
        if self._slack > 0 and rows is self._slack_rows:
            return  # the same sequences as before, and nobody at the end of a page or of its tokens yet
        while not self._give_pages():
            pass

    def _give_pages(self) -> bool:
        """False when tokens were taken in for want of pages: rows have moved on, or ended, and all are looked at again."""
        rows, tables = self.decode_rows(), self._tables
        left = tables.last_position[rows] - tables.position[rows]
        if not (
            left > 0
        ).all():  # the last token of these is on its way: nothing to start, they keep their place until it arrives
            self.decoding = [seq for seq, steps in zip(self.decoding, left.tolist(), strict=True) if steps > 0]
            self._rows_stale = True
            rows, left = self.decode_rows(), left[left > 0]
        room = tables.capacity[rows] - tables.position[rows]
        needy = sorted((self.decoding[i] for i in np.flatnonzero(room <= 0).tolist()), key=lambda seq: seq.order)
        steps = np.minimum(room, left).min(initial=tables.page_size)
        self._slack, self._slack_rows = (0 if needy else int(steps)), rows
        for seq in needy:
            while seq.row >= 0:
                pages = self._pool.take(1)
                if pages is not None:
                    seq.pages += pages
                    tables.set_pages(seq)
                    break
                if self._take_in():
                    return False
                if not self.unblock():
                    self._retract(max((s for s in self.decoding + self.prefilling if s.row >= 0), key=lambda s: s.order))
                    self.num_retractions += 1
        self.decode_rows()
        return True

    def _take_in(self) -> bool:
        """Take in what is on its way; whether there was any. All positions are known then."""
        if not self._settle():
            return False
        self._forget_ahead()
        return True

    def _forget_ahead(self) -> None:
        """The host goes on: it knows all positions now, and looks up the last tokens."""
        self._ahead_rows, self._slack = _NOBODY, 0
        rows = self.decode_rows()
        unsure = self._is_unsure(rows)
        if unsure.any():
            self._tables.know_last(rows[unsure])
        self._unsure[:] = 0

    def _draft(self, budget: int) -> tuple[Drafts | None, int]:
        """Draft tokens for the decoding rows, or how many the device is to draft for each.

        They take half of what prefill could use, and pages nobody else needs.
        """
        speculator = self._speculator
        if speculator is None or not self.decoding:
            return None, 0
        budget = budget // 2 if self.prefilling or self.waiting else budget
        length = speculator.choose(len(self.decoding), budget)
        if length and self._can_go_ahead(length):
            return None, length
        if length or self._is_unsure(self._rows).any():
            looked_at = self._rows is not self._ahead_rows
            if self._take_in() or not looked_at:
                self._forget_ahead()
                self._give_room_to_decode()
            else:
                self._forget_ahead()
            if not self.decoding:
                return None, 0
        return (self._propose(min(length, budget // len(self.decoding))) if length else None), 0

    def _propose(self, length: int) -> Drafts | None:
        """Draft tokens from the speculator, for rows whose tokens the host has."""
        assert self._speculator is not None
        rows, tables = self._rows, self._tables
        lengths = np.minimum(length, tables.last_position[rows] - tables.position[rows] - 1)
        if (
            self._config.draft_tree or self._speculator.makes_trees
        ):  # the likeliest tokens are kept by position, of which nodes share
            tells = [seq.job.request.num_top_logprobs > 0 for seq in self.decoding]
            lengths = np.where(tells, 0, lengths)
        if self._speculator.rejects:  # its rule knows nothing of ids that are out of reach
            lengths = np.where(tables.first_stop[rows] > tables.position[rows] + 1, 0, lengths)
        self._make_room(tables.position[rows] + lengths + 1)
        lengths = np.minimum(lengths, tables.capacity[rows] - tables.position[rows] - 1)
        return self._speculator.propose(self.decoding, lengths) if (lengths > 0).any() else None

    def _is_unsure(self, rows: np.ndarray) -> np.ndarray:
        """[R] bool: rows whose position the device alone knows."""
        unsure: np.ndarray = self._unsure[rows] == self._tables.tail.serial[rows]
        return unsure

    def _can_go_ahead(self, length: int) -> bool:
        """Whether the device can draft for all decoding rows by itself; takes the pages for it."""
        speculator, rows, tables = self._speculator, self._rows, self._tables
        assert speculator is not None
        goes_on = rows is self._ahead_rows and self._ahead_of == speculator.generation
        if not goes_on and not speculator.is_plain(rows):
            return False
        unsure = None if goes_on else self._is_unsure(rows)
        if unsure is not None:
            self._limits, self._bound_at = tables.last_position[rows], -1
        most = self._reach + length + 1 if unsure is None else unsure * self._reach + (length + 1)
        wanted = np.minimum(tables.position[rows] + most, self._limits)
        if not self._make_room(wanted) or (unsure is not None and not speculator.prepare(rows, unsure)):
            return False
        if self._bound_at != tables.num_changes:
            self._bound, self._bound_at = int(tables.capacity[rows].max()), tables.num_changes
        if not goes_on:
            self._ahead_rows, self._ahead_of = _NOBODY, speculator.generation
        return True

    def _make_room(self, wanted: np.ndarray) -> bool:
        """Pages for positions below `wanted` [R] of the decoding rows, while there are any that nobody else needs."""
        tables, rows = self._tables, self._rows
        short = tables.capacity[rows] < wanted
        if not short.any():
            return True
        for i in np.flatnonzero(short).tolist():
            while tables.capacity[rows[i]] < wanted[i]:
                pages = self._pool.take(1) if self._pool.num_available > self.num_running else None
                if pages is None:
                    return False
                self.decoding[i].pages += pages
                tables.set_pages(self.decoding[i])
        return True

    def _start_decoding(self, seq: Sequence) -> None:
        if seq.row < 0:
            self._tables.open(seq)
        self._tables.position[seq.row] = seq.num_tokens
        self.decoding.append(seq)
        self._rows_stale = True

    # ------------------------------------------------------------------ prefill

    def _cut_chunk(self, seq: Sequence, budget: int, chunks: list[Chunk]) -> int:
        size = min(budget, self._config.prefill_chunk, seq.num_tokens - seq.num_computed)
        if size > 0:
            chunks.append(Chunk(seq, seq.num_computed, seq.num_computed + size))
        return max(size, 0)

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        """Start waiting sequences in order, while there are rows, pages and budget.

        Fresh siblings of a prompt being computed, and sequences whose next page is being computed, keep a row reserved.
        """
        first_new = len(self.prefilling)
        reserved = 0
        for seq in self.waiting:
            if budget <= 0 or self._tables.num_free <= reserved:
                break
            job = seq.job
            if not seq.output and (job.leader is not None or job.hold is not None):
                reserved += 1
                continue
            found = self._claim_pages(seq)
            if found is None:
                break
            if not found:
                reserved += 1
                continue
            self.prefilling.append(seq)
            budget -= self._cut_chunk(seq, budget, chunks)
        if len(self.prefilling) > first_new:
            self.waiting = [seq for seq in self.waiting if seq.row < 0]

    def _claim_pages(self, seq: Sequence) -> bool | None:
        """Pages and a row for all tokens of a waiting sequence. False: wait for a page another computes; None: no room."""
        job = seq.job
        tokens = seq.token_ids()
        wants_logprobs = job.prompt_logprobs is not None and not seq.output
        shared, pending = self._cache.match(tokens, 0 if wants_logprobs else len(tokens) - 1)
        if pending:
            return False
        self._pool.share(shared)
        need = -(-len(tokens) // self._tables.page_size) - len(shared)
        # One page ahead for everybody who runs: admitting into the last page would only retract somebody a moment later.
        spare = self.num_running
        new = self._pool.take(need) if self._pool.num_available >= need + spare else None
        if new is None:
            self._pool.release(shared)
            return None
        seq.pages = shared + new
        seq.num_computed = len(shared) * self._tables.page_size
        seq.tokens = torch.tensor(tokens, dtype=torch.int64) if seq.output else job.prompt
        filed = self._cache.publish(tokens, seq.pages, ready=False)
        place = {page: i for i, page in enumerate(seq.pages)}
        seq.claims = [((place[page] + 1) * self._tables.page_size, page) for page in filed]
        if not seq.output:
            job.leader = seq
            if job.cached_tokens is None:
                job.cached_tokens = seq.num_computed
                self.num_cached_tokens += seq.num_computed
        self._tables.open(seq)
        return True

    def _finish_prefill(self, seq: Sequence, logits: torch.Tensor) -> None:
        job = seq.job
        self.prefilling.remove(seq)
        seq.tokens = None
        self._start_decoding(seq)
        if job.leader is not seq:
            return
        job.leader = None
        if _fresh(job):
            pages = seq.pages[: -(-job.num_prompt // self._tables.page_size)]
            self._pool.share(pages)
            job.hold = PromptHold(pages, logits.clone())
            self._holders.append(job)

    # ------------------------------------------------------------------ siblings

    def _fork_pages(self, seq: Sequence, hold: PromptHold) -> bool:
        """Share the prompt's full pages and copy its last, partial one; False when there is no page for that."""
        full, rest = divmod(seq.job.num_prompt, self._tables.page_size)
        own = self._pool.take(1 if rest else 0)
        if own is None:
            return False
        if rest:
            self._copies.append((hold.pages[full], own[0], rest))
        self._pool.share(hold.pages[:full])
        seq.pages = hold.pages[:full] + own
        seq.num_computed = seq.job.num_prompt
        return True

    def _drop_hold(self, job: Job) -> None:
        assert job.hold is not None
        self._pool.release(job.hold.pages)
        job.hold = None
        self._holders.remove(job)

    # ------------------------------------------------------------------ leaving

    def _retract(self, seq: Sequence) -> None:
        """Back to the queue, at its old place. Its tokens stay; keys and values are computed again later, to the same bits."""
        self._vacate(seq)
        bisect.insort(self.waiting, seq, key=lambda other: other.order)

    def _vacate(self, seq: Sequence) -> None:
        if seq.is_prefilling:
            self._cache.withdraw([page for _, page in seq.claims])
            self.prefilling.remove(seq)
            computed = seq.num_computed
        else:
            self._rows_stale = True
            computed = seq.num_tokens - 1
        self._cache.publish(seq.token_ids()[:computed], seq.pages)
        self._tables.close(seq)
        self._pool.release(seq.pages)
        if seq.job.leader is seq:
            seq.job.leader = None
        seq.pages, seq.claims, seq.tokens, seq.num_computed = [], [], None, 0


def _fresh(job: Job) -> list[Sequence]:
    """Completions of a job that wait and have not begun."""
    return [seq for seq in job.sequences if seq.row < 0 and not seq.output and seq.finish_reason is None]
