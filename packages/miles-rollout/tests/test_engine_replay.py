"""What captured steps are given, without a GPU: the graphs are direct calls here, the kernels at both ends plain loops."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from engine_cases import SHAPE, TOKENIZER, ask, batch_of

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.ops.attention import table_plan
from miles_kernels.ops.sample import sample
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.replay import StepGraphs, first_at_least, row_sizes
from miles_rollout.engines.embedded.state import Job


class Step(NamedTuple):
    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    firsts: list[int]
    keys: list[int]
    pages: torch.Tensor
    last: list[int]
    lanes: torch.Tensor
    output_rows: list[int]


class DirectGraphs(StepGraphs):
    """Steps run at once, in float32 on the CPU, from what was staged for the device."""

    calls: dict[Any, int]

    def _get(self, key: Any, clear: Callable[[], None], run: Callable[[], Any]) -> Any:
        if key not in self.calls:
            clear()
            run()  # the warm-up of a capture, which must leave no trace
            self._captured[key] = key
        self.calls[key] = self.calls.get(key, 0) + 1
        return run

    def _replay(self, captured: Any) -> Any:
        return captured()

    def _decode(self, lanes: torch.Tensor, keys: int) -> Any:
        rows, tokens, positions, slots = (field.tolist() for field in lanes[:4])
        size = self._tables.page_size
        ids = [int(self._last[row]) if token < 0 else token for row, token in zip(rows, tokens, strict=True)]
        for row, position, slot in zip(rows, positions, slots, strict=True):
            self._pages[row, position // size] = slot // size
        reach = [position + 1 for position in positions]
        assert max(reach) <= keys
        pages = self._pages[rows, : keys // size]
        count = len(rows)
        return self._compute(
            Step(ids, positions, slots, [*range(count), count], reach, pages, list(range(count)), self._draws(lanes, reach), rows)
        )

    def _mixed(self, tokens: torch.Tensor, lanes: torch.Tensor, queries: int, keys: int) -> Any:
        ids = [int(self._last[-1 - token]) if token < 0 else token for token in tokens[0].tolist()]
        row, output, last, first, reach, position = (field.tolist() for field in lanes[:6])
        firsts = [*first, len(ids)]
        assert firsts[0] == 0 and max(b - a for a, b in zip(firsts, firsts[1:], strict=False)) <= queries
        assert max(reach) <= keys
        pages = self._pages[row, : keys // self._tables.page_size]
        fields = torch.stack((torch.tensor(position), *lanes[6:]))
        return self._compute(Step(ids, tokens[1].tolist(), tokens[2].tolist(), firsts, reach, pages, last, fields, output))

    def _draws(self, lanes: torch.Tensor, positions: list[int]) -> torch.Tensor:
        return torch.stack((torch.tensor(positions), *lanes[4:]))

    def _compute(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._tables.page_size
        lens = [b - a for a, b in zip(step.firsts, step.firsts[1:], strict=False)]
        assert sum(lens) == len(step.token_ids), "a token without a sequence would read what was left there"
        live = [i for i, length in enumerate(lens) if length]
        slots = (step.pages.long()[:, :, None] * size + torch.arange(size)).flatten(1)
        plan = table_plan(slots[live], [lens[i] for i in live], [step.keys[i] - lens[i] for i in live])
        self._kv.begin(plan, torch.tensor(step.slots))
        hidden = self._decoder(torch.tensor(step.token_ids), torch.tensor(step.positions), self._kv)
        logits = self._decoder.logits(hidden[step.last])
        position, seed, sample_id, heat = step.lanes
        temperature = torch.from_numpy(heat.numpy().astype(np.int32).view(np.float32).copy())
        out = sample(logits, seed=seed, sample_id=sample_id, position=position, temperature=temperature)
        self._kv._pool[:, :, :, :size] = 0
        for row, token in zip(step.output_rows, out.token.tolist(), strict=True):
            self._last[row] = max(token, 0)
        return logits, torch.stack((out.token.to(torch.int32), out.logprob.view(torch.int32)))


def with_direct_graphs(config: EmbeddedConfig, num_pages: int) -> EngineCore:
    core = EngineCore(random_decoder(SHAPE, 0), TOKENIZER, config, num_pages=num_pages)
    runner, tables = core._runner, core._tables
    runner._fused = None
    runner._last = torch.zeros(config.max_running + 1, dtype=torch.int64)
    graphs = DirectGraphs(core._decoder, core._kv, tables, runner._last, 640, None)
    graphs.calls = {}
    runner.graphs = graphs

    def table(rows: np.ndarray, keys: int) -> torch.Tensor:
        position = np.arange(keys + -keys % 16)
        slots = np.zeros((len(rows), len(position)), np.int64)
        for i, row in enumerate(np.asarray(rows).tolist()):
            known = position[position < tables.capacity[row]]
            slots[i, : len(known)] = tables.slots_at(np.full(len(known), row), known)
        return torch.from_numpy(slots)

    runner._table = table  # type: ignore[method-assign]  # on a GPU the tables of slots are not kept
    return core


@torch.inference_mode()
def drive(core: EngineCore, requests: list[Any], seed: int) -> dict[str, Any]:
    """Requests that come one by one."""
    rng = random.Random(seed)
    waiting = [Job(request, i, frozenset((2,))) for i, request in enumerate(requests)]
    done = {}
    while waiting or core.has_work:
        while waiting and (not core.has_work or rng.random() < 0.4):
            core.add(waiting.pop())
        done.update({delivery.item.request_id: delivery.item.completions for delivery in core.step()})
    assert core.metrics()["kv_used_ratio"] == 0
    return done


@pytest.mark.parametrize("seed", range(4))
def test_captured_steps_are_given_what_eager_ones_are(seed: int):
    requests = [msgspec.structs.replace(request, return_prompt_logprobs=False) for request in batch_of(14, seed)]
    pages, rows = ((64, 16), (20, 5))[seed % 2]
    config = EmbeddedConfig(num_pages=pages, max_running=rows, max_batched_tokens=64, prefill_chunk=24)
    expected = drive(EngineCore(random_decoder(SHAPE, 0), TOKENIZER, config, num_pages=pages), requests, seed)
    core = with_direct_graphs(msgspec.structs.replace(config, overlap=seed != 3), pages)
    assert drive(core, requests, seed) == expected
    graphs = core._runner.graphs
    assert isinstance(graphs, DirectGraphs)
    assert sum(count for key, count in graphs.calls.items() if len(key) == 2) > 10, "decode steps"
    assert sum(count for key, count in graphs.calls.items() if len(key) == 4) > 3, "mixed steps"


@torch.inference_mode()
def test_a_stale_page_table_is_noticed(monkeypatch: pytest.MonkeyPatch):
    config = EmbeddedConfig(num_pages=64, max_running=8, max_batched_tokens=64, prefill_chunk=24, overlap=True)
    requests = [msgspec.structs.replace(request, return_prompt_logprobs=False) for request in batch_of(10, 1)]
    expected = drive(with_direct_graphs(config, 64), requests, 1)
    monkeypatch.setattr(StepGraphs, "_refresh_pages", lambda self, rows, needed: None)
    assert drive(with_direct_graphs(config, 64), requests, 1) != expected


@torch.inference_mode()
@pytest.mark.parametrize("told", [True, False])
def test_pages_reached_between_captured_steps_are_known_to_them(monkeypatch: pytest.MonkeyPatch, told: bool):
    """Steps of a prompt that wants its log-probabilities are not captured; its rows reach a page, and then it is aborted."""
    config = EmbeddedConfig(num_pages=64, max_running=4, max_batched_tokens=32, prefill_chunk=4, prefix_cache=False)
    plain = EngineCore(random_decoder(SHAPE, 0), TOKENIZER, config, num_pages=64)
    if not told:
        monkeypatch.setattr(StepGraphs, "gap", lambda self: None)
    found = []
    for core in (plain, with_direct_graphs(config, 64)):
        core.add(Job(ask("a", (5, 6, 7), max_new_tokens=60), 0, frozenset()))
        for step in range(100):
            if step == 8:
                core.add(Job(ask("b", (9,) * 200, max_new_tokens=4, return_prompt_logprobs=True), 1, frozenset()))
            ready = core.abort("b") if step == 45 else []
            found += [delivery.item for delivery in ready + core.step() if delivery.item.request_id == "a"]
            if not core.has_work:
                break
    mine, theirs = (result.completions for result in found)
    assert (mine == theirs) is told


def test_sizes_ascend_and_hold_the_largest():
    for most in (1, 3, 8, 100, 256, 300, 4000):
        sizes = row_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(first_at_least(sizes, count) is not None for count in range(1, most + 1))
    assert first_at_least((4, 16), 17) is None


def test_inputs_wait_in_their_buffer_until_they_are_copied():
    class Slow:
        """A copy that takes a while."""

        def __init__(self) -> None:
            self.left = 0

        def record(self) -> None:
            self.left = 3

        def query(self) -> bool:
            self.left -= 1
            return self.left <= 0

    core = EngineCore(random_decoder(SHAPE, 0), TOKENIZER, EmbeddedConfig(max_running=2), num_pages=8)
    last = torch.zeros(3, dtype=torch.int64)
    graphs = StepGraphs(core._decoder, core._kv, core._tables, last, 64, None)
    graphs._copied = [Slow() for _ in graphs._staging]
    for turn in range(3 * len(graphs._staging)):
        array = graphs._buffer()
        assert graphs._copied[graphs._turn].left <= 0, "what a step waits for is overwritten"
        array[:4] = turn
        graphs._upload(4)
        assert graphs._inputs[:4].tolist() == [turn] * 4
