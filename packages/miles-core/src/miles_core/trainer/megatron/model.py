"""A GPT model of megatron-core with the shape of a `DecoderConfig`: its TransformerConfig, its layer spec, its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miles_core.convert.megatron import EXPERT_BIAS, Part, bias_kind, join_all, padded_vocab, parts
from miles_core.trainer.megatron.aligned import (
    AlignedColumn,
    AlignedHeadNorm,
    AlignedMLP,
    AlignedMoE,
    AlignedNorm,
    AlignedOutput,
    AlignedSharedExpert,
)
from miles_core.trainer.megatron.attention import PackedAttention, PackedSelfAttention
from miles_core.trainer.megatron.config import Cut
from miles_core.trainer.megatron.core import (
    VERSION,
    GPTModel,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    WrappedTorchNorm,
    get_gpt_layer_local_spec,
    parallel_state,
    replace_module,
    submodules_of,
)
from miles_core.trainer.megatron.logprob import token_parallel_logprob, vocab_parallel_logprob
from miles_core.trainer.megatron.standins import on_device
from miles_core.trainer.megatron.stream import Work
from miles_kernels.contract import Contract, OpContract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import rope_table
from miles_kernels.ops.logprob import LogprobOutput
from miles_kernels.ops.rope import INITIAL_POSITIONS


@dataclass(frozen=True)
class Facts:
    """What our modules need to know, carried by megatron-core's configuration as `config.miles`."""

    model: DecoderConfig
    contract: Contract
    aligned: bool
    recompute: bool


class PackedLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's transformer layer; its activations can be recomputed in the backward pass. There is no dropout."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.config.miles.recompute and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        device = (args[0] if args else kwargs["hidden_states"]).device

        def again(*inner: Any, **named: Any) -> Any:
            with on_device(device):
                return super(PackedLayer, self).forward(*inner, **named)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class PackedGPT(GPTModel):  # type: ignore[misc]
    """megatron-core's GPT model up to the hidden states; log-probabilities are `logprob`'s business."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def transformer_config(model: DecoderConfig, cut: Cut, contract: Contract, device: torch.device, recompute: bool = False) -> Any:
    """megatron-core's TransformerConfig of `model`. Raises ValueError for what its GPT model cannot express."""
    biases, dtype = bias_kind(model), contract.torch_dtype
    experts: dict[str, Any] = {}
    if model.num_experts:
        experts = {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.num_experts_per_tok,
            "moe_ffn_hidden_size": model.moe_intermediate_size,
            "moe_layer_freq": [int(model.is_moe_layer(layer)) for layer in range(model.num_hidden_layers)],
            "moe_router_load_balancing_type": "none",
            "moe_router_pre_softmax": not model.norm_topk_prob,
            "moe_router_dtype": "fp32",
            "moe_permute_fusion": False,
            "expert_model_parallel_size": cut.ep,
            "expert_tensor_parallel_size": 1,
            "moe_shared_expert_intermediate_size": model.shared_intermediate_size or None,
            **_sigmoid_router(model),
        }
    with on_device(device):
        config = TransformerConfig(
            num_layers=model.num_hidden_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.intermediate_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_key_value_heads,
            kv_channels=model.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=model.rms_norm_eps,
            qk_layernorm=model.qk_norm,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=biases == "all",
            add_qkv_bias=biases == "qkv",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            persist_layer_norm=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            perform_initialization=False,
            use_cpu_initialization=device.type == "cpu",
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            pipeline_dtype=dtype,
            moe_token_dispatcher_type="alltoall",
            variable_seq_lengths=cut.pp > 1,
            calculate_per_token_loss=True,
            tensor_model_parallel_size=cut.tp,
            pipeline_model_parallel_size=cut.pp,
            context_parallel_size=cut.cp,
            **experts,
        )
    config.miles = Facts(model, contract, cut.layers == "aligned", recompute)
    return config


def _sigmoid_router(model: DecoderConfig) -> dict[str, Any]:
    """Settings of a router of corrected sigmoid scores.

    The rate of 0 keeps the correction as it is: what balances the load in pre-training is no part of a policy's update.
    """
    rule = model.sigmoid_rule
    if rule is None:
        return {}
    groups = {"moe_router_num_groups": rule.num_groups, "moe_router_group_topk": rule.kept_groups} if rule.num_groups > 1 else {}
    return groups | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": rule.scale,
    }


