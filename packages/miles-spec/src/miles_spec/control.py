"""How many tokens to draft: costs of steps measured while running, and the length with the best expected tokens per second.

Legend: R = decoding rows of a step, k = draft length, K = the longest; a kind of step is a pair (R rounded up, k).

Two things are learnt, and kept for as long as the engine lives: P(first i draft tokens are all accepted), over all rows, and the
seconds of every kind of step, drafting included. A draft of k tokens tells of every shorter one, and what is known of k tells
what more would have had accepted. A change that costs something, a kind that is made for the first time (on a GPU: captured) or a
draft that has to catch up, waits until what it would have saved comes to as much, so that no more is lost than was to be won.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

_EDGES = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, 513, 64), *range(640, 4097, 128)]
"""Numbers of rows that steps are rounded up to: those an engine captures."""
_DECAY = 0.05
"""Least weight of a new observation of the seconds of a step."""
_FIRST = 5
"""Observations of a kind of step whose median is believed."""
_SETTLED = 20
"""Observations after which a moving mean tells of a change, not of its own noise."""
_SPIKE = 1.25
"""An observation is believed to be off from the known value by this factor at most: somebody else had the processor."""
_HOPE = 0.1
"""How far below what other numbers of rows let expect a step may be hoped to lie, each time they are twice or half as many."""
_PRIOR = (16.0, 0.8)
"""Row-steps that acceptance is believed from before any, and the share of draft tokens accepted there: drafts are tried."""
_PLAIN = 8
"""Steps without drafts before any others."""
_PAYS = 2
"""Steps whose seconds tell what a change cost, and nothing else: an engine that runs ahead pays in the step before."""
_TRIAL = 4
"""Steps that a trial lasts."""
_CLOSE = 0.9
"""A length this near to the best is worth knowing well."""
_HOLD = 8
"""Steps a choice stands: choosing takes tens of microseconds, much beside a step of a millisecond."""
_LATELY = 400.0
"""Row-steps that a change of acceptance is looked for in."""
_CHANCE = 5.0
"""Draft tokens, times the root of the row-steps, that chance explains: four standard deviations of a chain of some tokens."""
_CHANGED = 0.2
"""What is left of what was known of acceptance when it has changed."""
_LONGEST = 800
"""Steps after which acceptance counts half at the latest, however few rows there are."""
_FORGET = 1000
"""Steps without an observation after which what is known of acceptance counts half."""


@dataclass
class _Cost:
    """Seconds of one kind of step."""

    seconds: float = 0.0
    count: int = 0
    first: tuple[float, ...] = ()

    def note(self, seconds: float) -> float:
        """One more observation; by what ratio the mean moved once it was settled."""
        self.count += 1
        if self.count <= _FIRST:
            self.first = tuple(sorted((*self.first, seconds)))
            self.seconds = self.first[(self.count - 1) // 2]
            return 1.0
        before = self.seconds
        believed = min(max(seconds, before / _SPIKE), _SPIKE * before)
        self.seconds += max(_DECAY, 1.0 / self.count) * (believed - before)
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
        return self._expect(num_rows, length, 0.0)

    def hoped(self, num_rows: int, length: int) -> float:
        """The least that such a step may be hoped to take, as long as none was seen."""
        return self._expect(num_rows, length, _HOPE)

    def least(self, num_rows: int, length: int) -> float:
        """What such a step takes in any case: what shorter drafts do."""
        cell = self._cells.get(_bucket_of(num_rows))
        return 0.0 if cell is None else max(cost.seconds for cost in cell[: length + 1])

    def _expect(self, num_rows: int, length: int, hope: float) -> float:
        bucket = _bucket_of(num_rows)
        cell = self._cells.get(bucket)
        if cell is not None and cell[length].count:
            return cell[length].seconds
        near = sorted(self._cells, key=lambda other: abs(other - bucket))
        for other in near:
            theirs = self._cells[other]
            both = [] if cell is None else [k for k in range(self.most + 1) if cell[k].count and theirs[k].count]
            if not theirs[length].count or not (both or cell is None):
                continue
            factor = max(0.5, 1.0 - hope * abs(math.log2(_EDGES[other] / _EDGES[bucket])))
            if cell is None:
                return factor * theirs[length].seconds
            k = min(both, key=lambda k: abs(k - length))
            return cell[k].seconds * theirs[length].seconds / theirs[k].seconds * (factor if length > k else 1.0)
        cell = self._cells[near[0]] if cell is None and near else cell
        return 0.0 if cell is None else _between(cell, length, hope)


def _between(cell: list[_Cost], length: int, hope: float) -> float:
    """A straight line through what is known on both sides, with as many rows; below it with hope, level behind the last."""
    known = [other for other, cost in enumerate(cell) if cost.count]
    right = next((other for other in known if other >= length), None)
    left = next((other for other in reversed(known) if other <= length), None)
    if right is None or left is None:
        return cell[known[0] if left is None else left].seconds
    share = (length - left) / (right - left)
    line = (1.0 - share) * cell[left].seconds + share * cell[right].seconds
    return max(cell[left].seconds, (1.0 - hope / 2) * line)


class Controller:
    """Picks the draft length k of the next step: most expected committed tokens per second, 0 where drafts do not pay.

    Now and then another length is tried, as a budget allows: drafts where there are none, longer ones, those not known well.
    """

    def __init__(self, most: int, *, margin: float = 0.025, share: float = 0.004, half_life: int = 3200) -> None:
        """`margin`: what k > 0 must win over k = 0, which leaves no rows behind that need longer than others. `share` of the
        time may be lost by trials. `half_life`: row-steps after which acceptance counts half."""
        self.most = most
        self.margin = margin
        self.share = share
        self.length = 0
        """The last choice."""
        self.costs = StepCosts(most)
        self._half_life = half_life
        rows, rate = _PRIOR
        self._rows = rows
        self._proposed = [rows] * most
        self._accepted = [rows * rate ** (i + 1) for i in range(most)]
        self._steps = self._heard_at = self._decided_at = self._held_until = 0
        self._bucket = -1
        self._used: set[tuple[int, int]] = set()
        """Kinds of steps that were made."""
        self._saved_s: dict[tuple[int, int], float] = {}
        """What kinds that were not changed to would have saved by now."""
        self._first_s = self._turn_s = 0.0
        """What a kind costs when it is made for the first time, and what drafts do when they are turned on."""
        self._paying, self._pays_first = 0, False
        """Notes to come whose seconds are those of a change, and whether of a kind that is new."""
        self._paid: list[tuple[int, int, float]] = []
        """Those that came: rows, draft length, seconds."""
        self._budget_s = 0.0
        self._surprise = self._surprised = 0.0
        """Draft tokens accepted beyond what was expected lately, and of how many rows."""

    def choose(self, num_rows: int) -> int:
        """Draft length of the next step with this many decoding rows."""
        self._steps += 1
        bucket = _bucket_of(num_rows)
        if bucket == self._bucket and self._steps < self._held_until:
            return self.length
        length = self._pick(num_rows, bucket)
        trial = self._trial(num_rows, bucket, length) if length == self.length and self._steps > _PLAIN else None
        hold = _HOLD if trial is None else _TRIAL
        self._bucket, self._decided_at, self._held_until = bucket, self._steps, self._steps + hold
        self._turn_to(bucket, length if trial is None else trial)
        return self.length

    def expected(self, length: int) -> tuple[float, float]:
        """Tokens a row commits and tokens it drafts in a step with draft length `length`, by what was seen lately."""
        return 1.0 + sum(self._accepted[:length]) / self._rows, sum(self._proposed[:length]) / self._rows

    def rate(self, num_rows: int, length: int) -> float:
        """Expected tokens per second of a step, at best where its seconds are not known; 0 when nothing is."""
        seconds = self.costs.hoped(num_rows, length)
        return num_rows * self.expected(length)[0] / seconds if seconds > 0 else 0.0

    def note_step(self, num_rows: int, length: int, seconds: float) -> None:
        """A step without prefill that was to draft `length` tokens a row took `seconds`, drafting included."""
        if self._paying:
            self._paying -= 1
            self._paid.append((num_rows, length, seconds))
            return
        self.costs.note(num_rows, length, seconds)
        if self._paid:
            self._note_price()
        usual = self.costs.seconds(num_rows, length)
        most = self._first_s + 4.0 * (self._turn_s + _TRIAL * usual)
        self._budget_s = min(self._budget_s + (self.share + 0.5 / max(1, self._steps)) * usual, most)

    def note_accepted(self, proposed: Sequence[int], accepted: Sequence[int], num_rows: int) -> None:
        """Of `num_rows` rows, how many had a draft token at position i and how many had all of them accepted up to there.

        Positions beyond those of the step keep their last known share of what is accepted before them.
        """
        idle, self._heard_at = self._steps - self._heard_at, self._steps
        used = min(len(proposed), self.most)
        keep = 0.5 ** (max(num_rows / self._half_life, 1.0 / _LONGEST) + max(0, idle - _HOLD) / _FORGET)
        if self._has_changed(accepted[:used], num_rows):
            keep *= _CHANGED
        before = self._rows
        self._rows = keep * before + num_rows
        known = self._accepted[used - 1] if used else 0.0
        for i in range(used):
            self._proposed[i] = keep * self._proposed[i] + proposed[i]
            self._accepted[i] = keep * self._accepted[i] + accepted[i]
        rows = self._rows / before
        change = self._accepted[used - 1] / known if known else rows
        for i in range(used, self.most):  # not tried this time: accepted as often as before, once everything up to here is
            self._proposed[i] *= rows
            self._accepted[i] *= change

    def _has_changed(self, accepted: Sequence[int], num_rows: int) -> bool:
        """Whether more or less was accepted lately than chance explains, by what was believed; told once."""
        lately = 0.5 ** (num_rows / _LATELY)
        foreseen = num_rows * sum(self._accepted[: len(accepted)]) / self._rows
        self._surprise = lately * self._surprise + sum(accepted) - foreseen
        self._surprised = lately * self._surprised + num_rows
        if abs(self._surprise) <= _CHANCE * math.sqrt(self._surprised):
            return False
        self._surprise = self._surprised = 0.0
        return True

    def _pick(self, num_rows: int, bucket: int) -> int:
        """The best length by what is known, once a change to it is worth its price."""
        if self._steps <= _PLAIN or not self.costs.seconds(num_rows, 0):
            return 0
        rates = [self.rate(num_rows, k) for k in range(self.most + 1)]
        rates[0] *= 1.0 + self.margin
        best = max(range(self.most + 1), key=rates.__getitem__)
        used = [k for k in range(self.most + 1) if (bucket, k) in self._used]
        here = max(used, key=rates.__getitem__) if used else best
        """The best of those that were made with so many rows: whatever is made instead costs what a first one does."""
        if best == here and best in (0, self.length):
            self._saved_s = {kind: saved for kind, saved in self._saved_s.items() if kind[0] != bucket}
            return best
        now = here if self.length else 0
        for length in (best, here):
            price = (self._first_s if used and length not in used else 0.0) + (0.0 if self.length else self._turn_s)
            if length == now or self._is_worth((bucket, length), num_rows, 1.0 - rates[now] / rates[length], price):
                return length
        return now

    def _is_worth(self, kind: tuple[int, int], num_rows: int, share: float, price: float) -> bool:
        """Whether a kind that saves this share of the time would have saved its price by now."""
        steps = min(_HOLD, self._steps - self._decided_at)
        saved = self._saved_s.pop(kind, 0.0) + steps * share * self.costs.seconds(num_rows, self.length)
        if saved < price:
            self._saved_s[kind] = saved
        return saved >= price

    def _turn_to(self, bucket: int, length: int) -> None:
        is_first = (bucket, length) not in self._used
        if is_first or (length and not self.length):
            self._paying, self._pays_first, self._paid = _PAYS, is_first, []
            self._used.add((bucket, length))
        self.length = length

    def _note_price(self) -> None:
        """What a change has cost. A smaller price than before is believed slowly: some of it may have been paid unseen."""
        paid_s = max(0.0, sum(seconds - self.costs.seconds(rows, length) for rows, length, seconds in self._paid))
        self._paid = []
        if self._pays_first:
            self._first_s = max(paid_s, 0.8 * self._first_s + 0.2 * paid_s)
        else:
            self._turn_s = max(paid_s, 0.8 * self._turn_s + 0.2 * paid_s)

    def _trial(self, num_rows: int, bucket: int, best: int) -> int | None:
        """A length to try for a few steps, if the budget has room for it: one that tells of acceptance, or of unknown costs."""
        rate, usual = self.rate(num_rows, best), self.costs.seconds(num_rows, best)
        losses = {}
        if not rate:  # every step so far had prefill in it
            return None
        for k in range(self.most + 1):
            tokens, is_used = num_rows * self.expected(k)[0], (bucket, k) in self._used
            if is_used:
                is_close = self.rate(num_rows, k) > _CLOSE * rate
                tells = k > best or (is_close and self.costs.count(num_rows, k) < _SETTLED)
            else:
                tells = tokens > (1.0 + self.margin) * rate * self.costs.least(num_rows, k)
            if k != best and tells:
                lost = _TRIAL * max(0.0, self.costs.seconds(num_rows, k) - tokens / rate)
                losses[is_used, k] = lost + (0.0 if best and k else self._turn_s) + (0.0 if is_used else self._first_s)
        if not losses:
            return None
        wish = min(losses, key=lambda kind: (kind[0], losses[kind]))
        loss = losses[wish] + 0.1 * usual
        if loss > self._budget_s:
            return None
        self._budget_s -= loss
        return wish[1]


def rounded(num_rows: int) -> int:
    """The number of rows that steps of `num_rows` are taken for."""
    return _EDGES[_bucket_of(num_rows)]


def _bucket_of(num_rows: int) -> int:
    return min(bisect.bisect_left(_EDGES, num_rows), len(_EDGES) - 1)
