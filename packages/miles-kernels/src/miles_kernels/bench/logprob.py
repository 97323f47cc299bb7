"""Fused linear -> log-probability and entropy, forward and backward, against the plain product of the same size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from miles_kernels.bench.report import Row
from miles_kernels.bench.timing import compare
from miles_kernels.cuda import logprob
from miles_kernels.cuda.linear import linear

TOKENS, VOCAB, CHUNK = 8192, 151936, 2048


def rows() -> Iterator[Row]:
    """`default` is torch.mm in chunks of 2048 rows (times three for the backward): logits only, nothing else computed."""
    for hidden in (1024, 4096):
        x = torch.randn(TOKENS, hidden, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(VOCAB, hidden, device="cuda", dtype=torch.bfloat16) * (3 / hidden**0.5)
        targets = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
        inverse = logprob.inverse_temperature(0.8, TOKENS, x.device)
        logits = torch.empty(CHUNK, VOCAB, device="cuda", dtype=torch.bfloat16)
        mm = partial(_product, x, w, logits)
        lp, ent, norm = logprob.forward(x, w, targets, inverse)
        g_lp, g_ent = torch.randn(TOKENS, device="cuda"), torch.randn(TOKENS, device="cuda") * 0.1
        args = (x, w, targets, inverse)
        forward = compare(
            {
                "default": [mm],
                "aligned": [partial(logprob.forward, *args)],
                "without entropy": [partial(logprob.forward, *args, entropy=False)],
            },
            graph=False,
        )
        extra = _extra(partial(logprob.forward, *args), 3 * 4 * TOKENS)
        work = 2.0 * TOKENS * VOCAB * hidden
        moved = 2.0 * (TOKENS + VOCAB) * hidden
        notes: dict[str, float | str] = {"extra MB": extra / 1e6, "unequal": float(_unequal(x, w, targets, lp, ent))}
        yield Row(
            "log-probability forward", f"T={TOKENS} V={VOCAB} H={hidden}", {k: v.seconds for k, v in forward.items()},
            work, moved, notes=notes,
        )  # fmt: skip

        backward = partial(logprob.backward, (g_lp, g_ent), *args, norm, ent)
        timed = compare({"default": [mm], "aligned": [backward]}, rounds=5, graph=False)
        seconds = {"default": 3 * timed["default"].seconds, "aligned": timed["aligned"].seconds}
        first, second = backward(), backward()
        same = all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
        part = logprob.backward((g_lp[:300], g_ent[:300]), x[:300], w, targets[:300], inverse[:300], norm[:300], ent[:300])
        assert first[0] is not None and first[1] is not None and part[0] is not None
        extra = _extra(backward, first[0].nbytes + first[1].nbytes)
        notes = {"extra MB": extra / 1e6, "same twice": str(same), "unequal": float((part[0] != first[0][:300]).sum())}
        yield Row("log-probability backward", f"T={TOKENS} V={VOCAB} H={hidden}", seconds, 3 * work, 2 * moved, notes=notes)


def _product(x: torch.Tensor, w: torch.Tensor, logits: torch.Tensor) -> None:
    for start in range(0, TOKENS, CHUNK):
        torch.mm(x[start : start + CHUNK], w.t(), out=logits)


def _extra(call: Callable[[], object], outputs: int) -> int:
    """Peak bytes beyond what was allocated before and what is returned."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs


def _unequal(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, lp: torch.Tensor, ent: torch.Tensor) -> int:
    """Engine's path (stored float32 logits) against the fused one, for 1, 7 and 200 rows."""
    count = 0
    for start, size in ((0, 1), (11, 7), (1000, 200)):
        part = slice(start, start + size)
        scored = logprob.logprob_from_logits(linear(x[part], w, out_dtype=torch.float32), targets[part], 0.8)
        count += int((scored.logprob != lp[part]).sum()) + int((scored.entropy != ent[part]).sum())
    return count
