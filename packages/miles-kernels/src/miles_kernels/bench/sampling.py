"""Sampling against a copy of the logits and against softmax with multinomial, at a vocabulary of 151936."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from miles_kernels.bench.report import Row
from miles_kernels.bench.timing import compare, rotating
from miles_kernels.cuda.logprob import logprob_from_logits
from miles_kernels.cuda.sample import draw
from miles_kernels.ops.sample import sample

VOCAB = 151936
CHECKED = 32


def rows() -> Iterator[Row]:
    """Token and log-probability in one read of float32 logits."""
    for batch in (1, 16, 64, 256):
        logits = rotating(partial(_logits, batch), most=16)
        ids, heat = torch.arange(batch, device="cuda"), torch.full((batch,), 0.9, device="cuda")
        keys = {"sample_id": ids, "position": ids, "temperature": heat}
        target = torch.empty_like(logits[0])
        found = {
            name: timing.seconds
            for name, timing in compare(
                {
                    "aligned": [partial(draw, z, seed=1, **keys) for z in logits],
                    "copy": [partial(target.copy_, z) for z in logits],
                    "softmax, multinomial": [partial(_stock, z) for z in logits],
                }
            ).items()
        }
        size = 4.0 * batch * VOCAB
        notes: dict[str, float | str] = {"of copy bandwidth": found["copy"] / 2 / found["aligned"]}
        notes |= _check(logits[0][:CHECKED], {name: x[:CHECKED] for name, x in keys.items()})
        yield Row("sampling", f"{batch} x {VOCAB}", found, 0.0, size, default="softmax, multinomial", notes=notes)


def _logits(batch: int) -> Tensor:
    return torch.randn(batch, VOCAB, device="cuda") * 3


def _stock(logits: Tensor) -> Tensor:
    return (logits / 0.9).softmax(-1).multinomial(1)


def _check(logits: Tensor, keys: dict[str, Tensor]) -> dict[str, float]:
    """Tokens that the CPU draws otherwise, and log-probabilities that differ from a trainer's, over ten seeds."""
    tokens = scores = 0
    cpu = {name: x.cpu() for name, x in keys.items()}
    for seed in range(10):
        drawn = draw(logits, seed=seed, **keys)
        tokens += int((drawn.token.cpu() != sample(logits.cpu(), seed=seed, **cpu).token).sum())
        scores += int((drawn.logprob != logprob_from_logits(logits, drawn.token, keys["temperature"]).logprob).sum())
    return {"tokens unlike the CPU's": float(tokens), "unequal": float(scores)}
