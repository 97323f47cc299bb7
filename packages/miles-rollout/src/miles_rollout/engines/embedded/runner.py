"""One forward pass and one draw per step, in vector operations over the rows of the tables. Nothing here waits for the device.

Legend: T = tokens of the pass, R = decoding rows, D = their draft tokens, S = sequences that sample, V = vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.fused import MAX_TOKENS, FusedForward
from miles_kernels.ops.attention import AttentionPlan, decode_plan, table_plan
from miles_kernels.ops.attention_plan import KEY_MULTIPLE
from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.experts import ExpertStore
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import Flight, Readback, pack
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.paging import context_slots, paged_batch, slot_batch, tree_slots
from miles_rollout.engines.embedded.replay_spec import SpecGraphs
from miles_rollout.engines.embedded.sampling import Sampler, upload
from miles_rollout.engines.embedded.scheduler import Batch, Fork
from miles_rollout.engines.embedded.tables import Tables
from miles_rollout.engines.embedded.tail import Tokens
from miles_rollout.engines.embedded.verification import Verifier


class _Step(NamedTuple):
    """The tokens of one pass, those of the decode rows first."""

    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]: where their keys and values go"""
    token_rows: np.ndarray
    """int64 [T]: the table row of each"""
    slot_ids: np.ndarray
    """int64 [T]: the same on the host"""
    last: np.ndarray | None
    """int64 [N]: tokens whose logits are wanted, all when None"""
    table: Tensor | None = None
    """int64 [B + R + D, W]: slots by position, with a row of its own for every token of a tree; None: those of the tables"""


