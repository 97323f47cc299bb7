"""What a step of the embedded engine costs the host, without a GPU: `python tools/bench_host.py [--rows 1 32 128] [--parts]`.

Steps are scheduled, staged and taken in as on a GPU, but what a graph would compute is written down beforehand: every row draws
the same token, and of drafts of three one is accepted. Left out is what CUDA itself takes for a copy and a launch, which are as
many in both kinds of steps (one copy there unless the rows go on, one launch, one copy back). Prints microseconds of processor
time of the thread, least and median of the rounds, which take turns:

    plain    one token a row, one graph
    ahead    three drafts a row by an MTP layer, verified and accepted in the same graph
    history  the same from n-grams on the host, then a graph that verifies
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.replay_spec import SpecGraphs
from miles_rollout.engines.embedded.speculate_ahead import AheadSteps
from miles_rollout.engines.embedded.speculate_check import SHAPE, TOKENIZER, World
from miles_rollout.engines.embedded.speculate_model import ModelProposer
from miles_rollout.engines.embedded.state import Job
from miles_rollout.wire import GenerateRequest, SamplingParams
from miles_spec.draft import NgramDraft

KINDS = ("plain", "ahead", "history")
NUM_DRAFT, ACCEPTED, TOKEN, PAGE, CONTEXT = 3, 1, 7, 64, 8192
STEPS = 40
"""Of a round, whose positions all fit into a context."""


class Stub(SpecGraphs):
    """Graphs that have computed already."""

    def prepare(self, rows: int, vocab_size: int) -> None:
        """Room for the outputs of `rows` rows."""
        self.captures_prefill = False
        self._logits = torch.zeros(rows * (NUM_DRAFT + 1), vocab_size)
        self._packed = torch.full((2, rows * (NUM_DRAFT + 1)), TOKEN, dtype=torch.int32)
        self._blocks: np.ndarray = np.zeros((0, 0), np.int32)

    def _get(self, key: Any, clear: Any, run: Any) -> Any:
        self._captured[key] = key
        return key

    def _replay(self, captured: Any) -> Any:
        size, kind = captured[0], len(captured)
        count = size if kind == 2 else size * captured[1]
        return (None, self._ahead(size)) if kind == 8 else (self._logits[:count], self._packed[:, :count])

    def _ahead(self, size: int) -> torch.Tensor:
        if self._blocks.shape[1] != size:  # the first step: its positions have been sent
            self._blocks = np.full((3 + 2 * (NUM_DRAFT + 1), size), TOKEN, np.int32)
            self._blocks[:2] = np.array(((1 + ACCEPTED,), (NUM_DRAFT,)))
            self._blocks[2] = self._staging[self._turn][1][2 * size : 3 * size]
        else:
            self._blocks = self._blocks.copy()
            self._blocks[2] += 1 + ACCEPTED
        return torch.from_numpy(self._blocks)


def engine_of(kind: str, rows: int) -> EngineCore:
    """An engine in the middle of `rows` long completions."""
    shape = replace(SHAPE, hidden_size=16, head_dim=8, max_position_embeddings=CONTEXT)
    world = World(shape)
    policy = world.decoder()
    draft = {"plain": None, "ahead": world.model("mtp", policy), "history": NgramDraft()}[kind]
    config = EmbeddedConfig(
        num_pages=rows * (CONTEXT // PAGE) + rows + 8, max_running=rows, max_batched_tokens=64 * rows + 64, page_size=PAGE,
        prefix_cache=False, overlap=True, draft_tokens=NUM_DRAFT, draft_adaptive=False,
    )  # fmt: skip
    assert config.num_pages is not None
    core = EngineCore(policy, TOKENIZER, config, num_pages=config.num_pages, draft=draft)  # type: ignore[arg-type]
    runner, tables = core._runner, core._tables
    runner._fused, runner._last = None, torch.zeros(rows + 1, dtype=torch.int64)
    graphs = runner.graphs = Stub(policy, core._kv, tables, runner._last, CONTEXT, None)
    graphs.prepare(rows, shape.vocab_size)
    graphs.features, core._landing.tells_host = runner.features, True

    def table(which: Any, keys: int) -> torch.Tensor:
        pages = tables.pages[which, : -(-keys // PAGE)]
        return torch.from_numpy((pages[:, :, None] * PAGE + np.arange(PAGE)).reshape(len(which), -1))

    runner._table = table  # type: ignore[method-assign, assignment]
    if core.speculator is not None and isinstance(proposer := core.speculator.proposer, ModelProposer):
        proposer._table = lambda rows, keys: table(rows, keys).numpy()  # type: ignore[method-assign]
        steps = AheadSteps(graphs, proposer.model, proposer.kv, proposer._store, policy, entries=proposer.entries, number=1)
        proposer._graphs, proposer.ahead = graphs, steps
    sampling = SamplingParams(max_new_tokens=CONTEXT - 100, ignore_eos=True, seed=1)
    for i in range(rows):
        core.add(Job(GenerateRequest(request_id=str(i), input_ids=(5,) * 60, sample_ids=(i,), sampling=sampling), i, frozenset()))
    run(core, 6)
    return core


@torch.inference_mode()
def run(core: EngineCore, steps: int) -> float:
    """Microseconds a step."""
    began = time.thread_time_ns()
    for _ in range(steps):
        core.step()
    return (time.thread_time_ns() - began) / steps / 1e3


def parts_of(core: EngineCore) -> dict[str, float]:
    """Microseconds a step of its three parts; timing them adds a few."""
    spent: dict[str, int] = {}

    def timed(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return inner(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0) + time.thread_time_ns() - began

        setattr(owner, name, outer)

    timed(core._scheduler, "schedule")
    timed(core, "_launch")
    timed(core, "_land")
    run(core, 4 * STEPS)
    return {name.strip("_"): nanoseconds / (4 * STEPS) / 1e3 for name, nanoseconds in spent.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows | " + " | ".join(f"{kind}: least, median us" for kind in KINDS) + " | ahead / plain |")
    for rows in options.rows:
        cores = {kind: engine_of(kind, rows) for kind in KINDS}
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, core in cores.items():
                found[kind].append(run(core, STEPS))
        ratio = min(found["ahead"]) / min(found["plain"])
        cells = " | ".join(f"{min(each):.1f}, {statistics.median(each):.1f}" for each in found.values())
        print(f"| {rows} | {cells} | {ratio:.2f} |", flush=True)
        for kind, core in cores.items() if options.parts else ():
            print(f"  {kind}: " + ", ".join(f"{name} {us:.1f}" for name, us in parts_of(core).items()), flush=True)


if __name__ == "__main__":
    main()
