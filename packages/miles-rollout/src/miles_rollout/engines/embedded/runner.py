"""One forward pass and one draw per step, in vector operations over the rows of the tables.

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
from miles_kernels.ops.logprob import logprob_from_logits
from miles_kernels.ops.sample import SampleOutput, sample
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.scheduler import Batch, Fork
from miles_rollout.engines.embedded.speculate import Drafts
from miles_rollout.engines.embedded.state import Sequence
from miles_rollout.engines.embedded.tables import Tables

_FILTERS = (("top_k", -1), ("top_p", 1.0), ("min_p", 0.0))


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


class Runner:
    """Runs batches through the decoder and samples from what comes out."""

    def __init__(self, decoder: Decoder, kv: PagedKV, tables: Tables) -> None:
        self.num_tokens = 0
        """Tokens computed since start."""
        self._decoder = decoder
        self._kv = kv
        self._tables = tables
        self._fused = FusedForward(decoder, kv.pools) if FusedForward.refusal(decoder) is None else None
        self._device = decoder.embed_tokens.device
        self._sampler_rows: np.ndarray | None = None
        self._sampler: dict[str, Any] = {}
        self._has_minimum = False

    def forward(self, batch: Batch) -> Tensor | None:
        """Logits fp32 [R + D + finished chunks, V] of a batch: decode rows first, then chunks that reach their last token."""
        if batch.is_empty:
            return None
        step = self._inputs(batch)
        self.num_tokens += len(step.slots)
        last = None
        if batch.chunks:
            ends = np.cumsum([chunk.stop - chunk.start for chunk in batch.chunks]) + batch.num_decode_tokens - 1
            finished = [end for chunk, end in zip(batch.chunks, ends.tolist(), strict=True) if chunk.is_last]
            last = torch.tensor([*range(batch.num_decode_tokens), *finished], dtype=torch.int64)
        if self._fused is not None and len(step.slots) <= MAX_TOKENS:
            table, rows = self._tables.slots_torch, torch.from_numpy(step.token_rows)
            hidden, logits = self._fused(step.token_ids, step.positions, step.slots, table, rows, last)
        else:
            on_cuda = self._device.type == "cuda"
            plan = self._cuda_plan(batch, step) if on_cuda else self._plan(batch, step)
            token_ids, positions, slots = (part.to(self._device) for part in (step.token_ids, step.positions, step.slots))
            self._kv.begin(plan, slots)
            hidden = self._decoder(token_ids, positions, self._kv)
            logits = self._decoder.logits(hidden if last is None else hidden[last.to(self._device)])
        if batch.chunks:
            self._note_prompt_logprobs(batch, hidden)
        return logits if len(logits) else None

    def copy_pages(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy the first tokens of pages: (source, target, tokens)."""
        for source, target, tokens in copies:
            self._kv.copy(source, target, tokens)

    def sample(
        self,
        logits: Tensor | None,
        forks: list[Fork],
        sequences: list[Sequence],
        rows: np.ndarray,
        drafts: Drafts | None = None,
    ) -> tuple[list[int], list[float], list[float]]:
        """Token, log-probability and sampled one of each sequence, as lists [S]; with drafts of every position [S + D].

        The token is -1 where logits are not finite. `logits` are those of `forward`; the last sequences are the forks'
        siblings, in order.
        """
        parts = [logits] if logits is not None else []
        parts += [fork.logits.expand(len(fork.siblings), -1) for fork in forks]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert len(rows) == len(sequences)
        if drafts is None:
            position = self._tables.position[rows]
        else:
            of, offset = drafts.spread(np.arange(len(rows)))
            rows, sequences = rows[of], [sequences[i] for i in of.tolist()]
            position = self._tables.position[rows] + offset
        assert len(logits) == len(rows)
        keys = self._sampler_arguments(rows)
        keys["position"] = torch.from_numpy(position).to(self._device)
        banned = np.flatnonzero(self._tables.first_stop[rows] > position).tolist() if self._has_minimum else []
        out = _sample(logits, keys, [(i, sequences[i].job.eos) for i in banned])
        tokens = out.token.cpu()
        self._tables.last_token[rows] = tokens.numpy()
        return tokens.tolist(), out.logprob.tolist(), out.sampled_logprob.tolist()

    # ------------------------------------------------------------------ inputs

    def _inputs(self, batch: Batch) -> _Step:
        """What every token of the pass is; enters the new slots into the tables."""
        tables, rows = self._tables, batch.rows
        if batch.drafts is None:
            positions, tokens = tables.position[rows], tables.last_token[rows]
        else:
            rows, offset = batch.drafts.spread(rows)
            positions, tokens = tables.position[rows] + offset, tables.last_token[rows]
            tokens[offset > 0] = batch.drafts.tokens
        slots = tables.slots_at(rows, positions)
        tables.slots[rows, positions] = slots
        token_ids = torch.from_numpy(tokens)
        if not batch.chunks:
            return _Step(token_ids, torch.from_numpy(positions), torch.from_numpy(slots), rows)
        chunk_ids, all_positions, all_slots, all_rows = [token_ids], [positions], [slots], [rows]
        for chunk in batch.chunks:
            assert chunk.seq.tokens is not None
            new = tables.slots_of(chunk.seq.pages, chunk.start, chunk.stop)
            tables.slots[chunk.seq.row, chunk.start : chunk.stop] = new
            chunk_ids.append(chunk.seq.tokens[chunk.start : chunk.stop])
            all_positions.append(np.arange(chunk.start, chunk.stop))
            all_slots.append(new)
            all_rows.append(np.full(len(new), chunk.seq.row))
        positions, slots = np.concatenate(all_positions), np.concatenate(all_slots)
        return _Step(torch.cat(chunk_ids), torch.from_numpy(positions), torch.from_numpy(slots), np.concatenate(all_rows))

    def _plan(self, batch: Batch, step: _Step) -> AttentionPlan:
        """The attention plan of a pass, for the decoder's own forward."""
        count, keys = batch.num_decode_tokens, int(step.positions.max()) + 1
        rows = step.token_rows[:count]  # every draft token is a decode row of its own
        if not batch.chunks:
            return decode_plan(self._table(rows, keys), step.positions + 1)
        query_lens = [1] * count + [chunk.stop - chunk.start for chunk in batch.chunks]
        firsts = step.positions[:count].tolist() + [chunk.start for chunk in batch.chunks]
        rows = np.concatenate((rows, [chunk.seq.row for chunk in batch.chunks]))
        return table_plan(self._table(rows, keys), query_lens, firsts)

    def _cuda_plan(self, batch: Batch, step: _Step) -> Any:
        """The same for the CUDA kernels: which pages each sequence reads."""
        from miles_kernels.cuda.attention import KVBatch

        size = self._tables.page_size
        rows = np.concatenate((batch.rows, [chunk.seq.row for chunk in batch.chunks])).astype(np.int64)
        firsts = self._tables.position[batch.rows].tolist() + [chunk.start for chunk in batch.chunks]
        decode_lens = [1] * len(batch.rows) if batch.drafts is None else (batch.drafts.counts + 1).tolist()
        query_lens = decode_lens + [chunk.stop - chunk.start for chunk in batch.chunks]
        kv_lens = [first + count for first, count in zip(firsts, query_lens, strict=True)]
        width = -(-max(kv_lens) // size) * size
        pages = torch.from_numpy(self._tables.slots[rows, :width:size] // size)
        return KVBatch.paged(query_lens, kv_lens, pages.to(self._device, torch.int32), size)

    def _table(self, rows: np.ndarray, keys: int) -> Tensor:
        """Slots int64 [R, keys rounded up to 16] of some rows."""
        return self._tables.slots_torch[:, : keys + -keys % KEY_MULTIPLE].index_select(0, torch.from_numpy(rows))

    def _note_prompt_logprobs(self, batch: Batch, hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens, for requests that want them, of what this batch predicts."""
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

    # ------------------------------------------------------------------ sampling

    def _sampler_arguments(self, rows: np.ndarray) -> dict[str, Any]:
        """Arguments of `sample` for these rows, gathered again only when the rows have changed.

        What all rows leave at its default is passed as a number, which lets the sampler skip work.
        """
        if rows is not self._sampler_rows:
            tables = self._tables
            self._sampler_rows = rows
            self._sampler = {
                name: torch.from_numpy(getattr(tables, name)[rows]).to(self._device) for name in ("seed", "sample_id")
            }
            for name, default in (*_FILTERS, ("temperature", 1.0)):
                values = getattr(tables, name)[rows]
                self._sampler[name] = default if (values == default).all() else torch.from_numpy(values).to(self._device)
            self._has_minimum = bool((tables.first_stop[rows] > tables.position[rows]).any())
        return self._sampler


def _sample(logits: Tensor, keys: dict[str, Any], banned: list[tuple[int, frozenset[int]]]) -> SampleOutput:
    """`sample`, with the `banned` ids of a row out of reach (min_new_tokens); `logprob` stays that of the full distribution."""
    banned = [(row, ids) for row, ids in banned if ids]
    if not banned:
        return sample(logits, **keys)
    rows = torch.tensor([row for row, _ in banned], device=logits.device)
    masked = logits.clone()
    for row, ids in banned:
        masked[row, list(ids)] = float("-inf")
    out = sample(masked, **keys)
    temperature = torch.as_tensor(keys["temperature"], dtype=torch.float32, device=logits.device).expand(len(logits))[rows]
    temperature = torch.where(temperature == 0, 1.0, temperature)
    logprob = out.logprob.clone()  # the sampler returns one tensor for both when nothing is filtered
    logprob[rows] = logprob_from_logits(logits[rows], out.token[rows].clamp(min=0), temperature).logprob
    return SampleOutput(out.token, logprob, out.sampled_logprob)
