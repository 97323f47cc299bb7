"""What a megatron trainer holds on the device, by tag, for `memory.regions.Mover`.

megatron-core keeps weights and gradients in flat buffers of which parameters are views, and a float32 copy of its share of them;
all of it is moved by storage, so nothing in megatron-core notices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from miles_core.memory.regions import Mover, Region

if TYPE_CHECKING:
    from miles_core.trainer.megatron.backend import MegatronTrainer

TAGS = ("masters", "moments", "weights", "gradients", "reference")
"""In the order they come back."""


def make_mover(trainer: MegatronTrainer) -> Mover:
    """Regions of a trainer. Gradients may be dropped: every update begins by zeroing them."""
    optimizer, reference = trainer.optimizer, trainer.reference

    def held() -> Iterator[Tensor]:
        for part in optimizer.parts():
            for group in part.optimizer.param_groups:
                yield from group["params"]

    def masters() -> list[Tensor]:
        own = {weight.untyped_storage().data_ptr() for weight in _weights(trainer.model)}
        return [each for each in held() if each.untyped_storage().data_ptr() not in own]  # in float32 they are the weights

    def moments() -> Iterator[Tensor]:
        for part in optimizer.parts():
            for state in part.optimizer.state.values():
                yield from (state["exp_avg"], state["exp_avg_sq"])

    def gradients() -> Iterator[Tensor]:
        for buffer in (*optimizer.ddp.buffers, *optimizer.ddp.expert_parallel_buffers):
            yield buffer.grad_data

    return Mover(
        [
            Region(tag="masters", tensors=masters),
            Region(tag="moments", tensors=moments),
            Region(tag="weights", tensors=lambda: _weights(trainer.model)),
            Region(tag="gradients", tensors=gradients, undefined_after_drop=True),
            Region(tag="reference", tensors=lambda: [] if reference is None else _weights(reference)),
        ],
        trainer.device,
    )


def ordered(tags: Iterable[str]) -> list[str]:
    """The tags in the order they come back. Raises ValueError for an unknown one."""
    wanted = set(tags)
    unknown = sorted(wanted - set(TAGS))
    if unknown:
        raise ValueError(f"unknown memory tag {unknown[0]!r}; known: {', '.join(TAGS)}")
    return [tag for tag in TAGS if tag in wanted]


def _weights(model: Any) -> list[Tensor]:
    return [weight.detach() for weight in model.module.parameters()]
