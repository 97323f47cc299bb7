"""Forward and backward of a draft as one CUDA graph: small drafts wait for launches, not for arithmetic.

Legend: R = rows of a shape, S = its sequences, L = the longest of them, M = rows with a label, K = depths, H = hidden size; a
stream that is smaller is padded with sequences of token 0 that nobody supervises. Every row belongs to a sequence, so nothing is
left uninitialised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miles_spec.losses import token_losses
from miles_spec.models.base import DraftModel
from miles_spec.models.unroll import UnrollPlan
from miles_spec.targets import DraftTargets
from miles_spec.train.config import DraftTrainConfig
from miles_spec.train.stream import DraftStream

ROWS = 512
"""Rows are rounded up to a multiple of this."""
MOST_GRAPHS = 16
"""Shapes kept; the one unused for longest makes room. They share their memory: each keeps only its inputs and gradients."""


class Shape(NamedTuple):
    """What a graph is made for."""

    rows: int
    sequences: int
    longest: int
    labels: int


def shape_of(lengths: Sequence[int], labels: Sequence[int]) -> Shape:
    """The shape that holds sequences of these lengths, what pads them, and so many labels of every depth."""
    longest = max(64, 1 << (max(lengths) - 1).bit_length())
    rows = -(-sum(lengths) // ROWS) * ROWS
    pads = -(-(rows - sum(lengths)) // longest)
    quarters = max(1, -(-4 * max(labels) // rows))
    return Shape(rows, max(16, 1 << (len(lengths) + pads - 1).bit_length()), longest, quarters * rows // 4)


def padded_lengths(lengths: Sequence[int], shape: Shape) -> list[int]:
    """[S]: the lengths, then those of padding sequences, then zeros."""
    left, out = shape.rows - sum(lengths), list(lengths)
    while left:
        out.append(min(left, shape.longest))
        left -= out[-1]
    return out + [0] * (shape.sequences - len(out))


@dataclass(kw_only=True)
class Inputs:
    """What a pass reads, of one shape, at one place."""

    features: Tensor
    """[R, F]"""
    hidden: Tensor
    """[R, H]: the policy's; `features` itself for an MTP draft"""
    integers: Tensor
    """int64 [K + 1, R]: tokens of every depth, then positions"""
    picked: Tensor
    """int64 [3, K, M]: rows that have a label, the labels, and their teachers; labels below 0 count for nothing"""
    bounds: Tensor
    """int32 [2 S + 1]: first rows of the sequences and the end, then their lengths"""
    heat: Tensor
    """fp32 [R]"""
    share: Tensor
    """fp32 [K]: 1 / labels of a depth"""

    @classmethod
    def like(cls, stream: DraftStream, shape: Shape, depths: int) -> Inputs:
        """Empty ones for streams such as this."""
        device, hidden = stream.device, stream.policy_hidden

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        own = empty(shape.rows, hidden.shape[1], dtype=hidden.dtype)
        apart = stream.features is not stream.policy_hidden
        features = empty(shape.rows, stream.features.shape[1], dtype=stream.features.dtype) if apart else own
        return cls(
            features=features,
            hidden=own,
            integers=empty(depths + 1, shape.rows, dtype=torch.int64),
            picked=empty(3, depths, shape.labels, dtype=torch.int64),
            bounds=empty(2 * shape.sequences + 1, dtype=torch.int32),
            heat=empty(shape.rows, dtype=torch.float32),
            share=empty(depths, dtype=torch.float32),
        )

    def fill(self, stream: DraftStream, targets: DraftTargets, shape: Shape, labels: Sequence[int]) -> None:
        """Write a stream, its targets (on the CPU) and the number of labels of every depth over all processes."""
        rows, depths = stream.num_rows, len(labels)
        lengths = padded_lengths(stream.lengths, shape)
        self.hidden[:rows].copy_(stream.policy_hidden)
        if self.features is not self.hidden:
            self.features[:rows].copy_(stream.features)
        integers = torch.zeros((depths + 1, shape.rows), dtype=torch.int64)
        integers[:depths, :rows] = targets.input_ids[:depths]
        integers[-1] = torch.cat([torch.arange(length) for length in lengths if length])
        picked = torch.zeros((3, depths, shape.labels), dtype=torch.int64)
        picked[1] = -1
        for depth in range(depths):
            here = targets.supervised[depth].nonzero().flatten()
            for row, values in enumerate((here, targets.labels[depth, here], targets.teacher[depth, here])):
                picked[row, depth, : len(here)] = values
        bounds = torch.zeros(2 * shape.sequences + 1, dtype=torch.int32)
        sizes = torch.tensor(lengths, dtype=torch.int32)
        bounds[1 : shape.sequences + 1] = sizes.cumsum(0)
        bounds[shape.sequences + 1 :] = sizes
        heat = stream.temperature()
        self.integers.copy_(integers)
        self.picked.copy_(picked)
        self.bounds.copy_(bounds)
        self.heat[:rows] = heat
        self.heat[rows:] = 1.0
        self.share.copy_(torch.tensor([1.0 / max(1, count) for count in labels]))

    def plan(self, shape: Shape, lengths: Sequence[int]) -> UnrollPlan:
        """The unrolled attention's, over these very tensors; only the CPU reads `lengths`."""
        plan = UnrollPlan(tuple(length for length in lengths if length), self.integers[-1])
        if self.bounds.is_cuda:
            from miles_kernels.cuda.attention import KVBatch

            first, sizes = self.bounds[: shape.sequences + 1], self.bounds[shape.sequences + 1 :]
            start, most = self.bounds[: shape.sequences], shape.longest
            plan.cache["cuda"] = KVBatch(first, sizes, start, None, 0, most, most, True)
        return plan


