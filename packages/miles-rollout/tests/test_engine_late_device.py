"""A device that is behind, played on the CPU: copies and graphs run when somebody waits, as late as a stream may run them.

What is copied is read when the copy runs, a graph's outputs are overwritten by its next replay, and the tables of rows and pages
are the device's own: what the host rewrites too early, enters too late or reads too early comes out as other tokens.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from test_engine_replay import Step
from test_engine_spec_graphs import DirectDrafter, DirectSpec, slot_table

from miles_kernels.cuda import draft as draft_kernels
from miles_kernels.cuda import sample as sample_kernels
from miles_kernels.cuda.draft import DraftInputs
from miles_kernels.ops.attention import decode_plan
from miles_kernels.ops.sample import sample
from miles_rollout.engines.embedded import core as core_module
from miles_rollout.engines.embedded import flight, replay
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.replay_spec import EntryKeeper
from miles_rollout.engines.embedded.speculate_ahead import AheadSteps
from miles_rollout.engines.embedded.speculate_check import World, digest, random_requests, serve
from miles_rollout.engines.embedded.speculate_model import ModelProposer
from miles_rollout.wire import GenerateRequest, SamplingParams
from miles_spec.control import Controller

WORLD = World()
MADE: list[Any] = []
"""Speculators of the engines that were served with."""
REFERENCE = EmbeddedConfig(num_pages=200, max_running=16, max_batched_tokens=256)


class Device:
    """One stream: what was pushed runs in order, when somebody waits for it."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self.num_done = self.num_pushed = self.longest = 0

    def push(self, work: Callable[[], None]) -> int:
        self._queue.append(work)
        self.num_pushed += 1
        self.longest = max(self.longest, len(self._queue))
        return self.num_pushed

    def run(self, until: int | None = None) -> None:
        while self.num_done < (self.num_pushed if until is None else until):
            self._queue.popleft()()
            self.num_done += 1


class Event:
    """Asked whether it was reached, it lets the device do one thing more."""

    def __init__(self, device: Device) -> None:
        self.device, self.mark = device, 0

    def record(self) -> None:
        self.mark = self.device.num_pushed

    def query(self) -> bool:
        if self.device.num_done < self.mark:
            self.device.run(self.device.num_done + 1)
        return self.device.num_done >= self.mark


class LateReadback(flight.Readback):
    """Copied to the host when its turn comes."""

    device: Device

    def __init__(self, packed: torch.Tensor, count: int) -> None:
        super().__init__(packed, count)
        self._device = self.device
        self._mark = self._device.push(self._copy)

    def _copy(self) -> None:
        self._host = self._host.clone()

    def wait_packed(self) -> np.ndarray:
        self._device.run(self._mark)
        return super().wait_packed()


