"""Taking in what was drawn: tokens to their sequences, stop rules, ends and failures.

Legend: S = rows that sample in a step, W = most tokens it brings to one.
"""

from __future__ import annotations

from miles_rollout.engines.embedded.flight import Blocks, Flight
from miles_rollout.engines.embedded.output import OutputProcessor, Token
from miles_rollout.engines.embedded.runner import Runner
from miles_rollout.engines.embedded.scheduler import Scheduler
from miles_rollout.engines.embedded.speculate import Committed, Speculator
from miles_rollout.engines.embedded.state import Job, Sequence
from miles_rollout.engines.embedded.tables import Tables
from miles_rollout.engines.embedded.tail import Tokens

_FEW = 4
"""Rows from which a step's tokens are taken in by vector operations."""


class Landing:
    """What happens to tokens when they arrive, and to sequences that end by them.

    `tells_host`: the tables learn what was drawn from the tokens that arrive; steps ahead on the CPU know more by then.
    """

    def __init__(
        self,
        tables: Tables,
        runner: Runner,
        scheduler: Scheduler,
        outputs: OutputProcessor,
        speculator: Speculator | None,
        *,
        tells_host: bool,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        """Unfinished requests by id."""
        self.num_generated = 0
        """Tokens taken in since start."""
        self.weight_version = 0
        """Of the weights that drew what is on its way."""
        self.tells_host = tells_host
        self._tables, self._runner, self._scheduler = tables, runner, scheduler
        self._outputs, self._speculator = outputs, speculator

    def take_in(self, flight: Flight) -> None:
        """The tokens of a flight, waited for; those of rows that have changed hands since are left out."""
        found, speculator = flight.wait(), self._speculator
        if isinstance(found, Blocks):
            assert speculator is not None
            current = flight.current(self._tables.tail)
            if current is not None:
                found = found.take(current)
                flight.keep(current)
            if len(flight.rows):
                self._take_blocks(flight, speculator.arrive(flight, found, self._tables))
        elif flight.drafts is None:
            self._take_tokens(flight, found)
        else:
            assert speculator is not None and flight.current(self._tables.tail) is None, "drafts are made of all that has arrived"
            committed = speculator.commit(flight.drafts, flight.rows, self._tables, found)
            if committed.moves is not None:
                self._runner.move(committed.moves)
            self._take_blocks(flight, committed)

    def finish(self, seq: Sequence) -> None:
        """A completion has come to its end; its request's result is ready with the last one."""
        if self._runner.experts is not None and seq.job.request.return_routed_experts:
            self._note_experts(seq)
        self._scheduler.finish(seq)
        self._outputs.close(seq)
        if not seq.job.unfinished:
            del self.jobs[seq.job.request.request_id]

    # ------------------------------------------------------------------ one token a row

    def _take_tokens(self, flight: Flight, tokens: Tokens) -> None:
        tail, rows = self._tables.tail, flight.rows
        if len(rows) <= _FEW:
            return self._take_few(flight, tokens)
        current = flight.current(tail)
        if current is not None or tokens.token_ids.min() < 0:
            current = tail.serial[rows] == flight.serials
            fit = current & (tokens.token_ids >= 0)
            for row in rows[current & ~fit].tolist():
                self._fail_for_nan(row)
            fit &= tail.serial[rows] == flight.serials  # a failed request takes its other rows along
            rows, tokens = rows[fit], tokens.take(fit)
        if self.tells_host:
            self._tables.last_token[rows] = tokens.token_ids
        self.num_generated += len(rows)
        for i in tail.record(rows, tokens).tolist():
            seq = tail.owners[rows[i]]
            if seq is not None:  # its request may have failed a moment ago
                self._look_at(seq, Token(int(tokens.token_ids[i]), float(tokens.logprobs[i]), float(tokens.sampled_logprobs[i])))

    def _take_few(self, flight: Flight, tokens: Tokens) -> None:
        """The same for a few rows, where Python's own numbers are faster than vectors of them."""
        tail = self._tables.tail
        values = zip(flight.rows.tolist(), flight.serials.tolist(), *(part.tolist() for part in tokens), strict=True)
        for row, serial, *drawn in values:
            seq = tail.owners[row]
            if seq is None or tail.serial[row] != serial:
                continue
            token = Token(*drawn)
            if token.token_id < 0:
                self._fail_for_nan(row)
                continue
            if self.tells_host:
                self._tables.last_token[row] = token.token_id
            self.num_generated += 1
            tail.append(seq, *token)
            self._look_at(seq, token)

    # ------------------------------------------------------------------ several tokens a row

    def _take_blocks(self, flight: Flight, committed: Committed) -> None:
        """What the drafts agree with, in order, until a stop rule holds, of rows that have not changed hands."""
        tail, rows, tokens = self._tables.tail, flight.rows, committed.tokens
        taken, notable = tail.record_blocks(rows, committed.counts, tokens)
        for i in notable.tolist():
            row, serial = int(rows[i]), flight.serials[i]
            if tail.serial[row] != serial:
                taken[i] = 0  # its request has failed a moment ago
                continue
            if tail.is_watched[row]:
                taken[i] = self._read_along(row, serial, i, committed)
                continue
            seq, last = tail.owners[row], int(taken[i])
            assert seq is not None
            if last < committed.counts[i] and tokens.token_ids[last, i] < 0:
                self._fail_for_nan(row)
            else:
                self._look_at(seq, _token(tokens, last - 1, i))
        assert self._speculator is not None
        self.num_generated += self._speculator.count(committed, taken)

    def _read_along(self, row: int, serial: int, i: int, committed: Committed) -> int:
        """Token after token of a row that is watched; how many it took."""
        tail, tokens = self._tables.tail, committed.tokens
        for j in range(int(committed.counts[i])):
            seq = tail.owners[row]
            if seq is None or tail.serial[row] != serial:
                return j
            token = _token(tokens, j, i)
            if token.token_id < 0:
                self._fail_for_nan(row)
                return j
            tail.append(seq, *token)
            self._look_at(seq, token)
        return int(committed.counts[i])

    # ------------------------------------------------------------------ ends

    def _look_at(self, seq: Sequence, token: Token) -> None:
        """A token that may end its completion, or that somebody reads along with."""
        try:
            if self._outputs.note(seq, token, self.weight_version):
                self.finish(seq)
        except Exception as error:  # one request's fault, delivered to whoever awaits it; the others go on
            self._fail(seq.job, error)

    def _fail_for_nan(self, row: int) -> None:
        seq = self._tables.tail.owners[row]
        if seq is None:
            return  # it failed with another row of its request
        error = ArithmeticError(
            f"request {seq.job.request.request_id!r}: the logits after {seq.num_tokens} tokens hold NaN or infinity "
            f"under weight version {self.weight_version}; the weights are damaged or training has diverged"
        )
        self._fail(seq.job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a request in an error of its own. Its pages may hold NaN, so none is offered to others."""
        for seq in job.sequences:
            if seq.row >= 0 or seq.finish_reason is None:
                seq.finish_reason = "abort"
                self._scheduler.finish(seq)
        self._scheduler.forget_prefixes()
        self.jobs.pop(job.request.request_id, None)
        self._outputs.fail(job, error)

    def _note_experts(self, seq: Sequence) -> None:
        """Read which experts the tokens of an ending sequence went to; one that waits has no cache to read them from."""
        experts = self._runner.experts
        if experts is not None and seq.row >= 0 and not seq.is_prefilling:
            seq.experts = experts.read(self._tables.slots_of(seq.pages, 0, seq.num_tokens - 1))


def _token(tokens: Tokens, j: int, i: int) -> Token:
    """The j-th token of row i."""
    return Token(int(tokens.token_ids[j, i]), float(tokens.logprobs[j, i]), float(tokens.sampled_logprobs[j, i]))