def run_pass(
    draft: DraftModel, config: DraftTrainConfig, inputs: Inputs, plan: UnrollPlan, embed: Tensor, head: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss [], loss and acceptance by depth [2, K]) of padded inputs. Nothing here asks the device for a number."""
    depths = config.depths
    rows, labels, teachers = inputs.picked
    states = draft.unroll(inputs.features, inputs.integers[:depths], plan, depths, embed=embed)
    total, losses, accepted = torch.zeros((), device=inputs.heat.device), [], []
    for depth, weight in enumerate(config.depth_weights):
        teacher = teachers[depth]
        found = token_losses(
            states[depth].index_select(0, rows[depth]),
            draft.head(head),
            labels[depth].clamp(min=0),
            kind=config.loss,  # type: ignore[arg-type]
            teacher_hidden=inputs.hidden.index_select(0, teacher),
            temperature=inputs.heat.index_select(0, teacher),
        )
        counted = labels[depth] >= 0
        loss = torch.where(counted, found.loss, 0.0).sum() * inputs.share[depth]
        total = total + weight * loss
        losses.append(loss.detach())
        accepted.append(torch.where(counted, found.acceptance, 0.0).sum() * inputs.share[depth])
    return total, torch.stack((torch.stack(losses), torch.stack(accepted)))


@dataclass(kw_only=True)
class _Graph:
    graph: Any
    inputs: Inputs
    numbers: Tensor
    gradients: list[Tensor | None]


class CapturedPasses:
    """Graphs of a draft's pass, by shape and by where the policy's embedding and head lie."""

    def __init__(self, draft: DraftModel, config: DraftTrainConfig) -> None:
        self._draft, self._config = draft, config
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._stream: Any = None
        self._pool: Any = None

    def serves(self, stream: DraftStream) -> bool:
        """Whether a stream may be trained on this way: on a GPU, with a draft that has no head of its own."""
        return stream.device.type == "cuda" and self._draft.draft_ids is None

    def run(self, stream: DraftStream, targets: DraftTargets, labels: Sequence[int], embed: Tensor, head: Tensor) -> Tensor:
        """Leave gradients at the draft's parameters; loss and acceptance by depth [2, K], on the device."""
        shape = shape_of(stream.lengths, targets.num_supervised)
        key = (shape, embed.data_ptr(), head.data_ptr(), stream.policy_hidden.dtype)
        held = self._graphs.pop(key, None)
        if held is None:
            while len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)
            inputs = Inputs.like(stream, shape, self._config.depths)
            inputs.fill(stream, targets, shape, labels)
            held = self._capture(inputs, inputs.plan(shape, padded_lengths(stream.lengths, shape)), embed, head)
        else:
            held.inputs.fill(stream, targets, shape, labels)
        self._graphs[key] = held
        held.graph.replay()
        for parameter, gradient in zip(self._draft.parameters(), held.gradients, strict=True):
            parameter.grad = gradient
        return held.numbers

    def _capture(self, inputs: Inputs, plan: UnrollPlan, embed: Tensor, head: Tensor) -> _Graph:
        parameters, current = list(self._draft.parameters()), torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.enable_grad():
            for _ in range(2):  # compiles kernels and fills caches, which a capture must not do
                self._clear(parameters)
                run_pass(self._draft, self._config, inputs, plan, embed, head)[0].backward()
            self._clear(parameters)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                loss, numbers = run_pass(self._draft, self._config, inputs, plan, embed, head)
                loss.backward()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return _Graph(graph=graph, inputs=inputs, numbers=numbers, gradients=[parameter.grad for parameter in parameters])

    @staticmethod
    def _clear(parameters: list[Any]) -> None:
        for parameter in parameters:
            parameter.grad = None
