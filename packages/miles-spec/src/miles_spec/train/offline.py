"""Training a draft on rollouts that are stored: warm-up before a run, or a new draft for a finished policy."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_spec.train.stream import DraftStream, Rollout
from miles_spec.train.trainer import DraftStep, DraftTrainer, Policy


def read_rollouts(files: Sequence[Path]) -> list[Rollout]:
    """The samples of JSON lines with token_ids and loss_mask, and if they have them temperature and sample_id.

    Samples without a label are left out. Raises ValueError naming file and line of the first that is no sample, or when none is
    left.
    """
    found = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                tokens, mask = _arrays(value)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a sample with token_ids and loss_mask: {error}") from None
            last = max((i for i, trained in enumerate(mask) if trained), default=0)
            if last:
                found.append(
                    Rollout(
                        token_ids=torch.tensor(tokens[: last + 1]),
                        loss_mask=torch.tensor(mask[: last + 1]),
                        temperature=float(value.get("temperature") or 1.0),
                        sample_id=value.get("sample_id"),
                    )
                )
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no sample holds a sampled token to learn from")
    return found


def _arrays(value: Any) -> tuple[list[int], list[bool]]:
    tokens, mask = value["token_ids"], value["loss_mask"]
    if not isinstance(tokens, list) or not isinstance(mask, list) or len(tokens) != len(mask):
        raise ValueError("the two must be arrays of one length")
    if not all(type(token) is int and token >= 0 for token in tokens) or not all(type(trained) is bool for trained in mask):
        raise ValueError("token ids must be whole numbers, mask entries true or false")
    return tokens, mask


@torch.no_grad()
def stream_of(policy: Decoder, rollouts: Sequence[Rollout], layers: Sequence[int] = ()) -> DraftStream:
    """The states the policy makes of some rollouts in one forward pass; `layers` as in `DraftConfig.feature_layers`."""
    device = policy.embed_tokens.device
    lengths = [rollout.num_rows for rollout in rollouts]
    tokens = torch.cat([rollout.token_ids[:-1] for rollout in rollouts])
    if int(tokens.max()) >= policy.config.vocab_size:
        raise ValueError(f"token {int(tokens.max())} is outside the policy's vocabulary of {policy.config.vocab_size}")
    plan: Any
    plan, positions = packed_plan(lengths, [-1] * len(lengths))
    if device.type == "cuda":
        from miles_kernels.cuda.attention import KVBatch

        plan = KVBatch.packed(lengths, str(device))
    taps: dict[int, torch.Tensor | None] = dict.fromkeys(layers)
    hidden = policy(tokens.to(device), positions.to(device), PackedKV(plan), taps=taps or None)
    features = torch.cat([x for layer in layers if (x := taps[layer]) is not None], 1) if taps else None
    return DraftStream.of(rollouts, hidden, features)


def train_offline(
    trainer: DraftTrainer,
    policy: Decoder,
    rollouts: Sequence[Rollout],
    num_steps: int,
    rows_per_step: int,
    *,
    seed: int = 0,
    noise_seed: int = 0,
) -> Iterator[DraftStep]:
    """`num_steps` updates, each on about `rows_per_step` rows of rollouts in an order that `seed` keys; yields every step.

    `noise_seed` is the seed the rollouts were sampled with, for the estimate. ValueError where there are no rows.
    """
    if not any(rollout.num_rows > 0 for rollout in rollouts):
        raise ValueError(f"{len(rollouts)} rollouts hold no row to train a draft on; sample some that are longer than one token")
    layers, order = trainer.draft.config.feature_layers, _endless(len(rollouts), seed)
    with torch.no_grad():
        facts = Policy(
            embed=policy.embed_tokens, head=policy.head, seed=noise_seed, stop_ids=frozenset(policy.config.eos_token_ids)
        )
    for _ in range(num_steps):
        chosen, rows = [], 0
        while rows < rows_per_step:
            chosen.append(rollouts[next(order)])
            rows += chosen[-1].num_rows
        yield trainer.step([stream_of(policy, chosen, layers)], facts)


def _endless(count: int, seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        order = list(range(count))
        rng.shuffle(order)
        yield from order
