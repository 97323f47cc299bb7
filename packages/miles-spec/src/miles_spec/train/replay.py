"""The rollouts of recent steps, kept on the CPU to be trained on again."""

from __future__ import annotations

import random
from collections import deque

import torch
from torch import Tensor

from miles_spec.train.stream import DraftStream, Rollout


class ReplayBuffer:
    """Sequences with the policy's states as they were, oldest out first. What is drawn depends on the key alone.

    States of older weights teach an older policy; keep no more than a few steps' worth.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.num_rows = 0
        self._held: deque[tuple[Rollout, Tensor, Tensor | None]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, stream: DraftStream) -> None:
        """Take a copy of every sequence that fits."""
        if self.max_rows < 1:
            return
        own = stream.features is stream.policy_hidden
        hidden = stream.policy_hidden.cpu()
        features = None if own else stream.features.cpu()
        start = 0
        for rollout in stream.sequences:
            stop = start + rollout.num_rows
            if rollout.num_rows <= self.max_rows:
                kept = None if features is None else features[start:stop].clone()
                self._held.append((rollout, hidden[start:stop].clone(), kept))
                self.num_rows += rollout.num_rows
            start = stop
        while self.num_rows > self.max_rows:
            self.num_rows -= self._held.popleft()[0].num_rows

    def draw(self, max_rows: int, key: int, device: torch.device | str = "cpu") -> DraftStream | None:
        """Some sequences, at most `max_rows` rows together; None when none fits."""
        order = list(range(len(self._held)))
        random.Random(key).shuffle(order)
        chosen, used = [], 0
        for number in order:
            rows = self._held[number][0].num_rows
            if used + rows <= max_rows:
                chosen.append(number)
                used += rows
        if not chosen:
            return None
        rollouts, hiddens, features = zip(*(self._held[number] for number in sorted(chosen)), strict=True)
        hidden = torch.cat(hiddens).to(device)
        own = features[0] is None
        return DraftStream.of(rollouts, hidden, None if own else torch.cat(features).to(device))
