"""megatron-core's distributed AdamW over a `MegatronModel`: gradients in float32 buffers, state cut over data-parallel processes.

What megatron-core decides elsewhere is fixed to Miles' contract: gradients are sums (denominators are in the loss), vectors do
not decay, and clipping scales by limit / norm exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from miles_core.trainer.config import OptimizerConfig
from miles_core.trainer.megatron import core
from miles_core.trainer.megatron.model import MegatronModel
from miles_core.trainer.megatron.standins import on_device
from miles_core.trainer.optim import lr_at


class DistributedAdamW:
    """Gradients, norm, update and state of one model. All methods are collective."""

    def __init__(self, model: MegatronModel, cfg: OptimizerConfig, total_updates: int | None) -> None:
        lr_at(cfg, cfg.warmup_steps, total_updates)  # an incomplete schedule is refused now, not at the first update
        self.model, self.cfg, self.total_updates = model, cfg, total_updates
        self.num_updates = 0
        low = model.contract.torch_dtype is torch.bfloat16
        settings = core.DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False, check_for_nan_in_grad=False
        )
        with on_device(model.device):
            self.ddp = core.DistributedDataParallel(model.settings, settings, model.module)
            self.inner = core.get_megatron_optimizer(
                core.OptimizerConfig(
                    optimizer="adam",
                    lr=cfg.lr,
                    weight_decay=cfg.weight_decay,
                    adam_beta1=cfg.betas[0],
                    adam_beta2=cfg.betas[1],
                    adam_eps=cfg.eps,
                    clip_grad=0.0,
                    bf16=low,
                    params_dtype=model.contract.torch_dtype,
                    use_distributed_optimizer=True,
                ),
                [self.ddp],
                use_gloo_process_groups=False,
            )
            self._create_state()
        model.settings.finalize_model_grads_func = _finalize
        model.settings.no_sync_func = self.ddp.no_sync

    def _create_state(self) -> None:
        """Zero moments now, so that a checkpoint before the first update has the same shape as any other."""
        for part in self.parts():
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    zeros = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                    part.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}

    def sharded_state(self, weights: Any, metadata: dict[str, Any], *, loading: bool) -> Any:
        """The state in model space, as `dist_checkpointing` saves and loads it."""
        with on_device(self.model.device), ExitStack() as stack:
            for part in self.parts():
                gather = partial(_gather_padded, part, part.get_parameter_state_dp_zero)
                stack.enter_context(mock.patch.object(part, "get_parameter_state_dp_zero", gather))
            return self.inner.sharded_state_dict(weights, is_loading=loading, metadata=metadata)

    @torch.no_grad()
    def load(self, state: Any, num_updates: int) -> None:
        """Take up a state that megatron-core has read; the counters become `num_updates`."""
        with on_device(self.model.device), ExitStack() as stack:
            for part in self.parts():
                stack.enter_context(mock.patch.object(part, "_set_main_param_and_optimizer_states", partial(_set_states, part)))
            self.inner.load_state_dict(state)
        for part in self.parts():
            for held in part.optimizer.state.values():
                held["step"] = torch.tensor(float(num_updates))  # megatron-core gives all weights one tensor, counted up by each
        self.num_updates = num_updates

    def parts(self) -> Iterator[Any]:
        """megatron-core's optimizers: one for experts, one for the rest; those without parameters here left out."""
        for part in getattr(self.inner, "chained_optimizers", [self.inner]):
            if not part.is_stub_optimizer:
                yield part

    def clear(self) -> None:
        """Zero all gradients."""
        self.ddp.zero_grad_buffer()
        with on_device(self.model.device):
            self.inner.zero_grad()

    @torch.no_grad()
    def norm(self) -> float:
        """Global norm of the summed gradients, once for every weight of the model."""
        with on_device(self.model.device):
            self.inner.prepare_grads()
            return float(self.inner.get_grad_norm())

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """Apply one update with the gradients times `scale`; returns the learning rate it used."""
        lr = lr_at(self.cfg, self.num_updates, self.total_updates)
        with on_device(self.model.device):
            if scale != 1.0:
                self.ddp.scale_gradients(scale)
            for group in self.inner.param_groups:
                group["lr"] = lr
                group["weight_decay"] = self.cfg.weight_decay * group["wd_mult"]  # 0 for vectors
            self.inner.step()
        self.num_updates += 1
        return lr

    def bad_gradients(self) -> list[str]:
        """Names of this process' weights whose gradient is not finite, in the shares it holds."""
        return [name for name, p in self.model.named().items() if not _finite(getattr(p, "main_grad", None))]


def _set_states(part: Any, model_param: Any, tensors: dict[str, Tensor]) -> None:
    """Copy what was read of one weight's state; megatron-core's own also asks for torch's step, which its format lacks."""
    group, order = part.model_param_group_index_map[model_param]
    param = part.optimizer.param_groups[group]["params"][order]
    state = {"param": param, **part.optimizer.state[param]}
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def _gather_padded(part: Any, gather: Any, *args: Any, **kwargs: Any) -> Any:
    """The gathered state with the padding between buckets put back.

    megatron-core drops it and then looks weights up by their place with padding: where a second bucket follows one that ends
    unevenly (tied embeddings with stages), every weight in it would be saved as something else.
    """
    state = gather(*args, **kwargs)
    for index, buffer in enumerate(part.buffers if state is not None else ()):
        for tensors in state[index].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                whole, at = tensors[key].new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = tensors[key][at : at + bucket.numel_unpadded]
                    at += bucket.numel_unpadded
                assert at == len(tensors[key]), (at, len(tensors[key]))
                tensors[key] = whole
    return state


def _finite(grad: Tensor | None) -> bool:
    return grad is None or bool(grad.isfinite().all())


def _finalize(models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """megatron-core's reductions without its division by a token count: our losses bring their denominators."""
    core.finalize_model_grads(models, None, **kwargs)
