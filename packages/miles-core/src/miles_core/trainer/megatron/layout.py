"""The process groups of megatron-core that follow from how the model is cut."""

from __future__ import annotations

import torch
import torch.distributed as dist

from miles_core.trainer.megatron.config import Cut
from miles_core.trainer.megatron.core import parallel_state
from miles_core.trainer.megatron.standins import on_device
from miles_core.trainer.processes import leave_at_exit


def make_groups(cut: Cut, device: torch.device) -> None:
    """Create megatron-core's process groups for this layout, or keep those of an earlier trainer with the same layout.

    torch.distributed must be initialised in every process; on CUDA with "cpu:gloo,cuda:nccl", because counts and statistics are
    CPU tensors. A process that has not done so is alone, and gets a group of its own: megatron-core always needs one.
    """
    if not dist.is_initialized():
        transport = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(transport, store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.destroy_model_parallel()  # groups of an earlier world, if there was one
    leave_at_exit()
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


def forget_groups() -> None:
    """Let go of megatron-core's groups, which then end with torch's; its own function leaves some in their places."""
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
