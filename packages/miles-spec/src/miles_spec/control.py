"""How many tokens to draft: costs of steps measured while running, and the length with the best expected tokens per second.

Legend: R = decoding rows of a step, k = draft length, K = the longest.

Two things are learnt. What is accepted: P(first i draft tokens are all accepted), over all rows. What a step costs: seconds by
(R, k), drafting included. Whatever is tried to learn is charged to a budget, a share of all time, so nobody is slower for it by
more than that; what was learnt of k = K says what shorter drafts would have had accepted.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

_EDGES = [*range(1, 9), *range(10, 33, 2), *range(36, 65, 4), *range(72, 129, 8), *range(144, 257, 16), 384, 512, 1024, 2048]
_DECAY = 0.05
"""Least weight of a new observation of the seconds of a step."""
_FIRST = 5
"""Observations of a kind of step whose median is believed; some of them may have compiled or captured."""
_SETTLED = 20
"""Observations after which a moving mean tells of a change, not of its own noise."""
_SPIKE = 1.5
"""An observation this many times the known value is clipped: somebody else had the processor."""
_ENOUGH = 8.0
"""Row-steps to have seen before anything is believed of acceptance."""
_HOPE = 0.9
"""How far below a forecast from other numbers of rows a step may be hoped to lie."""
_TRIAL = 3
"""Steps that a trial lasts, the first of which may pay for the change."""
_HOLD = 8
"""Steps a choice stands: choosing takes tens of microseconds, much beside a step of a millisecond."""
_LEARNING = 32
"""Steps until then; before, every step is decided anew."""
_FORGET = 1000
"""Steps without an observation after which what is known of acceptance counts half."""


@dataclass
class _Cost:
    """Seconds of one kind of step."""

    seconds: float = 0.0
    count: int = 0
    first: list[float] = field(default_factory=list)

    def note(self, seconds: float) -> float:
        """One more observation; by what ratio the mean moved once it was settled."""
        self.count += 1
        if self.count <= _FIRST:
            self.first = sorted([*self.first, seconds])
            self.seconds = self.first[(self.count - 1) // 2]
            return 1.0
        before = self.seconds
        self.seconds += max(_DECAY, 1.0 / self.count) * (min(seconds, _SPIKE * before) - before)
        return self.seconds / before if self.count > _SETTLED else 1.0


class StepCosts:
    """Seconds of a step by decoding rows and draft length, measured; unknown ones from those next to them.

    Example: costs = StepCosts(4); costs.note(8, 0, 0.001); costs.note(8, 4, 0.002); costs.seconds(8, 2) == 0.0015
    """

    def __init__(self, most: int) -> None:
        """`most`: the longest draft."""
        self.most = most
        self._cells: dict[int, list[_Cost]] = {}

    def note(self, num_rows: int, length: int, seconds: float) -> None:
        """A step took this long. Costs of other lengths with as many rows move along: contexts grow, machines slow down."""
        cell = self._cells.setdefault(_bucket_of(num_rows), [_Cost() for _ in range(self.most + 1)])
        ratio = cell[length].note(seconds)
        for other, cost in enumerate(cell):
            if other != length:
                cost.seconds *= ratio

    def count(self, num_rows: int, length: int) -> int:
        """Observations of such a step."""
        cell = self._cells.get(_bucket_of(num_rows))
        return 0 if cell is None else cell[length].count

    def seconds(self, num_rows: int, length: int) -> float:
        """Expected seconds of a step; 0 when nothing is known."""
        bucket = _bucket_of(num_rows)
        if bucket not in self._cells:
            bucket = min(self._cells, key=lambda other: abs(other - bucket), default=-1)
        if bucket < 0:
            return 0.0
        if self._cells[bucket][length].count:
            return self._cells[bucket][length].seconds
        return self._alike(bucket, length) or self._between(bucket, length)

    def least(self, num_rows: int, length: int) -> float:
        """Seconds that such a step takes at least: what shorter drafts do, and most of what other numbers of rows let expect."""
        bucket = _bucket_of(num_rows)
        cell = self._cells.get(bucket)
        if cell is None or cell[length].count:
            return self.seconds(num_rows, length)
        return max(_HOPE * self._alike(bucket, length), *(cost.seconds for cost in cell[: length + 1]))

    def _alike(self, bucket: int, length: int) -> float:
        """From the nearest bucket where this length and one that is known here were measured; 0 when there is none."""
        cell = self._cells[bucket]
        for other in sorted(self._cells, key=lambda other: abs(other - bucket)):
            theirs = self._cells[other]
            both = [k for k in range(self.most + 1) if cell[k].count and theirs[k].count]
            if theirs[length].count and both:
                k = min(both, key=lambda k: abs(k - length))
                return cell[k].seconds * theirs[length].seconds / theirs[k].seconds
        return 0.0

    def _between(self, bucket: int, length: int) -> float:
        """A straight line through what is known on both sides in one bucket, level behind the last."""
        cell = self._cells[bucket]
        known = [other for other, cost in enumerate(cell) if cost.count]
        right = next((other for other in known if other >= length), None)
        left = next((other for other in reversed(known) if other <= length), None)
        if right is None or left is None or right == left:
            return cell[known[0] if left is None else left].seconds
        share = (length - left) / (right - left)
        return (1.0 - share) * cell[left].seconds + share * cell[right].seconds


class Controller:
    """Picks the draft length k of the next step: most expected committed tokens per second, 0 where drafts do not pay.

    Lengths that were never tried with so many rows are tried when the least they can cost would make them best; now and then the
    longest or the second best is, to notice that something has changed.
    """

    def __init__(self, most: int, *, margin: float = 0.01, share: float = 0.008, half_life: int = 400) -> None:
        """`margin`: what k > 0 must win over k = 0. `share` of the time may be lost by trials. `half_life`: row-steps after which
        acceptance counts half."""
        self.most = most
        self.margin = margin
        self.share = share
        self.length = 0
        """The last choice."""
        self.costs = StepCosts(most)
        self._half_life = half_life
        self._rows = 0.0
        self._proposed = [0.0] * most
        self._accepted = [0.0] * most
        self._steps = self._heard_at = 0
        self._held_until = 0
        self._is_again = False
        """The choice that stands is a trial of what was tried before."""
        self._bucket = -1
        self._total_s = self._lost_s = 0.0
        self._turn = 0

    def choose(self, num_rows: int) -> int:
        """Draft length of the next step with this many decoding rows."""
        self._steps += 1
        bucket = _bucket_of(num_rows)
        if bucket == self._bucket and self._steps < self._held_until:
            return self.length
        self._bucket = bucket
        best = self._best(num_rows)
        trial = self._trial(num_rows, best)
        self._is_again = trial is not None and self.costs.count(num_rows, trial) >= _TRIAL
        self.length = best if trial is None else trial
        hold = _HOLD if self._steps > _LEARNING else 1
        self._held_until = self._steps + (hold if trial is None else _TRIAL)
        return self.length

    def expected(self, length: int) -> tuple[float, float]:
        """Tokens a row commits and tokens it drafts in a step with draft length `length`, by what was seen lately."""
        if not self._rows:
            return 1.0, 0.0
        return 1.0 + sum(self._accepted[:length]) / self._rows, sum(self._proposed[:length]) / self._rows

    def rate(self, num_rows: int, length: int) -> float:
        """Expected tokens per second of a step; 0 when nothing is known."""
        seconds = self.costs.seconds(num_rows, length)
        return num_rows * self.expected(length)[0] / seconds if seconds > 0 else 0.0

    def note_step(self, num_rows: int, length: int, seconds: float) -> None:
        """A step without prefill that was to draft `length` tokens a row took `seconds`, drafting included."""
        self.costs.note(num_rows, length, seconds)
        if self._is_again:  # a draft that was silent catches up with the tokens since: more than such a step usually takes
            self._lost_s += max(0.0, seconds - self.costs.seconds(num_rows, length))
        self._total_s += self.costs.seconds(num_rows, length)

    def note_accepted(self, proposed: Sequence[int], accepted: Sequence[int], num_rows: int) -> None:
        """Of `num_rows` rows, how many had a draft token at position i and how many had all of them accepted up to there.

        Positions beyond those of the step keep their last known share of what is accepted before them.
        """
        idle, self._heard_at = self._steps - self._heard_at, self._steps
        keep = 0.5 ** (num_rows / self._half_life + max(0, idle - _HOLD) / _FORGET)
        before, used = self._rows, min(len(proposed), self.most)
        self._rows = keep * before + num_rows
        known = self._accepted[used - 1] if used else 0.0
        for i in range(used):
            self._proposed[i] = keep * self._proposed[i] + proposed[i]
            self._accepted[i] = keep * self._accepted[i] + accepted[i]
        rows = self._rows / before if before else 0.0
        change = self._accepted[used - 1] / known if known else rows
        for i in range(used, self.most):  # not tried this time: accepted as often as before, once everything up to here is
            self._proposed[i] *= rows
            self._accepted[i] *= change

    def _best(self, num_rows: int) -> int:
        """The best length by what is known. Drafts have to win something over none, less when they are on."""
        if self._rows < _ENOUGH or not self.rate(num_rows, 0):
            return 0
        margin = self.margin if not self.length else 0.0
        rates = [self.rate(num_rows, 0) * (1.0 + margin), *(self.rate(num_rows, k) for k in range(1, self.most + 1))]
        return max(range(self.most + 1), key=rates.__getitem__)

    def _trial(self, num_rows: int, best: int) -> int | None:
        """A length to try for a few steps, if there is something to learn and the budget has room for it."""
        costs = self.costs
        if costs.count(num_rows, best) < _TRIAL:
            return None
        if self._rows < _ENOUGH:
            return self.most
        rate = self.rate(num_rows, best)
        hopeful = [
            k
            for k in range(self.most + 1)
            if k != best
            and costs.count(num_rows, k) < _TRIAL
            and num_rows * self.expected(k)[0] > rate * (1.0 + self.margin) * costs.least(num_rows, k)
        ]
        if hopeful:
            wish = min(hopeful, key=lambda k: self._loss(num_rows, k, rate))
        else:
            self._turn += 1
            second = max((k for k in range(self.most + 1) if k != best), key=lambda k: self.rate(num_rows, k))
            wish = self.most if self._turn % 2 and best != self.most else second
        loss = max(_TRIAL * self._loss(num_rows, wish, rate), 0.1 * costs.seconds(num_rows, best))
        if self._lost_s + loss > self.share * self._total_s:
            return None
        self._lost_s += loss
        return wish

    def _loss(self, num_rows: int, length: int, rate: float) -> float:
        """Seconds that a step of this length is expected to lose against `rate` tokens per second."""
        return max(0.0, self.costs.seconds(num_rows, length) - num_rows * self.expected(length)[0] / rate)


def _bucket_of(num_rows: int) -> int:
    return bisect.bisect_left(_EDGES, num_rows)
