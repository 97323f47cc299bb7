"""Speculative steps that start before the tokens of the one before are known: the host's part, over a device that is played."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.flight import BlockReadback, Blocks, Start
from miles_rollout.engines.embedded.scheduler import Batch
from miles_rollout.engines.embedded.speculate_check import Arm, World, digest, random_requests, serve

WORLD = World()


class Played:
    """A `Launcher` that computes at once what a device would, and keeps it from the host until it waits."""

    def __init__(self, core: EngineCore, *, off_by_one: bool = False) -> None:
        self.core, self.off_by_one = core, off_by_one
        rows = len(core._tables.position)
        self.where, self.last = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.num_launched = self.num_unsure = self.num_dead = 0

    def launch(self, start: Start, length: int, reach: int) -> BlockReadback:
        tables, rows = self.core._tables, start.rows
        kept = tables.position.copy(), tables.last_token.copy()
        unsure = start.position < 0
        position = np.where(unsure, self.where[rows], start.position)
        drawn_before = np.where(unsure, self.last[rows], tables.last_token[rows])  # a plain step of the CPU has left it there
        tables.position[rows] = position
        tables.last_token[rows] = np.where(start.tokens < 0, drawn_before, start.tokens)
        alive = position < start.limit
        touched = np.minimum(position + length + 1, start.limit)[alive]
        assert (touched <= reach).all(), "more is touched than was promised"
        assert (tables.capacity[rows][alive] >= touched).all(), "pages are missing"
        blocks = Blocks(np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64), position, *self._nothing(len(rows), length))
        if alive.any():
            self._run(rows[alive], np.flatnonzero(alive), start.limit[alive], length, blocks)
        tables.position[:], tables.last_token[:] = kept
        self.num_launched += 1
        self.num_unsure += int(unsure.sum())
        self.num_dead += int((~alive).sum())
        return Held(blocks)  # type: ignore[return-value]

    @staticmethod
    def _nothing(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((length + 1, rows), -7, np.int64), np.zeros((length + 1, rows), np.float32)

    def _run(self, rows: np.ndarray, lanes: np.ndarray, limit: np.ndarray, length: int, blocks: Blocks) -> None:
        core, tables = self.core, self.core._tables
        speculator, runner = core.speculator, core._runner
        assert speculator is not None
        owners = [tables.tail.owners[row] for row in rows]
        position = tables.position[rows].copy()
        drafts = speculator.proposer.propose(owners, np.minimum(length, limit - position - 1))  # type: ignore[arg-type]
        logits = runner.forward(Batch(rows, [], drafts), tokens_known=True)
        tables.position[rows] += 1
        drawn = runner.draw(logits, [], rows, drafts).wait()
        assert not isinstance(drawn, Blocks)
        if drafts is None:
            counts, starts, drafted = np.ones(len(rows), np.int64), np.arange(len(rows)), np.zeros(len(rows), np.int64)
        else:
            accepted = speculator.accept(drafts, drawn.token_ids, len(rows))
            counts, drafted = accepted.counts + 1, drafts.counts
            starts = np.cumsum(drafts.counts + 1) - drafts.counts - 1
        for i, lane in enumerate(lanes):
            part = slice(starts[i], starts[i] + counts[i])
            blocks.tokens[: counts[i], lane] = drawn.token_ids[part]
            blocks.logprobs[: counts[i], lane] = drawn.logprobs[part]
            self.last[rows[i]] = drawn.token_ids[part][-1]
        blocks.counts[lanes], blocks.drafted[lanes] = counts, drafted
        self.where[rows] = position + counts + self.off_by_one


class Held:
    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def wait(self) -> Blocks:
        return self.blocks


def requests_of(seed: int, plain_share: float = 1.0) -> list:
    rng = random.Random(seed)
    requests = []
    for request in random_requests(rng, 12, WORLD.shape):
        if rng.random() < plain_share:
            sampling = msgspec.structs.replace(request.sampling, top_k=-1, top_p=1.0, min_p=0.0, min_new_tokens=0)
            request = msgspec.structs.replace(request, sampling=sampling)
        requests.append(request)
    return requests


def served(arm: Arm, requests: list, off_by_one: bool = False) -> tuple[str, list[Played]]:
    """Digest of what an engine with played steps makes, and who played."""
    players: list[Played] = []
    policy = WORLD.decoder()

    def between(core: EngineCore, step: int) -> list:
        speculator = core.speculator
        assert speculator is not None
        if arm.draft == "swap" and step and step % 7 == 0:
            speculator.use(WORLD.model("mtp" if step % 2 else "eagle3", policy))
        if speculator.proposer.ahead is None:
            players.append(Played(core, off_by_one=off_by_one))
            speculator.proposer.ahead = players[-1]  # type: ignore[misc]
        return core.retract_all() if arm.shaken and step in (5, 12, 40) else []

    config = msgspec.structs.replace(arm.config, draft_tokens=arm.num_draft, draft_adaptive=arm.adaptive)
    results, _ = serve(requests, config, WORLD.model("mtp", policy), between, world=WORLD)
    return digest(results), players


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("draft", "pages", "running"), [("mtp", 200, 16), ("mtp", 26, 8), ("swap", 64, 16)])
def test_tokens_and_log_probabilities_are_those_of_plain_decoding(draft: str, pages: int, running: int, adaptive: bool):
    requests = requests_of(pages + running, 0.8 if draft == "swap" else 1.0)
    reference, _ = serve(requests, EmbeddedConfig(num_pages=200, max_running=16, max_batched_tokens=256), world=WORLD)
    launched = unsure = dead = 0
    for num_draft in (2, 5):
        config = EmbeddedConfig(num_pages=pages, max_running=running, max_batched_tokens=running * 8 + 40, overlap=True)
        found, players = served(Arm(draft, num_draft, adaptive, config, shaken=num_draft == 5), requests)
        assert found == digest(reference), (draft, num_draft)
        launched += sum(player.num_launched for player in players)
        unsure += sum(player.num_unsure for player in players)
        dead += sum(player.num_dead for player in players)
    if not adaptive:
        assert draft == "swap" or (launched > 20 and unsure > 50), "steps run ahead of the host"
        assert dead > 0 or draft == "swap", "a row that had all its tokens was launched once more"


def test_a_device_that_loses_its_place_is_noticed():
    requests = requests_of(3)
    config = EmbeddedConfig(num_pages=200, max_running=16, max_batched_tokens=256, overlap=True)
    reference, _ = serve(requests, config, world=WORLD)
    try:
        found, _ = served(Arm("mtp", 3, False, config), requests, off_by_one=True)
    except AssertionError:
        return
    assert found != digest(reference)