def layer_spec(model: DecoderConfig, layer: int, aligned: bool) -> Any:
    """The spec of one layer: megatron-core's local one with our attention and, when `aligned`, our ops everywhere."""
    moe = model.is_moe_layer(layer)
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts if moe else None, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    spec.module = PackedLayer
    sub = spec.submodules
    sub.self_attention.module = PackedSelfAttention
    inner = sub.self_attention.submodules
    inner.core_attention = PackedAttention
    norm = AlignedNorm if aligned else WrappedTorchNorm
    sub.input_layernorm = sub.pre_mlp_layernorm = norm
    if model.qk_norm:
        inner.q_layernorm = inner.k_layernorm = AlignedHeadNorm if aligned else norm
    if aligned:
        inner.linear_qkv, inner.linear_proj = AlignedColumn, AlignedOutput
        sub.mlp = replace_module(sub.mlp, AlignedMoE if moe else AlignedMLP)
        mlp = submodules_of(submodules_of(sub.mlp).experts) if moe else submodules_of(sub.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = AlignedColumn, AlignedOutput
        if moe and model.shared_intermediate_size:
            entry = submodules_of(sub.mlp)
            entry.shared_experts = replace_module(entry.shared_experts, AlignedSharedExpert)
            shared = submodules_of(entry.shared_experts)
            shared.linear_fc1, shared.linear_fc2 = AlignedColumn, AlignedOutput
    return spec


class MegatronModel:
    """This process' share of the model, with its Hugging Face view. Build it in every process; see `make_groups`.

    Example: model = MegatronModel(config, Cut(), contract, torch.device("cpu")); model.load_hf(tensors)
    """

    def __init__(
        self, config: DecoderConfig, cut: Cut, contract: Contract, device: torch.device, recompute: bool = False
    ) -> None:
        self.config, self.cut, self.contract, self.device = config, cut, contract, device
        self.aligned = cut.layers == "aligned"
        self.vocab_rows = padded_vocab(config, cut.vocab_multiple * cut.tp)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.first = parallel_state.is_pipeline_first_stage()
        self.last = parallel_state.is_pipeline_last_stage()
        self.settings = transformer_config(config, cut, contract, device, recompute)
        per_stage = config.num_hidden_layers // cut.pp
        self.first_layer = per_stage * parallel_state.get_pipeline_model_parallel_rank()
        layers = range(self.first_layer, self.first_layer + per_stage)
        norm = AlignedNorm if self.aligned else WrappedTorchNorm
        with on_device(device):
            self.module = PackedGPT(
                self.settings,
                TransformerBlockSubmodules(
                    layer_specs=[deepcopy(layer_spec(config, layer, self.aligned)) for layer in layers], layer_norm=norm
                ),
                vocab_size=self.vocab_rows,
                max_sequence_length=config.max_position_embeddings,
                pre_process=self.first,
                post_process=self.last,
                share_embeddings_and_output_weights=config.tie_word_embeddings,
                position_embedding_type="none",
            ).to(device=device, dtype=contract.torch_dtype)
        for name, bias in self._corrections():
            bias.data = torch.zeros(config.num_experts, dtype=torch.float32, device=device)
            assert self.module.get_buffer(name) is bias
        self._mark()
        longest = config.max_position_embeddings if device.type != "cpu" else INITIAL_POSITIONS
        self.rope = rope_table(config, device, longest)

    def _corrections(self) -> list[tuple[str, Tensor]]:
        """The routers' corrections: buffers, never cast and never trained."""
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name.endswith(EXPERT_BIAS)]

    def _mark(self) -> None:
        """How each parameter is cut, where megatron-core would note it while drawing first weights."""
        self.dims: dict[str, int | None] = {}
        for path, module in self.module.named_modules():
            for leaf, param in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}"
                self.dims[name] = _cut_dim(module, leaf)
                experts = ".experts." in name
                param.allreduce = not experts  # an optimizer of their own with ep = 1 too, so that checkpoints look alike
                param.sequence_parallel = False
                if experts:  # never copies of each other: with tp above 1 the optimizer cuts them over those processes, too
                    param.tensor_model_parallel = True
                else:
                    param.tensor_model_parallel = self.dims[name] is not None
                    param.partition_dim = -1 if self.dims[name] is None else self.dims[name]
                    param.partition_stride = 2 if "linear_fc1" in name else 1

    @property
    def stated_contract(self) -> Contract:
        """The contract of what is computed here: plain layers are megatron-core's, and say so."""
        if self.aligned:
            return self.contract
        theirs = OpContract("megatron-core", "torch", f"{VERSION}, local layers")
        return replace(self.contract, ops=dict.fromkeys(self.contract.ops, theirs))

    # ---- forward

    def hidden(self, module: nn.Module, work: Work) -> Tensor:
        """Hidden states [t, 1, h] of this stage; `module` is the model or what wraps it."""
        return module(input_ids=work.token_ids[None], position_ids=None, attention_mask=None, packed_seq_params=work.stream)

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: Tensor | float) -> LogprobOutput:
        """log p(target) and entropy [m] float32 for hidden states [m, h] of the last stage."""
        head = (
            self.module.shared_embedding_or_output_weight()
            if self.config.tie_word_embeddings
            else self.module.output_layer.weight
        )
        args = hidden, head, targets, temperature, self.config.vocab_size, self.tp_group
        return token_parallel_logprob(*args, self.contract.matmul) if self.aligned else vocab_parallel_logprob(*args)

    # ---- weights

    def named(self) -> dict[str, Tensor]:
        """Weights of this process under their names in the whole model; a tied head of the last stage is left out."""
        offset = dist.get_rank(parallel_state.get_expert_model_parallel_group()) * self.local_experts
        return {
            _global_name(name, self.first_layer, offset): param
            for name, param in (*self.module.named_parameters(), *self._corrections())
            if not self._is_tied_copy(name)
        }

    @property
    def local_experts(self) -> int:
        """Experts this process holds of each mixture."""
        return self.config.num_experts // self.cut.ep

    def _is_tied_copy(self, name: str) -> bool:
        return self.config.tie_word_embeddings and name == "output_layer.weight"

    def dim(self, part: Part) -> int | None:
        """Along which dim tensor parallelism cuts this part; the same in every process."""
        if self.cut.tp == 1 or "layernorm" in part.name or "router" in part.name or ".experts." in part.name:
            return None
        row = part.name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        if part.name.endswith(("linear_proj.bias", "linear_fc2.bias")):
            return 0 if self.aligned else None
        return 1 if row and not self.aligned else 0

    @torch.no_grad()
    def load_hf(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy this process' share of (HF name, whole tensor) pairs. Raises ValueError like `join_all`."""
        own = self.named()
        tp, rank = self.cut.tp, parallel_state.get_tensor_model_parallel_rank()
        for part, whole in join_all(self.config, self.vocab_rows, tensors):
            dim = self.dim(part)
            targets = [own[part.name]] if part.name in own else []
            if part.name.startswith("embedding") and self.last and not self.first and self.config.tie_word_embeddings:
                targets.append(self.module.output_layer.weight)
            for target in targets:
                share = whole if dim is None else part.shard(whole, dim, rank, tp)
                assert share.shape == target.shape, (part.name, share.shape, target.shape)
                target.copy_(share)

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[Part, Tensor]]:
        """(part, whole Megatron tensor) of every weight, one at a time, in every process. Collective: walk it to its end."""
        own = self.named()
        for part in parts(self.config, self.vocab_rows):
            held = own.get(part.name)
            yield part, self._collect(part, None if held is None else held.detach())

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, tensor) of every weight, one at a time, in every process. Collective: walk it to its end."""
        for part, tensor in self.whole():
            yield from part.split(tensor)

    def _collect(self, part: Part, held: Tensor | None) -> Tensor:
        """The whole tensor of a part, from the tensor, expert and pipeline parallel processes that hold it."""
        dim = self.dim(part)
        if held is not None and dim is not None:
            shares = [torch.empty_like(held) for _ in range(self.cut.tp)]
            dist.all_gather(shares, held.contiguous(), group=self.tp_group)
            held = part.unshard(shares, dim)
        if ".experts." in part.name and self.cut.ep > 1:
            expert = int(part.name.split("local_experts.")[1].split(".")[0])
            layer = int(part.name.split(".")[2])
            if 0 <= layer - self.first_layer < self.config.num_hidden_layers // self.cut.pp:
                group = parallel_state.get_expert_model_parallel_group()
                held = self._from(held, part, expert // self.local_experts, group)
        if self.cut.pp > 1:
            held = self._from(held, part, self._stage(part), parallel_state.get_pipeline_model_parallel_group())
        assert held is not None, part.name
        return held

    def _stage(self, part: Part) -> int:
        if part.name.startswith("embedding"):
            return 0
        if part.name.startswith("decoder.layers."):
            return int(part.name.split(".")[2]) // (self.config.num_hidden_layers // self.cut.pp)
        return self.cut.pp - 1

    def _from(self, held: Tensor | None, part: Part, owner: int, group: dist.ProcessGroup) -> Tensor:
        dtype = part.dtype(self.contract.torch_dtype)
        buffer = torch.empty(part.shape, dtype=dtype, device=self.device) if held is None else held.contiguous()
        dist.broadcast(buffer, dist.get_global_rank(group, owner), group=group)
        return buffer


def _cut_dim(module: nn.Module, leaf: str) -> int | None:
    """Along which dim megatron-core cuts a parameter of this module."""
    kind = {base.__name__ for base in type(module).__mro__}
    if kind & {"ColumnParallelLinear", "VocabParallelEmbedding"}:
        return 0
    if "RowParallelLinear" in kind:
        return 1 if leaf == "weight" else None
    return None


def _global_name(name: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name with the numbers of layer and expert in the whole model."""
    words = name.split(".")
    for key, first in (("layers", first_layer), ("local_experts", first_expert)):
        if key in words:
            at = words.index(key) + 1
            words[at] = str(int(words[at]) + first)
    return ".".join(words)
