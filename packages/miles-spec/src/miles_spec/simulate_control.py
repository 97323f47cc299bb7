"""The controller against an engine of measured costs: how far from plain decoding and from the best fixed length it ends.

`control` looks at a steady state, `short_rollouts` at what an engine serves: batches that end after some tenths of a second, rows
that end before others, drafts that catch up with what was decoded without them, and graphs that are captured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_spec.control import Controller, rounded


@dataclass(frozen=True, slots=True)
class CostTable:
    """Seconds of a step by decoding rows and draft length, drafting included.

    Example: CostTable({1: (0.001, 0.0012), 8: (0.001, 0.0013)}) knows drafts of 0 and 1 tokens.
    """

    seconds: dict[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        sizes = {len(row) for row in self.seconds.values()}
        if len(sizes) != 1 or min(sizes) < 2 or any(value <= 0 for row in self.seconds.values() for value in row):
            raise ValueError(
                "a cost table has rows of positive seconds, each for the draft lengths 0 .. K with the same K of at least 1"
            )

    @classmethod
    def read(cls, path: Path) -> CostTable:
        """Read JSON lines such as {"rows": 8, "seconds": [0.001, 0.0012]}. Raises ValueError naming file and line."""
        found: dict[int, tuple[float, ...]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                found[int(value["rows"])] = tuple(float(each) for each in value["seconds"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f'{path}:{number}: expected {{"rows": R, "seconds": [..]}}: {error}') from error
        if not found:
            raise ValueError(f"{path}: holds no costs")
        return cls(found)

    @property
    def most(self) -> int:
        """The longest draft."""
        return len(next(iter(self.seconds.values()))) - 1

    def of(self, rows: int, length: int) -> float:
        """Seconds of a step, between measured numbers of rows on a straight line."""
        known = sorted(self.seconds)
        right = next((r for r in known if r >= rows), known[-1])
        left = next((r for r in reversed(known) if r <= rows), known[0])
        share = (rows - left) / (right - left) if right > left else 0.0
        return (1.0 - share) * self.seconds[left][length] + share * self.seconds[right][length]


def fixed_rate(table: CostTable, accept: Sequence[float], rows: int, length: int) -> float:
    """Expected tokens per second with a fixed length; `accept[i]`: chance of draft token i once those before it are accepted."""
    committed = chance = 1.0
    for i in range(length):
        chance *= accept[i]
        committed += chance
    return rows * committed / table.of(rows, length)


@dataclass(frozen=True, slots=True)
class Controlled:
    """What a simulated run came to."""

    rate: float
    """Tokens per second after the first tenth of the steps."""
    plain: float
    """Of plain decoding, by formula."""
    best: float
    """Of the best fixed length, by formula; plain decoding is one of them."""
    best_length: int

    @property
    def over_plain(self) -> float:
        """1 is as fast as plain decoding."""
        return self.rate / self.plain

    @property
    def over_best(self) -> float:
        """1 is as fast as the best fixed length."""
        return self.rate / self.best


def control(
    table: CostTable,
    accept: Sequence[float],
    rows: int,
    steps: int = 3000,
    *,
    seed: int = 0,
    noise: float = 0.05,
    spikes: float = 0.002,
    controller: Controller | None = None,
) -> Controlled:
    """Run the controller for so many steps. They cost what they do within +-`noise`, with chance `spikes` ten times that."""
    rng, controller = random.Random(seed), controller or Controller(table.most)
    tokens = clock = 0.0
    for step in range(steps):
        length = controller.choose(rows)
        seconds = table.of(rows, length) * rng.uniform(1.0 - noise, 1.0 + noise) * (10.0 if rng.random() < spikes else 1.0)
        runs = [next((i for i in range(length) if rng.random() >= accept[i]), length) for _ in range(rows)]
        accepted = [sum(run > i for run in runs) for i in range(length)]
        controller.note_step(rows, length, seconds)
        if length:
            controller.note_accepted([rows] * length, accepted, rows)
        if step >= steps // 10:
            tokens += rows * fixed_rate(table, accept, rows, length) / rows * table.of(rows, length)
            clock += table.of(rows, length)
    rates = [fixed_rate(table, accept, rows, length) for length in range(table.most + 1)]
    best = max(range(len(rates)), key=rates.__getitem__)
    return Controlled(tokens / clock, rates[0], rates[best], best)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What an engine serves one after the other, and what changes cost it beyond the steps themselves."""

    rows: int
    tokens: int
    """Of every row."""
    count: int = 6
    """Rollouts, of which the first `unmeasured` are not counted."""
    unmeasured: int = 3
    catch_up_s: float = 5e-4
    """A draft makes the entries that it lacks: in every rollout, and after steps without it."""
    turn_off_s: float = 2e-4
    """Steps without drafts wait for what is on its way."""
    capture_s: float = 0.0
    """The first step of a kind."""
    noise: float = 0.05
    spikes: float = 0.002


class Fixed(Controller):
    """Always the same length."""

    def __init__(self, most: int, length: int) -> None:
        super().__init__(most)
        self.length = length

    def choose(self, num_rows: int) -> int:
        """The length."""
        return self.length


def short_rollouts(table: CostTable, accept: float, work: Rollouts, controller: Controller, seed: int = 0) -> tuple[float, float]:
    """(expected tokens, their seconds) of the measured rollouts; `accept`: chance of a draft token, those before it accepted.

    The controller hears of a step when the next one has started, as in an engine that runs ahead.
    """
    rng, seen = random.Random(seed), set[tuple[int, int]]()
    tokens = clock = 0.0
    for number in range(work.count):
        streaks = [_streaks(accept, work.tokens, random.Random(f"{seed} {number} {row}")) for row in range(work.rows)]
        places, made, took_s, before, is_behind = [0] * work.rows, None, 0.0, 0, True
        while streaks:
            rows, length = len(streaks), controller.choose(len(streaks))
            change_s = work.turn_off_s * (before > 0 == length) + work.catch_up_s * (length > 0 and is_behind)
            kind = (rounded(rows), length)
            change_s += work.capture_s * (kind not in seen)
            seen.add(kind)
            if made is not None:
                controller.note_step(*made, took_s + change_s)
            seconds = table.of(rows, length)
            took_s = seconds * rng.uniform(1.0 - work.noise, 1.0 + work.noise) * (10.0 if rng.random() < work.spikes else 1.0)
            runs = [min(length, streak[place]) for streak, place in zip(streaks, places, strict=True)]
            if length:
                controller.note_accepted([rows] * length, [sum(run > i for run in runs) for i in range(length)], rows)
            if number >= work.unmeasured:
                tokens += rows * sum(accept**i for i in range(length + 1))
                clock += seconds + change_s
            places = [place + 1 + run for place, run in zip(places, runs, strict=True)]
            streaks = [streak for streak, place in zip(streaks, places, strict=True) if place < work.tokens]
            places = [place for place in places if place < work.tokens]
            made, before, is_behind = (rows, length), length, not length
    return tokens, clock


def _streaks(accept: float, count: int, rng: random.Random) -> list[int]:
    """How many draft tokens in a row are accepted from each place of a sequence on: the same for whoever drafts there."""
    streaks, streak = [], 0
    for _ in range(count):
        streak = streak + 1 if rng.random() < accept else 0
        streaks.append(streak)
    return streaks[::-1]
