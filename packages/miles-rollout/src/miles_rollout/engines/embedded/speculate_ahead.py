"""Speculative steps that start before the host has seen the tokens of the step before: positions are the device's own.

Legend: R = decoding rows, S = R rounded up to a captured size, K = draft tokens a row may have, W = K + 1, C = entries of the
draft's cache that are made again, n = position of a row's last token.

One graph makes the missing entries, drafts K tokens, verifies them, and enters what was accepted into the state that the next
step starts from. The host, one step behind, learns from each step where its rows were and what they drew. Until then
`Tables.position` is the least a row can have reached, one token a step; pages are there for the most it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import BlockReadback, Start
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.replay import Key
from miles_rollout.engines.embedded.replay_spec import SpecGraphs
from miles_spec.models.base import DraftModel


class AheadSteps:
    """Launches steps of a recycled draft, all rows in one graph. Where rows stand is kept on the device."""

    def __init__(
        self,
        graphs: SpecGraphs,
        model: DraftModel,
        kv: PagedKV,
        store: FeatureStore,
        policy: Decoder,
        *,
        entries: int,
        number: int,
    ) -> None:
        """`entries`: C, at least 1 + the most tokens that a step drafts. `number` tells this draft from others of the graphs."""
        self.entries = entries
        self._graphs, self._model, self._kv, self._store = graphs, model, kv, store
        self._embed, self._head = policy.embed_tokens, policy.head
        self._number = number
        self._where = torch.zeros_like(graphs.state[0])
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    def launch(self, start: Start, length: int, reach: int) -> BlockReadback:
        """Start a step that drafts `length` tokens a row; see `Launcher`."""
        reach = max(reach, self.entries + length + 1)  # what a row without tokens left touches of the null page
        packed = self._graphs.launch_rows(self._kind(length), start, reach, self._steps_of(length))
        assert packed is not None, "every number of rows and keys that an engine may have is captured"
        return BlockReadback(packed, len(start.rows))

    def capture(self, lengths: Iterable[int]) -> None:
        """Capture steps of so many draft tokens for all numbers of rows, which otherwise happens when one comes up first."""
        for (size, keys), length in product(self._graphs.shapes, lengths):
            if keys > self.entries + length:
                self._graphs.capture_rows(self._kind(length), size, keys, self._steps_of(length))

    def _kind(self, length: int) -> Key:
        return (length, self._number, self.entries, 0, 0, 0)

    def _steps_of(self, length: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        return lambda lanes, keys: self._run(lanes, length, keys)

    def _run(self, lanes: Tensor, length: int, keys: int) -> tuple[Tensor, Tensor]:
        """Packed blocks, twice; nobody wants the logits of the verification, which would be kept with the graph."""
        from miles_kernels.cuda.draft import accept_drafts, begin_drafts

        graphs, (last, pages) = self._graphs, self._graphs.state
        inputs = begin_drafts(
            lanes, last, self._where, pages, self._store.tokens,
            drafts=length, entries=self.entries, page_size=graphs.page_size, max_kv=keys,
        )  # fmt: skip
        drafted = self._draft(inputs, lanes, length, keys)
        _, packed = self._verify(inputs, lanes, drafted, keys)
        blocks = accept_drafts(inputs, drafted, packed, last, self._where)
        return blocks, blocks

    def _draft(self, inputs: Any, lanes: Tensor, length: int, keys: int) -> Tensor:
        """Draft tokens int64 [K, S], below 0 where the draft's scores are no numbers."""
        from miles_kernels.cuda.sample import draw

        size, (after, index, slots) = lanes.shape[1], inputs.entries
        state = self._model.project(self._store.values.index_select(0, slots))
        self._kv.begin(self._batch(inputs, 0, self.entries, keys), slots)
        made = self._model.step(state, after, index, self._kv, embed=self._embed)
        hidden = made.hidden.view(size, self.entries, -1)[:, -1].contiguous()
        carried = hidden if made.carried is made.hidden else made.carried.view(size, self.entries, -1)[:, -1].contiguous()
        places, slots, stands = inputs.places
        cos, sin = self._model.rope_rows(places[1:].flatten()) if length > 1 else (state, state)
        drawn: list[Tensor] = []
        for depth in range(length):
            if depth:
                part = slice((depth - 1) * size, depth * size)
                self._kv.begin(self._batch(inputs, depth, 1, keys), slots[depth])
                hidden, carried = self._model.step(
                    carried, drawn[-1], places[depth], self._kv, embed=self._embed, depth=depth + 1, rope=(cos[part], sin[part])
                )
            logits = self._model.policy_logits(hidden, self._head)
            heat = inputs.heat
            drawn.append(draw(logits, seed=lanes[4], sample_id=lanes[5], position=stands[depth], temperature=heat).token)
        return torch.stack(drawn)

    def _verify(self, inputs: Any, lanes: Tensor, drafted: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.decode import StepInputs
        from miles_kernels.cuda.draft import verify_drafts

        graphs, width, (last, pages) = self._graphs, len(drafted) + 1, self._graphs.state
        each, heat = verify_drafts(inputs, lanes, pages, drafted, graphs.page_size)
        token, position, slot, after, seed, sample_id = each
        batch = self._batch(inputs, width - 1, width, keys)
        nobody = self._constant(("nobody", len(token)), lambda: torch.full_like(token, len(last) - 1))
        return graphs.run(StepInputs(token, position, slot, batch, None, after, seed, sample_id, heat, nobody))

    def _batch(self, inputs: Any, which: int, queries: int, keys: int) -> Any:
        """How rows read their last `queries` keys, of those that pass `which` has."""
        from miles_kernels.cuda.attention import KVBatch

        lens, size = inputs.keys[which], self._graphs.page_size
        count, device = len(lens) + 1, lens.device
        first = self._constant(("first", count, queries), lambda: torch.arange(count, dtype=torch.int32, device=device) * queries)
        return KVBatch(first, lens, lens, inputs.table, size, queries, keys)

    def _constant(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that graphs read and nobody writes; made in the run before a capture, and kept."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]
