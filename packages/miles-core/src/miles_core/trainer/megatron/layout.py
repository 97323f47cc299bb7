"""How many processes share what, checked against the model, and the process groups of megatron-core that follow from it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from miles_core.trainer.megatron.config import Cut
from miles_core.trainer.megatron.core import parallel_state
from miles_core.trainer.megatron.standins import on_device
from miles_kernels.nn.config import DecoderConfig


def check_layout(cut: Cut, model: DecoderConfig, world_size: int) -> None:
    """Raise ValueError naming every size that does not divide what it cuts."""
    tp, pp, cp, ep = cut.tp, cut.pp, cut.cp, cut.ep
    wrong = []

    def divides(what: str, size: int, name: str, by: int) -> None:
        if size % by:
            wrong.append(f"{what} = {size} is no multiple of {name} = {by}")

    if world_size % (tp * pp * cp):
        wrong.append(f"{world_size} processes are no multiple of tensor x pipeline x context parallel = {tp} x {pp} x {cp}")
    elif (world_size // (tp * pp)) % ep:
        wrong.append(f"{world_size // (tp * pp)} data and context parallel processes are no multiple of trainer.ep = {ep}")
    for what in ("num_attention_heads", "num_key_value_heads"):
        divides(what, getattr(model, what), "trainer.megatron.tp x trainer.cp", tp * cp)
    for what in ("hidden_size", "intermediate_size"):
        divides(what, getattr(model, what), "trainer.megatron.tp", tp)
    divides("num_hidden_layers", model.num_hidden_layers, "trainer.megatron.pp", pp)
    divides("num_experts", model.num_experts, "trainer.ep", ep)
    if ep > 1 and not model.num_experts:
        wrong.append(f"trainer.ep = {ep} needs a mixture of experts, not a {model.family} model")
    if tp > 1 and model.num_experts:
        wrong.append("trainer.megatron.tp above 1 is not supported for a mixture of experts; use trainer.ep")
    if wrong:
        raise ValueError("the megatron backend cannot be cut like this: " + "; ".join(wrong))


def make_groups(cut: Cut, device: torch.device) -> None:
    """Create megatron-core's process groups for this layout, or keep those of an earlier trainer with the same layout.

    torch.distributed must be initialised in every process; on CUDA with "cpu:gloo,cuda:nccl", because counts and log
    statistics are CPU tensors. Raises ValueError otherwise.
    """
    if not dist.is_initialized():
        raise ValueError(
            "the megatron backend needs torch.distributed, for one process too: start it with torchrun, or call "
            'init_process_group("gloo") on a CPU, ("cpu:gloo,cuda:nccl") on GPUs'
        )
    wanted = (cut.tp, cut.pp, cut.cp, cut.ep)
    if parallel_state.model_parallel_is_initialized():
        if current_sizes() == wanted:
            return
        parallel_state.destroy_model_parallel()
    with on_device(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=cut.tp,
            pipeline_model_parallel_size=cut.pp,
            context_parallel_size=cut.cp,
            expert_model_parallel_size=cut.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )


def current_sizes() -> tuple[int, int, int, int]:
    """(tensor, pipeline, context, expert) parallel sizes of the groups that exist."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
