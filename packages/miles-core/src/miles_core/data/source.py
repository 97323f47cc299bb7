"""Hands out prompts in a reproducible order and keeps the ledger: nothing is lost, nothing is trained twice."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from xxhash import xxh3_64, xxh3_64_intdigest

from miles_core.data.record import Prompt, PromptGroup

SCHEMA = 1


class Ledger:
    """Who owns each group: in flight from the hand-out until it is trained or dropped with a reason."""

    def __init__(self) -> None:
        self.in_flight: dict[int, int] = {}
        """Group id to row index."""
        self.num_trained = 0
        self.dropped: Counter[str] = Counter()
        """Reason to number of groups."""

    def hand_out(self, group_id: int, row: int) -> None:
        """A new group is in flight."""
        assert group_id not in self.in_flight
        self.in_flight[group_id] = row

    def trained(self, group_id: int) -> None:
        """Settle a group; raises ValueError when it is not in flight, which would mean training it twice."""
        self._settle(group_id)
        self.num_trained += 1

    def drop(self, group_id: int, reason: str) -> None:
        """Settle a group that will not be trained; raises ValueError when it is not in flight."""
        self._settle(group_id)
        self.dropped[reason] += 1

    def _settle(self, group_id: int) -> None:
        if self.in_flight.pop(group_id, None) is None:
            raise ValueError(f"group {group_id} is not in flight: it was never handed out, or is trained or dropped already")

    @property
    def num_settled(self) -> int:
        """Groups trained or dropped."""
        return self.num_trained + sum(self.dropped.values())


class PromptSource:
    """An endless (or `max_epochs` long) stream of prompt groups with exact resume.

    The order of an epoch is a pure function of (seed, epoch). Groups in flight when the state was saved
    are handed out again, first and under their old group ids, after it is loaded.

    Example: source.next(8) -> [PromptGroup(group_id=0, ...), ...]; source.trained([0, 1]); source.dropped(2, "zero_variance")
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True, max_epochs: int | None = None) -> None:
        if not prompts:
            raise ValueError("a prompt source needs at least one prompt")
        self.ledger = Ledger()
        self._prompts = prompts
        self._seed, self._shuffle, self._max_epochs = seed, shuffle, max_epochs
        self._epoch = self._position = self._next_group_id = 0
        self._order = self._epoch_order(0)
        self._waiting: set[int] = set()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far, with fraction."""
        return self._epoch + self._position / len(self._prompts)

    def next(self, count: int) -> list[PromptGroup]:
        """`count` groups: released and recovered ones first, then new ones; fewer only after `max_epochs`."""
        groups = []
        for group_id in sorted(self._waiting)[:count]:
            self._waiting.remove(group_id)
            groups.append(PromptGroup(group_id=group_id, prompt=self._prompts[self.ledger.in_flight[group_id]]))
        while len(groups) < count and (row := self._advance()) is not None:
            group_id = self._next_group_id
            self._next_group_id += 1
            self.ledger.hand_out(group_id, row)
            groups.append(PromptGroup(group_id=group_id, prompt=self._prompts[row]))
        return groups

    def trained(self, group_ids: Iterable[int]) -> None:
        """Settle groups whose optimizer step is done."""
        for group_id in group_ids:
            self._check_owner(group_id)
            self.ledger.trained(group_id)

    def dropped(self, group_id: int, reason: str) -> None:
        """Settle a group that will not be trained."""
        self._check_owner(group_id)
        self.ledger.drop(group_id, reason)

    def release(self, group_ids: Iterable[int]) -> None:
        """Give groups back unused: the next `next` hands them out again, under the same ids."""
        for group_id in group_ids:
            self._check_owner(group_id)
            if group_id not in self.ledger.in_flight:
                raise ValueError(f"group {group_id} is not in flight and cannot be released")
            self._waiting.add(group_id)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly here, as plain JSON values."""
        return {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint(),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
            "next_group_id": self._next_group_id,
            "in_flight": [[group_id, row] for group_id, row in sorted(self.ledger.in_flight.items())],
            "num_trained": self.ledger.num_trained,
            "dropped": dict(sorted(self.ledger.dropped.items())),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raises ValueError when prompts, seed or shuffling are not the ones it was taken with."""
        if state.get("schema") != SCHEMA:
            raise ValueError(f"data state has schema {state.get('schema')}, this build reads {SCHEMA}")
        ours = {"fingerprint": self.fingerprint(), "seed": self._seed, "shuffle": self._shuffle}
        changed = [f"{key} was {state.get(key)!r}, is {value!r}" for key, value in ours.items() if state.get(key) != value]
        if changed:
            raise ValueError(
                f"the checkpoint was made with other data: {'; '.join(changed)}. Resume with the same data settings, "
                f"tokenizer and seed, or start a new run from its weights"
            )
        ledger = Ledger()
        ledger.in_flight = {int(group_id): int(row) for group_id, row in state["in_flight"]}
        ledger.num_trained = state["num_trained"]
        ledger.dropped = Counter(state["dropped"])
        if ledger.num_settled + len(ledger.in_flight) != state["next_group_id"]:
            raise ValueError(
                f"data state does not add up: {state['next_group_id']} groups handed out, "
                f"{ledger.num_settled} settled, {len(ledger.in_flight)} in flight"
            )
        self.ledger = ledger
        self._epoch, self._position, self._next_group_id = state["epoch"], state["position"], state["next_group_id"]
        self._order = self._epoch_order(self._epoch)
        self._waiting = set(ledger.in_flight)

    def fingerprint(self) -> str:
        """A hash of all prompts, in order: ids of rows, tokens, labels."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = xxh3_64()
        for prompt in self._prompts:
            head = f"{prompt.prompt_id}\0{prompt.label}\0{len(prompt.input_ids)}\0".encode()
            digest.update(head + struct.pack(f"<{len(prompt.input_ids)}q", *prompt.input_ids))
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _advance(self) -> int | None:
        """The next row index, or None when all epochs are done."""
        if self._position == len(self._order):
            if self._max_epochs is not None and self._epoch + 1 >= self._max_epochs:
                return None
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._epoch_order(self._epoch)
        self._position += 1
        return self._order[self._position - 1]

    def _epoch_order(self, epoch: int) -> list[int]:
        """Row indices sorted by a keyed hash: independent of machine, Python version and hash seed."""
        rows = range(len(self._prompts))
        if not self._shuffle:
            return list(rows)
        return sorted(rows, key=lambda row: (xxh3_64_intdigest(struct.pack("<qqq", self._seed, epoch, row)), row))

    def _check_owner(self, group_id: int) -> None:
        if group_id in self._waiting:
            raise ValueError(f"group {group_id} was released or recovered and is not handed out; ask for it with next()")


def as_groups(prompts: Sequence[Prompt], *, first_group_id: int = 0) -> list[PromptGroup]:
    """Every prompt once, in order: what an evaluation asks."""
    return [PromptGroup(group_id=first_group_id + i, prompt=prompt) for i, prompt in enumerate(prompts)]
