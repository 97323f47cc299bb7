"""How many tokens to draft: a cost model fitted while running, and the length with the best expected tokens per second.

Legend: R = decoding rows of a pass, T = tokens of a pass (rows and draft tokens), k = draft length.

Acceptance is known even while nothing is drafted: sampling is keyed, so a draft token would have been accepted exactly when it
equals the token that plain decoding then samples. A few shadow proposals, never verified, are compared with what comes out.
So the controller can be off at the cost of a few look-ups, and knows when to come back.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

_EDGES = [
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    *range(10, 33, 2),
    *range(36, 65, 4),
    *range(72, 129, 8),
    *range(144, 257, 16),
    384,
    512,
    1024,
    2048,
]
_DECAY = 0.1
"""Weight of a new observation of the seconds of a pass."""
_ENOUGH = 6.0
"""Row-steps to have seen before anything is drafted."""
_FIRST = 3
_REGRET = 1.25
"""A length measured to be this much worse than the best is not measured again."""
_HOLD = 8
"""Steps a choice stands: choosing takes 20 to 50 microseconds, much beside a pass of a millisecond."""
_LEARNING = 64
"""Steps until then; before, every step is decided anew."""
_SPIKE = 3.0
"""An observation this many times the known value is clipped: somebody else had the processor."""


def _bucket_of(num_tokens: int) -> int:
    return bisect.bisect_left(_EDGES, num_tokens)


@dataclass
class CostModel:
    """Seconds of a pass by its number of tokens: moving means in buckets, straight lines between them.

    Example: model.note(8, 0.001); model.note(16, 0.002); model.seconds(12) == 0.0015
    """

    _tokens: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    _bucket: list[int] = field(default_factory=list)
    _count: dict[int, int] = field(default_factory=dict)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A pass of this many tokens took this long."""
        bucket = _bucket_of(num_tokens)
        place = bisect.bisect_left(self._bucket, bucket)
        if place < len(self._bucket) and self._bucket[place] == bucket:
            known = self._seconds[place]
            self._count[bucket] += 1
            if self._count[bucket] <= _FIRST:  # first passes of a size may allocate or be interrupted
                known = self._seconds[place] = min(known, seconds)
            self._seconds[place] += _DECAY * (min(seconds, _SPIKE * known) - known)
            self._tokens[place] += _DECAY * (num_tokens - self._tokens[place])
            return
        self._bucket.insert(place, bucket)
        self._count[bucket] = 1
        self._tokens.insert(place, float(num_tokens))
        self._seconds.insert(place, seconds)

    def scale(self, num_tokens: int, seconds: float) -> None:
        """`note`, and what is known of other sizes moves in the same proportion: contexts grow, machines slow down."""
        before = self.seconds(num_tokens) if self.knows(num_tokens) else 0.0  # a forecast is no measurement to compare with
        self.note(num_tokens, seconds)
        after = self.seconds(num_tokens)
        ratio = after / before if before > 0 else 1.0
        bucket = _bucket_of(num_tokens)
        for i, other in enumerate(self._bucket):
            if other != bucket:
                self._seconds[i] *= ratio

    def knows(self, num_tokens: int) -> bool:
        """Whether a pass of about this size was seen."""
        return _bucket_of(num_tokens) in self._bucket

    def seconds(self, num_tokens: int) -> float:
        """Expected seconds. Outside what was seen the nearest slope goes on, never downwards; 0 when nothing was."""
        count = len(self._tokens)
        if count == 0:
            return 0.0
        if count == 1:
            return self._seconds[0] * max(1.0, num_tokens / self._tokens[0])
        right = min(max(bisect.bisect_left(self._tokens, num_tokens), 1), count - 1)
        left = right - 1
        span = self._tokens[right] - self._tokens[left]
        slope = (self._seconds[right] - self._seconds[left]) / span if span > 0 else 0.0
        if not self._tokens[0] <= num_tokens <= self._tokens[-1]:
            slope = max(slope, 0.0)
        return max(self._seconds[left] + slope * (num_tokens - self._tokens[left]), 0.2 * min(self._seconds))


