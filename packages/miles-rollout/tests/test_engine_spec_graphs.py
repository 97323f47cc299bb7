"""What captured speculative steps are given, without a GPU: graphs are direct calls, kernels at both ends plain loops."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_cases import SHAPE, TOKENIZER, batch_of
from test_engine_replay import DirectGraphs, Step, drive

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.ops.attention import table_plan
from miles_kernels.ops.sample import sample
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.replay_spec import GraphDrafter, SpecGraphs
from miles_rollout.engines.embedded.speculate_model import ModelProposer
from miles_spec.models import DraftModel, Eagle3Config, Eagle3Draft, MtpDraft


def slot_table(tables: Any, rows: Any, keys: int) -> np.ndarray:
    """Slots of `keys` positions (padded to 16) of each row, as the device's kernel writes them from the rows' pages."""
    position = np.arange(keys + -keys % 16)
    slots = np.zeros((len(rows), len(position)), np.int64)
    for i, row in enumerate(np.asarray(rows).tolist()):
        known = position[position < tables.capacity[row]]
        slots[i, : len(known)] = tables.slots_at(np.full(len(known), row), known)
    return slots


class DirectSpec(DirectGraphs, SpecGraphs):
    """Speculative steps run at once on the CPU."""

    def _verify(self, tokens: torch.Tensor, lanes: torch.Tensor, width: int, keys: int) -> Any:
        row, output, _, first, reach, _ = (field.tolist() for field in lanes[:6])
        assert set(output) == {self._idle_row} and first == [i * width for i in range(len(first))]
        assert max(reach) <= keys
        each = torch.stack([tokens[1] + 1, *(field.repeat_interleave(width) for field in lanes[6:])])
        firsts, last = [*first, len(first) * width], list(range(tokens.shape[1]))
        pages = self._pages[row, : keys // self._tables.page_size]
        nobody = [self._idle_row] * tokens.shape[1]
        return self._compute(
            Step(tokens[0].tolist(), tokens[1].tolist(), tokens[2].tolist(), firsts, reach, pages, last, each, nobody)
        )

    def _compute(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        decoder, features = self._decoder, self.features
        assert features is not None

        class Recording:
            logits = staticmethod(decoder.logits)

            def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, kv: Any) -> torch.Tensor:
                taps = features.taps()
                hidden = decoder(token_ids, positions, kv, taps=taps)
                features.store(torch.tensor(step.slots), token_ids, hidden, taps)
                return hidden

        self._decoder = Recording()  # type: ignore[assignment]
        try:
            return super()._compute(step)
        finally:
            self._decoder = decoder


class DirectDrafter(GraphDrafter):
    """The draft's graph body on the CPU."""

    def _batch(self, table: torch.Tensor, keys_of: torch.Tensor, queries: int, keys: int) -> Any:
        size, count = self._page_size, len(keys_of)
        assert int(keys_of.max()) <= keys
        slots = (table.long()[:, :, None] * size + torch.arange(size)).flatten(1)
        return table_plan(slots, [queries] * count, (keys_of - queries).tolist())

    def _draw(self, logits: Any, seed: Any, sample_id: Any, position: Any, temperature: Any) -> torch.Tensor:
        return sample(logits, seed=seed, sample_id=sample_id, position=position, temperature=temperature).token.clamp(min=0)


def build(config: EmbeddedConfig, pages: int, draft: DraftModel, *, captured: bool) -> EngineCore:
    core = EngineCore(random_decoder(SHAPE, 0), TOKENIZER, config, num_pages=pages, draft=draft)
    runner, tables = core._runner, core._tables
    assert core.speculator is not None and isinstance(core.speculator.proposer, ModelProposer)
    runner._fused = None
    if not captured:
        return core
    runner._last = torch.zeros(config.max_running + 1, dtype=torch.int64)
    graphs = DirectSpec(core._decoder, core._kv, tables, runner._last, 640, None)
    graphs.calls, graphs.features = {}, runner.features
    runner.graphs = graphs

    runner._table = lambda rows, keys: torch.from_numpy(slot_table(tables, rows, keys))  # type: ignore[method-assign]
    proposer = core.speculator.proposer
    proposer._table = functools.partial(slot_table, tables)  # type: ignore[method-assign]
    proposer._graphs = graphs
    weight = core._decoder.embed_tokens
    assert runner.features is not None
    proposer._drafter = DirectDrafter(draft, proposer.kv, runner.features, weight, core._decoder.head, tables.page_size, 1)
    return core


@pytest.mark.parametrize("seed", range(3))
def test_captured_drafts_and_verifications_are_the_eager_ones(seed: int):
    requests = [
        msgspec.structs.replace(
            request,
            return_prompt_logprobs=False,
            sampling=msgspec.structs.replace(request.sampling, n=1),
            sample_ids=request.sample_ids[:1],
        )
        for request in batch_of(14, seed)
    ]
    pages, rows = ((64, 16), (24, 5), (64, 4))[seed]
    config = EmbeddedConfig(
        num_pages=pages, max_running=rows, max_batched_tokens=200, prefill_chunk=24, draft_tokens=3 + seed, draft_adaptive=False,
        prefix_cache=False,  # the last entry of a shared page is that of whoever wrote last
    )  # fmt: skip
    policy = random_decoder(SHAPE, 0)
    draft: DraftModel = MtpDraft.from_trunk(policy)
    if seed == 2:
        eagle = Eagle3Config.of(SHAPE, draft_vocab_size=SHAPE.vocab_size // 2)
        draft = Eagle3Draft.from_trunk(policy, eagle, draft_ids=range(0, SHAPE.vocab_size // 2 * 2, 2))
    plain = drive(EngineCore(policy, TOKENIZER, config, num_pages=pages), requests, seed)
    eager = build(config, pages, draft, captured=False)
    assert drive(eager, requests, seed) == plain
    core = build(config, pages, draft, captured=True)
    assert drive(core, requests, seed) == plain
    graphs = core._runner.graphs
    assert isinstance(graphs, DirectSpec)
    assert sum(count for key, count in graphs.calls.items() if len(key) == 5) > 5, "verifications"
    assert sum(count for key, count in graphs.calls.items() if len(key) == 6) > 5, "drafts"
    assert eager.speculator is not None and core.speculator is not None
    mine, theirs = core.speculator.metrics(), eager.speculator.metrics()
    assert mine == theirs and mine["spec_num_accepted"] > 0, "the same drafts, so the same ones are accepted"
