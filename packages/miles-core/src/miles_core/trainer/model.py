"""The model a trainer trains: whole in one process, or cut over several with FSDP2. One interface, one forward pass.

Legend: M = trained tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from miles_core.memory.peers import Peers
from miles_core.trainer.optim import Optimized, sum_of_squares
from miles_core.trainer.packing import Microbatch
from miles_core.trainer.weights import Owned, corrections, hf_slices, whole
from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.ops.chain import begin, take
from miles_kernels.ops.logprob import LogprobOutput


class WholeModel:
    """A decoder in one process, nothing cut."""

    in_step = False
    """Whether the processes meet in every pass, so that each must make as many."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.dtype: torch.dtype = decoder.contract.torch_dtype
        self.device: torch.device = decoder.embed_tokens.device
        self.slices = hf_slices(decoder)
        self.context = (0, 1)
        self.watcher: Callable[[Microbatch, Tensor, Mapping[int, Tensor]], None] | None = None
        """Told of the states of every forward pass that has a gradient."""
        self.peers: dict[str, Peers] = {}
        """Other processes that have a part of it, by axis."""
        self.tapped: tuple[int, ...] = ()
        """Layers whose incoming residual stream the watcher is shown, too."""

    def weights(self) -> dict[str, Owned]:
        """Every parameter, and the routers' corrections, by its name in the decoder, as this process holds it."""
        return {name: whole(name, x) for name, x in (*self.decoder.named_parameters(), *corrections(self.decoder))}

    def optimized(self) -> list[Optimized]:
        """What the optimizer works on: the decoder's parameters, with a master for those below float32."""
        return [Optimized(name, p, p) for name, p in self.decoder.named_parameters() if p.requires_grad]

    def __call__(self, micro: Microbatch) -> LogprobOutput:
        """log p and entropy of the M trained tokens of a micro-batch."""
        taps: dict[int, Tensor | None] = dict.fromkeys(self.tapped)
        hidden = self.decoder(micro.token_ids, micro.positions, PackedKV(micro.plan), taps=taps or None)
        self._show(micro, hidden, taps)
        if micro.head is None:
            return self.decoder.logprob(hidden.index_select(0, micro.source_index), micro.targets, micro.temperature)
        index, keep = micro.head
        heat = micro.temperature[index] if isinstance(micro.temperature, Tensor) else micro.temperature
        out = self.decoder.logprob(hidden.index_select(0, micro.source_index[index]), micro.targets[index], heat)
        return LogprobOutput(*(None if each is None else each.index_select(0, keep) for each in out))

    def _show(self, micro: Microbatch, hidden: Tensor, taps: Mapping[int, Tensor | None]) -> None:
        if self.watcher is not None and not micro.idle and torch.is_grad_enabled():
            self.watcher(micro, hidden.detach(), {layer: x.detach() for layer, x in taps.items() if x is not None})

    def require_chain(self) -> None:
        """Raise ValueError unless the gradients of all weights can be chained over micro-batches."""
        config, what = self.decoder.config, 'trainer.gradients = "chained"'
        if config.attention_bias or config.output_bias or config.mlp_bias:
            raise ValueError(f"{what}: the gradients of biases are not chained; use summed")
        if config.rotary_dim < config.head_dim:
            raise ValueError(f"{what}: heads that are rotated in part are reordered, and their gradients not chained; use summed")
        if self.decoder.contract.precision != "full":
            raise ValueError(f"{what}: float8 products are not chained; use summed")
        if self.device.type == "cuda":
            from miles_kernels.cuda.chain import disagreement

            why = disagreement(str(self.device))
            if why is not None:
                raise ValueError(f"{what} does not hold on this GPU: {why}; use summed")

    def begin_chain(self) -> None:
        """From now on the gradients of all weights are sums that each backward pass continues."""
        for name, parameter in self.decoder.named_parameters():
            if parameter.requires_grad:
                begin(parameter, looked_up=name == "embed_tokens")

    def end_chain(self) -> list[Tensor]:
        """The finished gradients, float32, in the order of `optimized`."""
        strays = [name for name, p in self.decoder.named_parameters() if p.grad is not None]
        assert not strays, f"gradients beside the chain: {strays}"
        return [take(p) for p in self.decoder.parameters() if p.requires_grad]

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
