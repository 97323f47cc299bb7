"""The model a trainer trains: whole in one process, or cut over several with FSDP2. One interface, one forward pass.

Legend: M = trained tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from miles_core.trainer.optim import Optimized, sum_of_squares
from miles_core.trainer.packing import Microbatch
from miles_core.trainer.weights import Owned, hf_slices
from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.ops.logprob import LogprobOutput


class WholeModel:
    """A decoder in one process, nothing cut."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.dtype: torch.dtype = decoder.contract.torch_dtype
        self.device: torch.device = decoder.embed_tokens.device
        self.slices = hf_slices(decoder)
        self.context = (0, 1)
        self.watcher: Callable[[Microbatch, Tensor, Mapping[int, Tensor]], None] | None = None
        """Told of the states of every forward pass that has a gradient."""
        self.tapped: tuple[int, ...] = ()
        """Layers whose incoming residual stream the watcher is shown, too."""

    def weights(self) -> dict[str, Owned]:
        """Every parameter by its name in the decoder, as this process holds it."""
        return {
            name: Owned(name, tuple(p.shape), p.detach(), ((0, p.numel()),), None) for name, p in self.decoder.named_parameters()
        }

    def optimized(self) -> list[Optimized]:
        """What the optimizer works on: the decoder's parameters, with a master for those below float32."""
        return [Optimized(name, p, p) for name, p in self.decoder.named_parameters() if p.requires_grad]

    def __call__(self, micro: Microbatch) -> LogprobOutput:
        """log p and entropy of the M trained tokens of a micro-batch."""
        taps: dict[int, Tensor | None] = dict.fromkeys(self.tapped)
        hidden = self.decoder(micro.token_ids, micro.positions, PackedKV(micro.plan), taps=taps or None)
        self._show(micro, hidden, taps)
        return self.decoder.logprob(hidden.index_select(0, micro.source_index), micro.targets, micro.temperature)

    def _show(self, micro: Microbatch, hidden: Tensor, taps: Mapping[int, Tensor | None]) -> None:
        if self.watcher is not None and not micro.idle and torch.is_grad_enabled():
            self.watcher(micro, hidden.detach(), {layer: x.detach() for layer, x in taps.items() if x is not None})

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, tensor) of every weight; views, valid until the next step."""
        for name, tensor in self.decoder.hf_state():
            yield name, tensor.detach()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take (HF name, tensor) pairs. Raises ValueError naming what does not fit."""
        self.decoder.load_hf_state(tensors)

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Sum the accumulated gradients over what has not been summed in the backward pass; nothing here."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of the whole gradient, 0-dim float64."""
        return sum_of_squares(gradients).sqrt()