class Runner:
    """Runs batches through the decoder and draws from what comes out.

    Drawn tokens are kept where the next pass reads them: by row on the device, or, on the CPU, in the tables.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: PagedKV,
        tables: Tables,
        *,
        max_context: int,
        cuda_graphs: bool = True,
        experts: ExpertStore | None = None,
    ) -> None:
        self.num_tokens = 0
        """Tokens computed since start."""
        self.experts = experts
        self.features: FeatureStore | None = None
        """Takes what a draft model reads; set by `record`."""
        self.verifier: Verifier | None = None
        """Draws where there are drafts, in place of one draw each."""
        self._decoder = decoder
        self._kv = kv
        self._tables = tables
        self._fused = FusedForward(decoder, kv.pools) if FusedForward.refusal(decoder) is None else None
        self._device = decoder.embed_tokens.device
        self._sampler = Sampler(tables, self._device)
        self._last: Tensor | None = None
        self.graphs: SpecGraphs | None = None
        if self._device.type == "cuda":
            self._last = torch.zeros(len(tables.position) + 1, dtype=torch.int64, device=self._device)
            # ranks of a tensor-parallel engine make the same steps, so they capture and launch the same graphs; with experts
            # dealt over the ranks that has not run on a GPU yet
            if cuda_graphs and all(getattr(layer, "spread_experts", None) is None for layer in decoder.layers):
                self.graphs = SpecGraphs(decoder, kv, tables, self._last, max_context, experts)

    def is_plain(self, rows: np.ndarray) -> bool:
        """Whether these rows sample without filters, so that a captured step draws for them."""
        return self._sampler.is_plain(rows)

    def forget_addresses(self) -> None:
        """Drop everything that holds the address of a weight or of the cache: graphs, and the C call's model."""
        if self.graphs is not None:
            self.graphs.forget()
        if self._fused is not None:
            self._fused = FusedForward(self._decoder, self._kv.pools)

    def forget_graphs(self) -> None:
        """Drop all graphs for good, with what they hold of a process group."""
        if self.graphs is not None:
            self.graphs.end()

    def record(self, features: FeatureStore | None) -> None:
        """Keep features of every position from now on."""
        self.features = features
        if self.graphs is not None:
            self.graphs.features = features
            self.graphs.forget()

    def launch_whole(self, batch: Batch, *, tokens_known: bool) -> tuple[Tensor, Flight] | None:
        """Pass and draw of a batch as one graph; None when this batch is not one that graphs serve.

        Returns what `forward` does, with the flight of the decode rows and the finished chunks. `tokens_known`: the host has
        the tokens drawn last, in the tables; otherwise those on the device are meant.
        """
        if self.graphs is None or batch.is_empty:
            return None
        if batch.drafts is not None:
            return None if batch.chunks or self.verifier is not None else self._launch_verify(batch.rows, batch.drafts)
        if any(chunk.seq.job.prompt_logprobs is not None for chunk in batch.chunks):
            return None
        rows, tables = batch.rows, self._tables
        tokens = tables.last_token[rows] if tokens_known else None
        made = self.graphs.mixed(batch, tokens) if batch.chunks else self.graphs.decode(rows, tokens)
        if made is None:
            return None
        logits, readback = made
        self.num_tokens += len(rows)
        if self.features is not None:
            slots = [tables.slots_at(rows, tables.position[rows])]
            self.features.mark(np.concatenate(slots + [tables.slots_of(c.seq.pages, c.start, c.stop) for c in batch.chunks]))
        position = tables.position[rows] + 1
        if batch.chunks:
            finished = [chunk for chunk in batch.chunks if chunk.is_last]
            self.num_tokens += sum(chunk.stop - chunk.start for chunk in batch.chunks)
            rows = np.concatenate((rows, np.array([chunk.seq.row for chunk in finished], np.int64)))
            position = np.concatenate((position, np.array([chunk.stop for chunk in finished], np.int64)))
        if not len(rows) or self._sampler.is_plain(rows):
            return logits, Flight(rows, tables.tail, None, readback)
        return logits, self._draw(logits, rows, position)

    def _launch_verify(self, rows: np.ndarray, drafts: Drafts) -> tuple[Tensor, Flight] | None:
        """The same for rows with drafts and nothing else."""
        assert self.graphs is not None
        made = self.graphs.verify(rows, drafts)
        if made is None:
            return None
        logits, readback, places = made
        tables = self._tables
        of, place, depth = drafts.spread(np.arange(len(rows)))
        each = rows[of]
        self.num_tokens += len(of)
        if self.features is not None:
            self.features.mark(tables.slots_at(each, tables.position[each] + place))
        if self._sampler.is_plain(rows):
            return logits, Flight(rows, tables.tail, drafts, readback)
        chosen = logits.index_select(0, upload(places, self._device))
        return logits, self._draw(chosen, rows, tables.position[each] + 1 + depth, drafts, of)

    def forward(self, batch: Batch, *, tokens_known: bool) -> Tensor | None:
        """Logits fp32 [R + D + finished chunks, V] of a batch: decode rows first, then chunks that reach their last token."""
        if batch.is_empty:
            return None
        step = self._inputs(batch, tokens_known)
        if self.graphs is not None:
            self.graphs.gap()
        self.num_tokens += len(step.slots)
        features = self.features
        taps = None if features is None else features.taps()
        if self._fused is not None and len(step.slots) <= MAX_TOKENS and taps is None:
            table, rows = self._tables.slots_torch if step.table is None else step.table, torch.from_numpy(step.token_rows)
            last = None if step.last is None else torch.from_numpy(step.last)
            hidden, logits = self._fused(step.token_ids, step.positions, step.slots, table, rows, last)
        else:
            plan = self._cuda_plan(batch, step) if self._device.type == "cuda" else self._plan(batch, step)
            self._kv.begin(plan, step.slots)
            routed: dict[int, Tensor] | None = None if self.experts is None else {}
            hidden = self._decoder(step.token_ids, step.positions, self._kv, routed=routed, taps=taps)
            if self.experts is not None and routed is not None:
                self.experts.store(step.slots, routed)
            logits = self._decoder.logits(hidden if step.last is None else hidden[upload(step.last, self._device)])
        if features is not None:
            features.store(step.slots, step.token_ids, hidden, taps)
            features.mark(step.slot_ids)
        if batch.chunks:
            self._note_prompt_logprobs(batch, hidden)
        return logits if len(logits) else None

    def copy_pages(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy the first tokens of pages: (source, target, tokens)."""
        size = self._tables.page_size
        for source, target, tokens in copies:
            self._kv.copy(source, target, tokens)
            start, end = source * size, target * size
            if self.experts is not None:
                self.experts.copy(slice(start, start + tokens), slice(end, end + tokens))
            if self.features is not None:
                self.features.move(np.arange(start, start + tokens), np.arange(end, end + tokens))

    def move(self, moves: tuple[np.ndarray, np.ndarray]) -> None:
        """Bring what accepted nodes of trees left in the slots [M] of one to those of the other."""
        source, target = (upload(slots, self._device) for slots in moves)
        self._kv.move(source, target)
        if self.experts is not None:
            self.experts.move(source, target)
        if self.features is not None:
            self.features.move(*moves)

    def draw(self, logits: Tensor | None, forks: list[Fork], rows: np.ndarray, drafts: Drafts | None = None) -> Flight:
        """Start the draw of a token for each of rows [S], with drafts for every position [S + D].

        `logits` are those of `forward`; the last rows are the forks' siblings, in order.
        """
        parts = [logits] if logits is not None else []
        parts += [fork.logits.expand(len(fork.siblings), -1) for fork in forks]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        position, of = self._tables.position[rows], None
        if drafts is not None:
            of, _, depth = drafts.spread(np.arange(len(rows)))
            position = position[of] + depth
        assert len(logits) == len(position)
        return self._draw(logits, rows, position, drafts, of)

    def _draw(
        self, logits: Tensor, rows: np.ndarray, position: np.ndarray, drafts: Drafts | None = None, of: np.ndarray | None = None
    ) -> Flight:
        """Draw at positions [S] of rows, or, with drafts, of `rows[of]`."""
        out = self._sampler.draw(logits, rows, position, of)
        tables = self._tables
        if drafts is not None and self.verifier is not None:
            out = self.verifier(out, logits, rows, drafts)
        if self._last is not None:
            if drafts is None:  # with drafts the host decides which token was the last
                self._last.index_copy_(0, upload(rows, self._device), out.token.clamp(min=0))
            readback = Readback(pack(out.token, out.logprob, out.sampled_logprob), len(position))
            return Flight(rows, tables.tail, drafts, readback)
        token = out.token.numpy()
        if drafts is None:
            tables.last_token[rows] = np.maximum(token, 0)
        drawn = Tokens(token, out.logprob.numpy(), out.sampled_logprob.numpy())
        return Flight(rows, tables.tail, drafts, drawn)

    # ------------------------------------------------------------------ inputs

    def _inputs(self, batch: Batch, tokens_known: bool) -> _Step:
        """What every token of the pass is; on the CPU the new slots are entered into the tables."""
        tables, rows = self._tables, batch.rows
        if batch.drafts is None:
            positions, tokens = tables.position[rows], tables.last_token[rows]
            slots = tables.slots_at(rows, positions)
        else:
            rows, place, depth = batch.drafts.spread(rows)
            positions, tokens = tables.position[rows] + depth, tables.last_token[rows]
            tokens[place > 0] = batch.drafts.tokens
            slots = tables.slots_at(rows, tables.position[rows] + place)
        paths = None
        if batch.drafts is not None and batch.drafts.parents is not None:
            paths = tree_slots(tables, batch.drafts, rows, positions, slots, self._last is None)
            rows = len(tables.slots) + np.arange(len(rows))
        last: np.ndarray | None = None
        if batch.chunks:
            prompts = [chunk.seq.tokens[chunk.start : chunk.stop] for chunk in batch.chunks if chunk.seq.tokens is not None]
            sizes = [chunk.stop - chunk.start for chunk in batch.chunks]
            ends = np.cumsum(sizes) + batch.num_decode_tokens - 1
            is_last = np.fromiter((chunk.is_last for chunk in batch.chunks), bool, len(sizes))
            last = np.concatenate((np.arange(batch.num_decode_tokens), ends[is_last]))
            positions = np.concatenate((positions, *(np.arange(chunk.start, chunk.stop) for chunk in batch.chunks)))
            slots = np.concatenate((slots, *(tables.slots_of(c.seq.pages, c.start, c.stop) for c in batch.chunks)))
            rows = np.concatenate((rows, np.repeat([chunk.seq.row for chunk in batch.chunks], sizes)))
            tokens = np.concatenate((tokens, *(part.numpy() for part in prompts)))
        if self._last is None:
            own = rows < len(tables.slots)  # tokens of a tree have rows of their own, where their slots stand already
            tables.slots[rows[own], positions[own]] = slots[own]
            parts = (torch.from_numpy(part) for part in (tokens, positions, slots))
        else:
            parts = (upload(part, self._device) for part in (tokens, positions, slots))
        token_ids, position_ids, slot_ids = parts
        if self._last is not None and not tokens_known and batch.drafts is None and len(batch.rows):
            torch.index_select(self._last, 0, upload(batch.rows, self._device), out=token_ids[: len(batch.rows)])
        table = None if paths is None else torch.from_numpy(np.concatenate((context_slots(tables, self._last is None), paths)))
        return _Step(token_ids, position_ids, slot_ids, rows, slots, last, table)

    def _plan(self, batch: Batch, step: _Step) -> AttentionPlan:
        """The attention plan of a pass, for the decoder's own forward."""
        count, keys = batch.num_decode_tokens, int(step.positions.max()) + 1
        rows = step.token_rows[:count]  # every draft token is a decode row of its own
        if batch.chunks:
            rows = np.concatenate((rows, [chunk.seq.row for chunk in batch.chunks]))
        table = self._table(rows, keys) if step.table is None else _rows_of(step.table, rows, keys)
        if not batch.chunks:
            return decode_plan(table, step.positions + 1)
        query_lens = [1] * count + [chunk.stop - chunk.start for chunk in batch.chunks]
        firsts = step.positions[:count].tolist() + [chunk.start for chunk in batch.chunks]
        return table_plan(table, query_lens, firsts)

    def _cuda_plan(self, batch: Batch, step: _Step) -> Any:
        """The same for the CUDA kernels: which pages each sequence reads, or, with trees, which slots each token."""
        tables = self._tables
        drafted = 0 if batch.drafts is None else batch.drafts.counts
        chunks = np.array([(chunk.seq.row, chunk.start, chunk.stop - chunk.start) for chunk in batch.chunks], np.int64)
        chunk_rows, chunk_starts, chunk_sizes = chunks.reshape(-1, 3).T
        if step.table is not None and batch.drafts is not None:
            count = batch.num_decode_tokens
            depth = batch.drafts.spread(batch.rows).depth
            rows = np.concatenate((step.token_rows[:count], chunk_rows))
            queries = np.concatenate((np.ones(count, np.int64), chunk_sizes))
            keys = np.concatenate((tables.position[batch.rows].repeat(1 + drafted) + 1 + depth, chunk_starts + chunk_sizes))
            return slot_batch(step.table.numpy()[rows, : int(keys.max())], keys, self._device, queries)
        rows = np.concatenate((batch.rows, chunk_rows))
        queries = np.concatenate((np.ones(len(batch.rows), np.int64) + drafted, chunk_sizes))
        keys = np.concatenate((tables.position[batch.rows], chunk_starts)) + queries
        return paged_batch(tables, self._device, rows, queries, keys)

    def _table(self, rows: np.ndarray, keys: int) -> Tensor:
        """Slots int64 [R, keys rounded up to 16] of some rows."""
        return _rows_of(self._tables.slots_torch, rows, keys)

    def _note_prompt_logprobs(self, batch: Batch, hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens, for requests that want them, of what this batch predicts. Waits for the device."""
        start = batch.num_decode_tokens
        for chunk in batch.chunks:
            job, size = chunk.seq.job, chunk.stop - chunk.start
            if job.prompt_logprobs is not None and job.leader is chunk.seq:
                count = min(chunk.stop, job.num_prompt - 1) - chunk.start
                if count > 0:
                    targets = job.prompt[chunk.start + 1 : chunk.start + 1 + count].to(self._device)
                    out = self._decoder.logprob(
                        hidden[start : start + count], targets, job.request.sampling.temperature or 1.0, entropy=False
                    )
                    job.prompt_logprobs[chunk.start + 1 : chunk.start + 1 + count] = out.logprob.tolist()
            start += size


def _rows_of(table: Tensor, rows: np.ndarray, keys: int) -> Tensor:
    return table[:, : keys + -keys % KEY_MULTIPLE].index_select(0, torch.from_numpy(rows))
