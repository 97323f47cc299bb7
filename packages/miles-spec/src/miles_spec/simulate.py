"""How long drafts would get, without running a model: on recorded sequences, or on a synthetic target with tunable repetition."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miles_spec.draft import Draft
from miles_spec.metrics import AcceptStats

if TYPE_CHECKING:
    from miles_spec.decoding import Target


@dataclass(frozen=True, slots=True)
class Recorded:
    """A sequence that was sampled before: its tokens, and how many of them are prompt."""

    token_ids: tuple[int, ...]
    num_prompt: int


def read_recorded(path: Path) -> list[Recorded]:
    """Read JSON lines: arrays of token ids, or samples with `token_ids` and `loss_mask` (a run's samples file).

    Raises ValueError naming file and line of the first line that is neither.
    """
    sequences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        tokens = value.get("token_ids") if isinstance(value, dict) else value
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens) or len(tokens) < 2:
            raise ValueError(f"{path}:{number}: expected an array of two or more token ids, or an object with token_ids")
        mask = value.get("loss_mask") if isinstance(value, dict) else None
        first = mask.index(True) if mask and True in mask else 1
        sequences.append(Recorded(tuple(tokens), max(first, 1)))
    if not sequences:
        raise ValueError(f"{path}: holds no sequences")
    return sequences


def replay(sequence: Recorded, draft: Draft, num_draft: int) -> AcceptStats:
    """Accept exactly what the recorded sequence confirms. That is what keyed sampling would have accepted."""
    stats = AcceptStats()
    tokens, position = sequence.token_ids, sequence.num_prompt
    session = draft.begin(tokens[:position])
    while position < len(tokens):
        proposed = session.propose(min(num_draft, len(tokens) - position - 1))
        accepted = next((i for i, token in enumerate(proposed) if token != tokens[position + i]), len(proposed))
        stats.add(accepted, len(proposed))
        session.extend(tokens[position : position + accepted + 1])
        position += accepted + 1
    return stats


def synthetic_target(vocab: int, order: int, sharpness: float, seed: int) -> Target:
    """A target whose logits are a fixed random function of the last `order` tokens: the sharper, the more repetitive.

    Logits are normal with standard deviation `sharpness`; the same context always gives the same bits.
    """
    import torch

    known: dict[tuple[int, ...], torch.Tensor] = {}

    def row(context: tuple[int, ...]) -> torch.Tensor:
        if context not in known:
            generator = torch.Generator().manual_seed(random.Random(repr((seed, context))).getrandbits(62))
            known[context] = torch.randn(vocab, generator=generator) * sharpness
        return known[context]

    def target(token_ids: Sequence[int], num_rows: int) -> torch.Tensor:
        ends = range(len(token_ids) - num_rows + 1, len(token_ids) + 1)
        return torch.stack([row(tuple(token_ids[max(0, end - order) : end])) for end in ends])

    return target
