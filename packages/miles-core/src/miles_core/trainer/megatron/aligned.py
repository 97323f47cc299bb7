"""Our ops as megatron-core modules, so that a Megatron model computes the engine's bits.

Legend: t = tokens of this process, h = hidden size.

A sum over tensor-parallel shares would have another order than the engine's, so no product is summed over processes here:
layers that megatron-core cuts along the input are cut along the output instead, and activations are gathered. The forward bits
then do not depend on the number of processes. Weights, names and checkpoints stay megatron-core's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from miles_core.trainer.experts import spread_moe
from miles_core.trainer.megatron.core import MLP, ColumnParallelLinear, MoELayer, SharedExpertMLP, mappings
from miles_kernels.ops.act import swiglu
from miles_kernels.ops.linear import linear
from miles_kernels.ops.moe import moe_mlp
from miles_kernels.ops.norm import rms_norm
from miles_kernels.ops.rope import paired_order
from miles_kernels.ops.router import router


class AlignedNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.contiguous(), self.weight, self.eps)


class AlignedHeadNorm(AlignedNorm):
    """RMSNorm of heads; those that are rotated in part leave it, and are summed, in the decoder's order (`paired_order`)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, eps)
        model = config.miles.model
        order = paired_order(model.head_dim, model.rotary_dim) if model.rotary_dim < model.head_dim else None
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is None:
            return super().forward(x)
        return rms_norm(x.index_select(-1, self.order), self.weight.index_select(0, self.order), self.eps)


class AlignedColumn(ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's column-parallel layer on our product; the bias is part of it, so none is handed on."""

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, None]:
        """x [..., in] -> ([..., out / TP], or [..., out] when gathered; None)."""
        if self.tp_group.size() > 1:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        matrix = self.weight if weight is None else weight
        out = linear(x.reshape(-1, x.shape[-1]), matrix, self.bias, mode=self.config.miles.contract.matmul)
        out = out.view(*x.shape[:-1], -1)
        if self.gather_output and self.tp_group.size() > 1:
            out = mappings.gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, None


class AlignedOutput(AlignedColumn):
    """In place of the row-parallel layer: takes split activations, gathers them, and is cut along its output."""

    def __init__(self, input_size: int, output_size: int, *, input_is_parallel: bool = True, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, gather_output=True, **kwargs)

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, None]:
        """x [..., in / TP] -> ([..., out], None)."""
        if self.tp_group.size() > 1:
            x = mappings.gather_from_tensor_model_parallel_region(x, group=self.tp_group)
        return super().forward(x, weight)


class AlignedMLP(MLP):  # type: ignore[misc]
    """SwiGLU feed-forward, dense or one expert."""

    def forward(self, hidden_states: Tensor, per_token_scale: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        """[t, 1, h] -> ([t, 1, h], None)."""
        return self.linear_fc2(swiglu(self.linear_fc1(hidden_states)[0]))


class AlignedSharedExpert(SharedExpertMLP):  # type: ignore[misc]
    """The expert that every token visits."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[t, 1, h] -> [t, 1, h]."""
        out: Tensor = self.linear_fc2(swiglu(self.linear_fc1(hidden_states)[0]))[0]
        return out


class AlignedMoE(MoELayer):  # type: ignore[misc]
    """Mixture of experts: our router, grouped products and combination in slot order.

    megatron-core keeps one module per expert; their matrices are stacked for each pass. With expert parallelism, rows travel to
    the process of their expert and back, and each token adds up its experts in the order of its slots, as with one process.
    With tensor parallelism, whose processes have the same tokens and experts, each takes its stretch of the tokens through the
    experts; megatron-core sums the gradients of experts over these processes as over data-parallel ones.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[t, 1, h] -> ([t, 1, h], None)."""
        x, mode = hidden_states.reshape(-1, hidden_states.shape[-1]), self.config.miles.contract.matmul
        tokens, group = len(x), self.attn_tp_group
        if group.size() > 1:
            x = nn.functional.pad(x, (0, 0, 0, -tokens % group.size()))
        model = self.config.miles.model
        ids, weights = router(
            x, self.router.weight, model.num_experts_per_tok, normalize=model.norm_topk_prob, mode=mode,
            rule=model.sigmoid_rule, correction=self.router.expert_bias,
        )  # fmt: skip
        if group.size() > 1:
            x, weights = (mappings.scatter_to_sequence_parallel_region(each, group=group) for each in (x, weights))
            ids = ids.chunk(group.size())[group.rank()].contiguous()
        experts = self.experts.local_experts
        gate_up = torch.stack([expert.linear_fc1.weight for expert in experts])
        down = torch.stack([expert.linear_fc2.weight for expert in experts])
        if self.ep_group.size() == 1:
            out = moe_mlp(x, gate_up, down, ids, weights, mode=mode)
        else:
            out = spread_moe(x, gate_up, down, ids, weights, self.ep_group, mode)
        if group.size() > 1:  # what follows is done by all of them alike, so a gradient is split again, not summed
            whole = mappings.gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=group)
            out = whole[:tokens]
        out = out.view(hidden_states.shape)
        return (out if self.shared_experts is None else out + self.shared_experts(hidden_states)), None
