"""Compare what a backend did with what the oracle says."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from miles_core.trainer.conformance.cases import Case, Layout
from miles_core.trainer.conformance.oracle import Expected


@dataclass(frozen=True)
class Tolerance:
    """Largest differences allowed; the defaults are for fp32 arithmetic."""

    loss: float = 1e-5
    """Relative to the larger of 1 and the loss."""
    grad_norm: float = 2e-5
    """Relative."""
    logprob: float = 2e-5
    """Absolute, in nats."""
    update: float = 5e-4
    """Of a tensor's change, relative to that change's norm (a weight rounds to 6e-8 of itself, an update is about 1e-2)."""


BFLOAT16 = Tolerance(loss=0.02, grad_norm=0.02, logprob=0.25, update=0.06)
"""For models that compute in bfloat16: three significant digits in, about two out. Compare layouts with each other for bits."""


@dataclass(frozen=True)
class Result:
    """What the processes of one layout did with one case. Tensors are those of rank 0."""

    case: Case
    layout: Layout
    metrics: dict[str, float]
    logprob: Tensor
    """fp32 [N], before the update."""
    weights: dict[str, Tensor]
    """Exported after the update, HF names."""
    digests: tuple[str, ...] = ()
    """Per rank: one hash over metrics, log-probabilities and exported weights. Ranks may not differ."""
    refusals: tuple[str, ...] = field(default=())
    """Per rank: the ValueError the factory or the step raised, "" for none."""


def check(result: Result, expected: Expected, tolerance: Tolerance) -> list[str]:
    """What is wrong with a result, in words; empty when it conforms."""
    where = f"{result.case.name} on {result.layout.name}"
    if any(result.refusals):
        return [f"{where}: refused: {text}" for text in result.refusals if text]
    wrong = [f"{where}: the ranks disagree: {', '.join(result.digests)}"] if len(set(result.digests)) > 1 else []

    def compare(what: str, got: float, limit: float) -> None:
        if not got <= limit:
            wrong.append(f"{where}: {what} is off by {got:.3g}, allowed is {limit:.3g}")

    compare("the loss", abs(result.metrics["train/loss"] - expected.loss) / max(1.0, abs(expected.loss)), tolerance.loss)
    norm = abs(result.metrics["train/grad_norm"] - expected.grad_norm) / expected.grad_norm if expected.grad_norm else 0.0
    compare("the gradient norm", norm, tolerance.grad_norm)
    if result.logprob.shape != expected.logprob.shape:
        wrong.append(f"{where}: log-probabilities {tuple(result.logprob.shape)}, expected {tuple(expected.logprob.shape)}")
    else:
        compare("a log-probability", float((result.logprob.double() - expected.logprob).abs().max()), tolerance.logprob)
    missing, extra = expected.after.keys() - result.weights.keys(), result.weights.keys() - expected.after.keys()
    wrong += [f"{where}: {name} was not exported" for name in sorted(missing)]
    wrong += [f"{where}: {name} was exported, but is no weight of the model" for name in sorted(extra)]
    for name in sorted(expected.after.keys() & result.weights.keys()):
        got, want = result.weights[name], expected.after[name]
        if got.shape != want.shape:
            wrong.append(f"{where}: {name} is {tuple(got.shape)}, expected {tuple(want.shape)}")
            continue
        change = float((want - expected.before[name]).norm()) or 1.0
        compare(f"the update of {name}", float(torch.linalg.vector_norm(got.double() - want)) / change, tolerance.update)
    return wrong
