"""The one module that imports megatron-core: every name of it that Miles uses, with its warnings about absent extras off.

Needs `miles-core[megatron]`. Written against 0.16 (Python 3.11) and 0.19 (Python 3.12): what differs between the two is here.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Apex and Transformer Engine are absent on purpose
        import megatron.core
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import mappings
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear
        from megatron.core.transformer.attention import SelfAttention
        from megatron.core.transformer.mlp import MLP
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
        from megatron.core.transformer.transformer_config import TransformerConfig
        from megatron.core.transformer.transformer_layer import TransformerLayer
except ImportError as error:
    raise ImportError(f'trainer.backend = "megatron" needs megatron-core ({error}): pip install "miles-core[megatron]"') from None

VERSION: str = megatron.core.__version__
logging.getLogger("megatron").setLevel(logging.ERROR)
if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 reads the name, but sets it only where Transformer Engine is there
    moe_utils.te_general_gemm = None

__all__ = [
    "MLP",
    "VERSION",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "GPTModel",
    "MoELayer",
    "OptimizerConfig",
    "PackedSeqParams",
    "SelfAttention",
    "SharedExpertMLP",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "WrappedTorchNorm",
    "dist_checkpointing",
    "filesystem_async",
    "finalize_model_grads",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "mappings",
    "parallel_state",
    "replace_module",
    "submodules_of",
]


def submodules_of(spec: Any) -> Any:
    """The submodules of a spec entry: a ModuleSpec holds them, a `functools.partial` (0.19) has them as a keyword."""
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]


def replace_module(spec: Any, module: Any) -> Any:
    """The spec entry with another class for the same submodules."""
    from functools import partial

    if hasattr(spec, "submodules"):
        spec.module = module
        return spec
    of_layer = getattr(spec.func, "__name__", "") == "as_mlp_submodule"  # a layer's own; experts are made by the class
    return partial(module.as_mlp_submodule if of_layer else module, **spec.keywords)