class Controller:
    """Picks the draft length k of the next step: most expected committed tokens per second, 0 where drafts do not pay.

    Expected tokens of a row are 1 + sum over i of P(proposed and accepted up to i), moving means of what was seen, in shadow
    while off. Sizes of pass that were never seen are tried for `trials` steps when the optimistic forecast likes them.
    """

    def __init__(
        self, most: int, *, margin: float = 0.03, trials: int = 3, shadow_share: float = 0.004, half_life: int = 400
    ) -> None:
        """`margin`: what k > 0 must win over k = 0. `half_life`: row-steps after which acceptance counts half."""
        self.most = most
        self.margin = margin
        self.shadow_share = shadow_share
        self.length = 0
        """The last choice."""
        self.cost = CostModel()
        self._trials = trials
        self._retry_every = 256
        self._trial_share = 0.004
        self._tried: dict[int, int] = {}
        self._next_trial = 0
        self._half_life = half_life
        self._rows = 0.0
        self._proposed = [0.0] * most
        self._accepted = [0.0] * most
        self._draft_s = self._shadow_s = self._pass_s = 0.0
        self._steps = 0
        self._held = self._held_until = 0
        self._held_rows = -1

    def choose(self, num_rows: int) -> int:
        """Draft length of the next step with this many decoding rows."""
        self._steps += 1
        if num_rows == self._held_rows and self._steps < self._held_until:
            self.length = self._held
            return self.length
        self.length = self._held = 0
        if self._rows >= _ENOUGH:
            self._held, trial = self._best(num_rows)
            self.length = trial or self._held
            self._held_rows = num_rows
            self._held_until = self._steps + (_HOLD if self._steps > _LEARNING else 1)
        return self.length

    def wants_shadow(self) -> bool:
        """Whether to make proposals that are not verified now; they may take `shadow_share` of the time."""
        return self._rows < _ENOUGH or self._shadow_s <= self.shadow_share * self._pass_s

    def note_shadow(self, seconds: float) -> None:
        """Shadow proposals and their comparison took this long."""
        self._shadow_s += seconds

    def expected(self, length: int) -> tuple[float, float]:
        """Tokens a row commits and tokens it drafts in a step with draft length `length`, by what was seen lately."""
        if not self._rows:
            return 1.0, 0.0
        return 1.0 + sum(self._accepted[:length]) / self._rows, sum(self._proposed[:length]) / self._rows

    def rate(self, num_rows: int, length: int) -> float:
        """Expected tokens per second of a step."""
        committed, drafted = self.expected(length)
        seconds = self.cost.seconds(round(num_rows * (1.0 + drafted))) + (num_rows * self._draft_s if length else 0.0)
        return num_rows * committed / seconds if seconds > 0 else 0.0

    def note_pass(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A pass without prefill took `seconds`, drafting not counted."""
        self._pass_s += seconds
        self.cost.scale(num_tokens, seconds)

    def note_draft(self, num_rows: int, seconds: float) -> None:
        """Proposals for `num_rows` rows took this long."""
        each = seconds / max(1, num_rows)
        self._draft_s = (
            each if not self._draft_s else self._draft_s + _DECAY * (min(each, _SPIKE * self._draft_s) - self._draft_s)
        )

    def note_accepted(self, proposed: Sequence[int], accepted: Sequence[int], num_rows: int) -> None:
        """Of `num_rows` rows, how many had a draft token at position i and how many were accepted there; verified or in shadow.

        Positions beyond the length in use keep their last known share of what is accepted before them.
        """
        keep, before, used = 0.5 ** (num_rows / self._half_life), self._rows, min(len(proposed), self.most)
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

    def _best(self, num_rows: int) -> tuple[int, int]:
        """The best length by what is known, and one to try now, 0 for none."""
        plain = self.rate(num_rows, 0)
        if not plain:
            return 0, 0
        rates = [plain * (1.0 + self.margin), *(self.rate(num_rows, length) for length in range(1, self.most + 1))]
        best = max(range(self.most + 1), key=rates.__getitem__)
        hope, hope_rate = 0, rates[best]
        for length in range(1, self.most + 1):
            committed, drafted = self.expected(length)
            tried = self._tried.get(_bucket_of(round(num_rows * (1.0 + drafted))), 0) >= self._trials
            hoped = rates[length] * _REGRET if tried else committed * plain
            if length != best and hoped > hope_rate:
                hope, hope_rate = length, hoped
        if hope and self._steps >= self._next_trial:
            drafted = self.expected(hope)[1]
            size = _bucket_of(round(num_rows * (1.0 + drafted)))
            self._tried[size] = self._tried.get(size, 0) + 1
            # A trial may cost as many plain steps as it has tokens per row: the wait bounds their share of the time.
            wait = 2 if self._tried[size] <= self._trials else max(self._retry_every, round(drafted / self._trial_share))
            self._next_trial = self._steps + wait
            return best, hope
        return best, 0