class LateGraphs(DirectSpec):
    """Graphs whose inputs, launches and page tables wait on the device."""

    device: Device

    def _get(self, key: Any, clear: Any, run: Any) -> Any:
        if key not in self._captured:
            self.device.run()  # a capture waits for the stream
            clear()
            self._captured[key] = tuple(part.clone() for part in run())  # type: ignore[assignment]
        self.calls[key] = self.calls.get(key, 0) + 1
        return run, self._captured[key]

    def _replay(self, captured: Any) -> Any:
        run, outputs = captured

        def replayed() -> None:
            for kept, made in zip(outputs, run(), strict=True):
                kept.copy_(made)

        self.device.push(replayed)
        return outputs

    def _upload(self, used: int) -> None:
        staged = self._staging[self._turn][0]
        self.device.push(lambda: self._inputs[:used].copy_(staged[:used]))
        event = self._copied[self._turn]
        if event is not None:
            event.record()

    def _enter_pages(self, rows: np.ndarray, pages: np.ndarray) -> None:
        self.device.push(lambda: super(LateGraphs, self)._enter_pages(rows, pages))

    def verify(self, *arguments: Any) -> Any:
        made = super().verify(*arguments)
        self.device.run()  # its logits may be read by kernels that are launched one by one
        return made

    def draft(self, *arguments: Any) -> Any:
        super().draft(*arguments)  # `cpu` waits for the stream
        self.device.run()
        return super().draft(*arguments)

    def run(self, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
        decoder, features = self._decoder, self.features
        assert features is not None
        self._kv.begin(step.batch, step.slots)
        taps = features.taps()
        hidden = decoder(step.token_ids, step.positions, self._kv, taps=taps)
        features.store(step.slots, step.token_ids, hidden, taps)
        logits = decoder.logits(hidden)
        drawn = sample(
            logits, seed=step.seed, sample_id=step.sample_id, position=step.next_positions, temperature=step.temperature
        )
        self._kv._pool[:, :, :, : self.page_size] = 0
        return logits, torch.stack((drawn.token.to(torch.int32), drawn.logprob.view(torch.int32)))

    def _compute(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        if self.features is not None:
            return super()._compute(step)
        return super(DirectSpec, self)._compute(step)


class LateSteps(AheadSteps):
    """The body of a step with loops for its kernels; it reads the device's tables when it runs."""

    def _batch(self, inputs: Any, which: int, queries: int, keys: int) -> Any:
        lens, size = inputs.keys[which].long(), self._graphs.page_size
        assert int(lens.max()) <= keys == inputs.table.shape[1] * size, "keys are read behind the table"
        slots = (inputs.table.long()[:, :, None] * size + torch.arange(size)).flatten(1)
        seen = lens[:, None] - queries + 1 + torch.arange(queries)  # none for entries before the first token, whom nobody reads
        return decode_plan(slots.repeat_interleave(queries, 0), seen.clamp(min=1).flatten())


def begin_drafts(
    lanes: Any, last: Any, where: Any, pages: Any, tokens: Any, *, drafts: int, entries: int, page_size: int, max_kv: int
) -> DraftInputs:
    row, token, position, limit = lanes[:4].clone()
    token, position = torch.where(token < 0, last[row], token), torch.where(position < 0, where[row], position)
    dead = position >= limit
    count = torch.where(dead, drafts, (limit - position - 1).clamp(max=drafts))
    row, token = torch.where(dead, len(last) - 1, row), torch.where(dead, 0, token)
    position = torch.where(dead, entries, position)
    table = pages[row, : max_kv // page_size]

    def slots(index: torch.Tensor) -> torch.Tensor:
        return table.gather(1, index // page_size).long() * page_size + index % page_size

    index = position[:, None] + torch.arange(-entries, 0)
    real, index = index >= 0, index.clamp(min=0)
    follows = torch.where(real[:, :-1], tokens[slots(index + 1)[:, :-1]], 0)
    after = torch.cat((follows, token[:, None]), 1)
    made = torch.stack((after.flatten(), index.flatten(), torch.where(real, slots(index), 0).flatten()))
    each = torch.arange(drafts)[:, None]
    reached = (each > 0) & (each < count)
    place = position + each - 1
    slot = torch.where(reached, slots(torch.where(reached, place, 0).T).T, 0)
    keys = torch.cat((position + torch.minimum(each, (count - 1).clamp(min=0)), (position + 1 + count)[None]))
    heat = lanes[6].to(torch.int32).view(torch.float32)
    places = torch.stack((place, slot, position + each + 1))
    return DraftInputs(torch.stack((row, position, token, count)), heat, table, made, places, keys.to(torch.int32))


def verify_drafts(inputs: DraftInputs, lanes: Any, pages: Any, drafted: Any, page_size: int) -> Any:
    drafts, size = drafted.shape
    row, position, token, count = inputs.state
    place = torch.arange(drafts + 1) - (drafts - count)[:, None]
    at = position[:, None] + place
    value = torch.cat((token[:, None], drafted.T), 1).gather(1, place.clamp(min=0)).clamp(min=0)
    page = pages[row[:, None], torch.where(place < 0, 0, at) // page_size].long()
    slot = torch.where(place < 0, 0, page * page_size + at % page_size)
    each = [torch.where(place < 0, 0, value), at, slot, at + 1, *(lanes[i][:, None].expand(size, drafts + 1) for i in (4, 5))]
    return torch.stack([part.flatten() for part in each]), inputs.heat.repeat_interleave(drafts + 1)


def accept_drafts(inputs: DraftInputs, drafted: Any, packed: Any, last: Any, where: Any) -> torch.Tensor:
    drafts, size = drafted.shape
    drawn, bits = packed.view(2, size, drafts + 1)
    out = torch.zeros((3 + 2 * (drafts + 1), size), dtype=torch.int32)
    for lane, (row, position, _, count) in enumerate(inputs.state.T.tolist()):
        mine = drawn[lane, drafts - count :].tolist()
        accepted = next((i for i in range(count) if mine[i] != int(drafted[i, lane])), count)
        last[row], where[row] = max(mine[accepted], 0), position + accepted + 1
        out[:3, lane] = torch.tensor((0 if row == len(last) - 1 else accepted + 1, count, position))
        out[3 : 4 + count, lane] = drawn[lane, drafts - count :]
        out[4 + drafts : 5 + drafts + count, lane] = bits[lane, drafts - count :]
    return out


def in_order(device: Device, function: Any) -> Any:
    """A function that launches kernels of its own: here they run at once, so what was launched before must have run."""

    def called(*arguments: Any, **named: Any) -> Any:
        if not (isinstance(arguments[0], list) and not arguments[0]):  # no pages to copy: nothing is launched
            device.run()
        return function(*arguments, **named)

    return called


def make_late(core: EngineCore, device: Device, monkeypatch: pytest.MonkeyPatch, *, waits: bool = True) -> None:
    """Give the engine a device that is behind. Without `waits` staging buffers are written again at any time."""
    runner, tables = core._runner, core._tables
    runner._fused = None
    runner._last = torch.zeros(len(tables.position) + 1, dtype=torch.int64)
    graphs = LateGraphs(core._decoder, core._kv, tables, runner._last, WORLD.shape.max_position_embeddings, None)
    graphs.device, graphs.calls, graphs.features = device, {}, runner.features
    graphs._copied = [Event(device) if waits else None for _ in graphs._staging]
    graphs.captures_prefill = core._config.cuda_graph_prefill
    runner.graphs = graphs
    core._landing.tells_host = True

    runner._table = lambda rows, keys: torch.from_numpy(slot_table(tables, rows, keys))  # type: ignore[method-assign]
    for owner, names in ((runner, ("forward", "copy_pages", "move", "_draw")), (core._scheduler, ("_finish_prefill",))):
        for name in names:
            monkeypatch.setattr(owner, name, in_order(device, getattr(owner, name)))
    LateReadback.device = device
    for module in (replay, flight):
        monkeypatch.setattr(module, "Readback", LateReadback)
    monkeypatch.setattr(sample_kernels, "draw", lambda logits, **keys: sample(logits, **keys))
    for stand_in in (begin_drafts, verify_drafts, accept_drafts):
        monkeypatch.setattr(draft_kernels, stand_in.__name__, stand_in)
    if core.speculator is None:
        return
    proposer = core.speculator.proposer
    assert isinstance(proposer, ModelProposer) and runner.features is not None
    weight, head, store = core._decoder.embed_tokens, core._decoder.head, runner.features
    proposer._table = functools.partial(slot_table, tables)  # type: ignore[method-assign]
    proposer._graphs = graphs
    proposer._drafter = DirectDrafter(proposer.model, proposer.kv, store, weight, head, tables.page_size, 1)
    proposer.ahead = LateSteps(graphs, proposer.model, proposer.kv, store, core._decoder, entries=proposer.entries, number=1)
    captured = core._config.draft_catch_up == "captured"
    if captured:
        proposer._keeper = EntryKeeper(proposer.model, proposer.kv, store, weight, 1)
    for name in ("_recycled", *(() if captured else ("_advance",))):
        monkeypatch.setattr(proposer, name, in_order(device, getattr(proposer, name)))


def served(
    monkeypatch: pytest.MonkeyPatch,
    config: EmbeddedConfig,
    requests: list[Any],
    draft: str | None,
    *,
    shaken: bool = False,
    waits: bool = True,
    start: Callable[..., None] | None = None,
) -> tuple[str, LateGraphs, Device]:
    """Digest of what comes out, with the graphs and the device."""
    device = Device()
    made: list[Any] = []

    def between(core: EngineCore, step: int) -> list[Any]:
        if not made:
            MADE.append(core.speculator)
            (start or make_late)(core, device, monkeypatch, waits=waits)
            made.append(core._runner.graphs)
        return core.retract_all() if shaken and step in (5, 12, 40) else []

    model = None if draft is None else WORLD.model(draft, WORLD.decoder())
    results, _ = serve(requests, config, model, between, world=WORLD)
    return digest(results), made[0], device


def comes_out_right(
    monkeypatch: pytest.MonkeyPatch,
    config: EmbeddedConfig,
    requests: list[Any],
    draft: str | None,
    expected: str,
    *,
    waits: bool = True,
) -> bool:
    """For controls, which may end in other numbers or in none."""
    try:
        return served(monkeypatch, config, requests, draft, waits=waits)[0] == expected
    except AssertionError:
        return False


class Restless(Controller):
    """Drafts in six steps of sixteen."""

    def choose(self, num_rows: int) -> int:
        self._steps += 1
        return self.most if self._steps % 16 < 6 else 0


def lasting(request: GenerateRequest) -> SamplingParams:
    """Thirty-six tokens."""
    return msgspec.structs.replace(request.sampling, max_new_tokens=36, ignore_eos=True, n=1, stop=(), stop_token_ids=())


def requests_of(seed: int, filters: bool = False) -> list[GenerateRequest]:
    requests = []
    for request in random_requests(random.Random(seed), 6, WORLD.shape):
        sampling = msgspec.structs.replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, 25))
        if not filters:
            sampling = msgspec.structs.replace(sampling, top_k=-1, top_p=1.0, min_p=0.0, min_new_tokens=0)
        requests.append(msgspec.structs.replace(request, sampling=sampling))
    last = requests[-1]  # one goes on to the end of its context
    room = WORLD.shape.max_position_embeddings - len(last.input_ids)
    sampling = msgspec.structs.replace(last.sampling, n=1, max_new_tokens=room, ignore_eos=True, stop=(), stop_token_ids=())
    return [*requests[:-1], msgspec.structs.replace(last, sampling=sampling, sample_ids=last.sample_ids[:1])]


def test_catching_up_by_keys_alone_drafts_the_same(monkeypatch: pytest.MonkeyPatch):
    """Drafts that are silent for ten steps in sixteen: what they propose then shows every entry."""
    requests = [msgspec.structs.replace(request, sampling=lasting(request)) for request in requests_of(5)[:3]]
    reference, _ = serve(requests, REFERENCE, world=WORLD)
    figures = {}
    for catch_up in ("whole", "keys", "captured", "wrong"):
        own = EmbeddedConfig(
            num_pages=60, max_running=8, max_batched_tokens=60, prefill_chunk=24, overlap=True, draft_tokens=3,
            draft_catch_up="captured" if catch_up == "wrong" else catch_up,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(core_module, "make_controller", lambda config: Restless(config.draft_tokens))
            if catch_up == "wrong":
                patch.setattr(EntryKeeper, "run", lambda self, entries: entries[0])
            found, graphs, _ = served(patch, own, requests, "mtp")
        assert found == digest(reference)
        figures[catch_up] = MADE[-1].metrics()["spec_num_accepted"], MADE[-1].metrics()["spec_num_drafted"]
        kept = sum(count for key, count in graphs.calls.items() if len(key) == 7)
        assert (kept > 0) == (catch_up in ("captured", "wrong"))
    assert figures["whole"] == figures["keys"] == figures["captured"] != figures["wrong"]


@pytest.mark.parametrize(("draft", "num_draft", "pages", "filters"), [("mtp", 6, 24, False), ("eagle3", 2, 60, True)])
def test_steps_that_draft_on_a_late_device(
    monkeypatch: pytest.MonkeyPatch, draft: str, num_draft: int, pages: int, filters: bool
):
    requests = requests_of(num_draft, filters)
    reference, _ = serve(requests, REFERENCE, world=WORLD)
    config = EmbeddedConfig(
        num_pages=pages, max_running=8, max_batched_tokens=120, prefill_chunk=24, overlap=True, draft_tokens=num_draft,
        draft_adaptive=False,
    )  # fmt: skip
    found, graphs, device = served(monkeypatch, config, requests, draft, shaken=num_draft == 6)
    assert found == digest(reference)
    kind = 5 if filters else 8  # verifications of drafts that the host has seen; steps that draft on the device
    assert sum(count for key, count in graphs.calls.items() if len(key) == kind) > 20
    assert device.longest > 3, "the device was behind"


def test_prompts_shorter_than_a_draft_are_drafted_for_on_the_device(monkeypatch: pytest.MonkeyPatch):
    """A row has fewer entries than a step makes again; those that it lacks are nobody's."""
    requests = [
        GenerateRequest(
            request_id=f"r{i}", input_ids=tuple(range(5, 6 + i % 3)), sample_ids=(i,),
            sampling=SamplingParams(max_new_tokens=12 + i, ignore_eos=True, seed=3),
        )
        for i in range(9)
    ]  # fmt: skip
    reference, _ = serve(requests, REFERENCE, world=WORLD)
    config = EmbeddedConfig(
        num_pages=60, max_running=4, max_batched_tokens=80, overlap=True, draft_tokens=6, draft_adaptive=False
    )
    found, graphs, _ = served(monkeypatch, config, requests, "mtp")
    assert found == digest(reference)
    kinds = {len(key) for key, count in graphs.calls.items() if count}
    assert 8 in kinds and not kinds & {5, 6}, "no step was drafted for by the host"


def test_a_page_entered_late_is_noticed(monkeypatch: pytest.MonkeyPatch):
    requests = requests_of(3)
    reference, _ = serve(requests, REFERENCE, world=WORLD)
    config = EmbeddedConfig(
        num_pages=200, max_running=8, max_batched_tokens=120, overlap=True, draft_tokens=3, draft_adaptive=False
    )
    refresh = replay.StepGraphs._refresh_pages
    monkeypatch.setattr(replay.StepGraphs, "_refresh_pages", lambda self, rows, needed: refresh(self, rows, needed - 1))
    assert not comes_out_right(monkeypatch, config, requests, "mtp", digest(reference))


@pytest.mark.parametrize("waits", [True, False])
def test_a_prompt_in_many_chunks_on_a_late_device(monkeypatch: pytest.MonkeyPatch, waits: bool):
    """Nobody waits for steps that draw nothing; their inputs must outlive the wait."""
    rng = random.Random(1)
    requests = [
        GenerateRequest(
            request_id=f"r{i}",
            input_ids=tuple(rng.randrange(4, WORLD.shape.vocab_size) for _ in range(200)),
            sample_ids=(i,),
            sampling=SamplingParams(max_new_tokens=8, ignore_eos=True, seed=3),
        )
        for i in range(2)
    ]
    reference, _ = serve(requests, REFERENCE, world=WORLD)
    config = EmbeddedConfig(num_pages=60, max_running=2, max_batched_tokens=16, prefill_chunk=5, prefix_cache=False, overlap=True)
    if not waits:  # the ring overwrites what has not been copied
        assert not comes_out_right(monkeypatch, config, requests, None, digest(reference), waits=False)
        return
    found, graphs, device = served(monkeypatch, config, requests, None)
    assert found == digest(reference)
    assert device.longest > 4 and any(len(key) == 4 for key in graphs.calls)


def test_steps_captured_at_the_start_are_all_that_come_up(monkeypatch: pytest.MonkeyPatch):
    requests = [request for request in requests_of(8) if len(request.input_ids) > 5][:4]
    reference, _ = serve(requests, REFERENCE, world=WORLD)
    config = EmbeddedConfig(num_pages=60, max_running=4, max_batched_tokens=120, overlap=True, draft_tokens=3)
    ahead: list[set[Any]] = []

    def late(core: EngineCore, device: Device, patch: pytest.MonkeyPatch, *, waits: bool = True) -> None:
        make_late(core, device, patch, waits=waits)
        core._capture_lengths()
        ahead.append({key for key in core._runner.graphs._captured if len(key) in (2, 8)})  # type: ignore[union-attr]

    found, graphs, _ = served(monkeypatch, config, requests, "mtp", start=late)
    used = {key for key in graphs._captured if len(key) in (2, 8)}
    assert found == digest(reference) and used == ahead[0]
    assert len({key[2] for key in used if len(key) == 8}) == 3
