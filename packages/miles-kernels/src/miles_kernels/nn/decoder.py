"""The one forward pass: rollout engine and trainer call this class, so they compute the same bits.

Legend: T = packed tokens of all sequences, H = query heads, Hkv = key/value heads, D = head size, N = pool slots, V = vocabulary.

Tokens of many sequences are packed without padding. Where a token's keys and values live is the `KVStore`'s business: in
training the pool is the packed stream itself (`PackedKV`), in an engine it is a paged cache. The arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.ops import fp8
from miles_kernels.ops.act import swiglu
from miles_kernels.ops.attention import AttentionPlan, attention
from miles_kernels.ops.chain import main_of, part_of
from miles_kernels.ops.embedding import embedding
from miles_kernels.ops.linear import linear
from miles_kernels.ops.logprob import LogprobOutput, linear_logprob
from miles_kernels.ops.matmul import Mode
from miles_kernels.ops.moe import moe_mlp
from miles_kernels.ops.norm import add_rms_norm, rms_norm
from miles_kernels.ops.rope import INITIAL_POSITIONS, RopeTable, apply_rope, paired_order, take_columns
from miles_kernels.ops.router import router

CORRECTION = "gate.e_score_correction_bias"
"""How the name of a router's correction ends in a checkpoint."""


class KVStore(Protocol):
    """Where keys and values are kept, and which of them each query reads."""

    plan: AttentionPlan

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take this forward's keys and values [T, Hkv, D] of one layer; return the pools [Hkv, N, D] that `plan` indexes."""
        ...

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the kernels for CUDA write them themselves: pools [Hkv, N, D] and slots int64 [T]; None: they are the pools."""
        ...


class PackedKV:
    """Training: the pool is this forward's own keys and values, differentiable.

    Example: plan, positions = packed_plan([5, 3, 4], parents=[-1, 0, 0]); decoder(token_ids, positions, PackedKV(plan))
    """

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values themselves as pools."""
        return k.transpose(0, 1), v.transpose(0, 1)

    def target(self, layer: int) -> None:
        """Nowhere else."""
        return None


class DecoderLayer(nn.Module):
    """One transformer block with fused projections; `qkv_proj` rows are q, k, v and `gate_up_proj` rows are gate, up."""

    def __init__(self, config: DecoderConfig, index: int, mode: Mode, precision: str = "full") -> None:
        super().__init__()
        self.config, self.index, self.mode = config, index, mode
        self.quantized = fp8.Store() if precision == "fp8" else None
        self.row_parallel: Any = None
        """Makes the products whose sum runs over several ranks (`nn.parallel`)."""
        self.spread_experts: Any = None
        """Computes the experts when they are dealt to several ranks (`nn.parallel`); this block's begin with `first_expert`."""
        self.first_expert = 0
        self.scale = config.head_dim**-0.5
        self.window = config.window(index)
        self.is_moe = config.is_moe_layer(index)
        self.router_bias: Tensor | None
        self.register_buffer("router_bias", None)
        """Float32 [E], whatever the dtype of the weights: added to the experts' scores for the choice. No gradient trains it."""
        hidden, dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.input_norm = _parameter(hidden)
        self.qkv_proj = _parameter(q_size + 2 * kv_size, hidden)
        self.qkv_bias = _parameter(q_size + 2 * kv_size) if config.attention_bias else None
        self.qk_norm = _parameter(2 * dim) if config.qk_norm else None  # a vector, so that weight decay spares it
        kinds = torch.tensor([0] * config.num_attention_heads + [1] * config.num_key_value_heads)
        self.register_buffer("head_kinds", kinds, persistent=False)
        self._pair_heads()
        self.o_proj = _parameter(hidden, q_size)
        self.o_bias = _parameter(hidden) if config.output_bias else None
        self.post_norm = _parameter(hidden)
        if self.is_moe:
            experts, inner = config.num_experts // config.expert_ranks, config.moe_intermediate_size
            self.router = _parameter(config.num_experts, hidden)
            if config.sigmoid_rule is not None:
                self.router_bias = torch.zeros(config.num_experts)
            self.expert_gate_up_proj = _parameter(experts, 2 * inner, hidden)
            self.expert_down_proj = _parameter(experts, hidden, inner)
            if config.shared_intermediate_size:
                self.shared_gate_up_proj = _parameter(2 * config.shared_intermediate_size, hidden)
                self.shared_down_proj = _parameter(hidden, config.shared_intermediate_size)
        else:
            inner = config.intermediate_size
            self.gate_up_proj = _parameter(2 * inner, hidden)
            self.gate_up_bias = _parameter(2 * inner) if config.mlp_bias else None
            self.down_proj = _parameter(hidden, inner)
            self.down_bias = _parameter(hidden) if config.mlp_bias else None

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kv: KVStore,
        routed: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream and what the block before adds to it (None: nothing) -> the same for this block, [T, hidden] each."""
        eps = self.config.rms_norm_eps
        if delta is None:
            h = rms_norm(x, self.input_norm, eps)
        else:
            h, x = add_rms_norm(delta, x, self.input_norm, eps)
        h, x = add_rms_norm(self._attend(h, cos, sin, kv), x, self.post_norm, eps)
        return x, self._feed_forward(h, routed)

    def _pair_heads(self) -> None:
        """Tables that put the heads of a model that rotates a part of them into `paired_order`; None where all is rotated."""
        config = self.config
        self.column_order: Tensor | None
        self.column_home: Tensor | None
        self.pair_order: Tensor | None
        column_order = column_home = pair_order = None
        if config.rotary_dim < config.head_dim:
            pair_order = paired_order(config.head_dim, config.rotary_dim)
            turned, kept = config.num_attention_heads + config.num_key_value_heads, config.num_key_value_heads
            first = torch.arange(turned + kept)[:, None] * config.head_dim
            plain = torch.arange(config.head_dim).expand(kept, -1)
            column_order = (first + torch.cat((pair_order.expand(turned, -1), plain))).reshape(-1)
            column_home = torch.argsort(column_order)
        for name, table in (("column_order", column_order), ("column_home", column_home), ("pair_order", pair_order)):
            self.register_buffer(name, table, persistent=False)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values [T, (H + 2 Hkv) * D] of attention's input, heads in the order that the rotation pairs."""
        qkv = self._linear(x, "qkv_proj", self.qkv_bias)
        if self.column_order is None or self.column_home is None:
            return qkv
        return take_columns(qkv, self.column_order, self.column_home)

    def head_norm(self) -> Tensor | None:
        """Weights [2, D] of the norms of queries and keys, elements in the order of `_project`; None where there are none."""
        if self.qk_norm is None:
            return None
        whole = self.qk_norm.view(2, -1)
        main = main_of(self.qk_norm)
        if self.pair_order is not None:
            assert main is None, "a trainer refuses to chain the gradients of reordered norms"
            return whole.index_select(1, self.pair_order)
        return part_of(whole, self.qk_norm, None if main is None else main.view(2, -1))

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVStore) -> Tensor:
        config, mode = self.config, self.mode
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self._project(x)
        if qkv.is_cuda:
            out = self._attend_fused(qkv, cos, sin, kv)
            return self._linear(out.view(out.shape[0], -1), "o_proj", self.o_bias)
        qkv = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if self.qk_norm is not None:
            qk = self._norm_heads(qk, self.qk_norm)
        q, k = apply_rope(qk, cos, sin).split((heads, kv_heads), dim=1)
        k_pool, v_pool = kv.update(self.index, k, v)
        out = attention(q, k_pool, v_pool, kv.plan, scale=self.scale, window=self.window, mode=mode)
        return self._linear(out.reshape(out.shape[0], -1), "o_proj", self.o_bias)

    def _norm_heads(self, qk: Tensor, weight: Tensor) -> Tensor:
        """Queries and keys [T, H + Hkv, D], normed."""
        eps, main = self.config.rms_norm_eps, main_of(weight)
        if main is None or self.pair_order is not None:
            whole = self.head_norm()
            assert whole is not None
            return rms_norm(qk, whole.index_select(0, self.head_kinds), eps)
        sizes = (self.config.num_attention_heads, self.config.num_key_value_heads)
        parts = zip(qk.split(sizes, 1), weight.view(2, -1), main.view(2, -1), strict=True)
        return torch.cat([rms_norm(heads, part_of(row, weight, total), eps) for heads, row, total in parts], 1)

    def _attend_fused(self, qkv: Tensor, cos: Tensor, sin: Tensor, kv: KVStore) -> Tensor:
        """Head norms, rotation, the write to the cache and attention [T, H, D] on CUDA."""
        from miles_kernels.cuda.attention import KVBatch
        from miles_kernels.cuda.qkv import Heads, attention_of

        config, plan = self.config, kv.plan
        if not isinstance(plan, KVBatch):
            raise ValueError(f"attention on CUDA reads a KVBatch (KVBatch.packed or .paged), not {type(plan).__name__}")
        sizes = Heads(config.num_attention_heads, config.num_key_value_heads, self.scale, self.window, config.rms_norm_eps)
        return attention_of(qkv, self.head_norm(), cos, sin, plan, sizes, kv.target(self.index))

    def _apply(self, fn: Any, recurse: bool = True) -> DecoderLayer:
        """Move or cast the block; the router's bias is moved, never cast."""
        bias = self.router_bias
        super()._apply(fn, recurse)
        if bias is not None and self.router_bias is not None and self.router_bias.dtype is not bias.dtype:
            self.router_bias = bias.to(self.router_bias.device)
        return self

    def _feed_forward(self, x: Tensor, routed: dict[int, Tensor] | None) -> Tensor:
        if not self.is_moe:
            return self._linear(swiglu(self._linear(x, "gate_up_proj", self.gate_up_bias)), "down_proj", self.down_bias)
        config = self.config
        ids, weights = router(
            x, self.router, config.num_experts_per_tok, normalize=config.norm_topk_prob, mode=self.mode,
            rule=config.sigmoid_rule, correction=self.router_bias,
        )  # fmt: skip
        if routed is not None:
            routed[self.index] = ids
        out = self._visit_experts(x, ids, weights)
        if not config.shared_intermediate_size:
            return out
        inner = swiglu(self._linear(x, "shared_gate_up_proj", None))
        return out + self._linear(inner, "shared_down_proj", None)

    def _visit_experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the chosen experts `ids` [T, k] make of x [T, hidden], summed by `weights` [T, k]."""
        mode, first, second = self.mode, self.expert_gate_up_proj, self.expert_down_proj
        if self.spread_experts is not None:
            return self.spread_experts(x, first, second, ids, weights, mode)
        if self.quantized is None:
            return moe_mlp(x, first, second, ids, weights, mode=mode)
        kept = (self.quantized.of("expert_gate_up_proj", first), self.quantized.of("expert_down_proj", second))
        return fp8.moe_mlp(x, first, second, ids, weights, kept, mode=mode)

    def _linear(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        """The product with one of this block's weights, in the precision of the contract."""
        weight: Tensor = getattr(self, name)
        if self.row_parallel is not None and name in self.row_parallel.names:
            return self.row_parallel(x, weight)
        if self.quantized is None:
            return linear(x, weight, bias, mode=self.mode)
        return fp8.linear(x, weight, bias, self.quantized.of(name, weight), mode=self.mode)

    def quantized_weights(self) -> dict[str, Tensor]:
        """The weights whose products the FP8 contract makes in float8, by name."""
        of_all = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        names = (*of_all, "expert_gate_up_proj", "expert_down_proj", "shared_gate_up_proj", "shared_down_proj")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


class Decoder(nn.Module):
    """A Llama, Qwen2, Qwen3, Qwen3-MoE or GLM-4.5 language model over packed tokens.

    Parameters are left uninitialised: load or draw them (`nn.checkpoint`). Raises ValueError when `dtype` is not the
    contract's. With `gradient_checkpointing` set, layers are recomputed in the backward pass instead of kept.

    Example: hidden = decoder(token_ids, positions, kv); out = decoder.logprob(hidden[source_index], targets, 1.0)
    """

    def __init__(
        self,
        config: DecoderConfig,
        contract: Contract | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        name = str(dtype).removeprefix("torch.")
        self.config = config
        self.contract = (Contract.reference(dtype=name) if contract is None else contract).with_rules(config.rules)
        if self.contract.dtype != name:
            raise ValueError(
                f"decoder dtype {name}, but its contract says {self.contract.dtype}; use Contract.reference(dtype={name!r})"
            )
        self.gradient_checkpointing = False
        mode, precision = self.contract.matmul, self.contract.precision
        if precision == "fp8":
            _require_fp8(config)
        self.embed_tokens = _parameter(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, mode, precision) for i in range(config.num_hidden_layers))
        self.norm = _parameter(config.hidden_size)
        self.lm_head = None if config.tie_word_embeddings else _parameter(config.vocab_size, config.hidden_size)
        self.to(device=device, dtype=dtype)
        # a table on an accelerator is made whole: growing it on demand would mean waiting for the positions
        longest = config.max_position_embeddings if torch.device(device).type != "cpu" else INITIAL_POSITIONS
        self._rope = rope_table(config, device, longest)

    @property
    def head(self) -> Tensor:
        """Output projection [V, hidden]: its own, or the embedding when tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv: KVStore,
        *,
        routed: dict[int, Tensor] | None = None,
        taps: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] after the final norm, for int64 `token_ids` [T] at absolute `positions` [T].

        With `routed`, the expert ids [T, k] each token was sent to are stored under the layer's index. With `taps`, the residual
        stream [T, hidden] before every layer that is a key is stored there; the number of layers means after the last.
        """
        x, delta = embedding(token_ids, self.embed_tokens), None
        cos, sin = self._rope.rows(positions)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            if taps is not None and index in taps:
                taps[index] = x if delta is None else x + delta
            inputs = (x, delta, cos, sin, kv, routed)
            x, delta = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        if taps is not None and len(self.layers) in taps:
            taps[len(self.layers)] = x + delta
        return add_rms_norm(delta, x, self.norm, self.config.rms_norm_eps)[0]

    def rope_tables(self, last: int) -> tuple[Tensor, Tensor]:
        """`(cos, sin)` float32 [P, 1, D] by absolute position, with P > `last`; sin carries the sign of rotate-half."""
        return self._rope.tables(last)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [N, V] fp32 of the next token, for hidden states [N, hidden]."""
        return linear(hidden, self.head, mode=self.contract.matmul, out_dtype=torch.float32)

    def logprob(
        self, hidden: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, *, entropy: bool = True
    ) -> LogprobOutput:
        """log p(target) and entropy (None unless asked), [N] fp32, under softmax(logits / temperature); never holds [N, V]."""
        return linear_logprob(hidden, self.head, targets, temperature, entropy=entropy, mode=self.contract.matmul)

    def freeze_quantized(self) -> None:
        """For engines under the FP8 contract: quantise the weights now and use these copies until the next call.

        Call it after every change of the weights. Without it each forward quantises afresh. Nothing to do in full precision.
        """
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.quantized is not None:
                layer.quantized.freeze(layer.quantized_weights())

    def thaw_quantized(self) -> None:
        """Drop the copies that `freeze_quantized` made."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.quantized is not None:
                layer.quantized.thaw()

    def hf_state(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, view of the weight) of every tensor of a checkpoint; writing to a view writes to the decoder."""
        yield "model.embed_tokens.weight", self.embed_tokens.detach()
        for index, layer in enumerate(self.layers):
            for name, view in layer_state(layer):
                yield f"model.layers.{index}.{name}", view
        yield "model.norm.weight", self.norm.detach()
        if self.lm_head is not None:
            yield "lm_head.weight", self.lm_head.detach()

    @torch.no_grad()
    def load_hf_state(self, tensors: Iterable[tuple[str, Tensor]], strict: bool = True) -> None:
        """Copy (HF name, tensor) pairs into the decoder, casting to its dtype.

        Raises ValueError naming every missing (if `strict`), unexpected, repeated and misshaped tensor; the tensors that fit have
        been copied by then. A tied head stored twice is accepted when both copies are equal.
        """
        state = dict(self.hf_state())
        seen: set[str] = set()
        wrong: list[str] = []
        tied_copy: Tensor | None = None
        for name, tensor in tensors:
            if name.endswith("rotary_emb.inv_freq"):  # a constant that older checkpoints store
                continue
            if name in seen:
                wrong.append(f"repeated {name}")
            elif name == "lm_head.weight" and self.lm_head is None:
                tied_copy = tensor
            elif name not in state:
                wrong.append(f"unexpected {name}")
            elif tensor.shape != state[name].shape:
                wrong.append(f"misshaped {name}: {list(tensor.shape)} instead of {list(state[name].shape)}")
            else:
                state[name].copy_(tensor)
            seen.add(name)
        if tied_copy is not None and not torch.equal(tied_copy.to(self.head), self.head):
            wrong.append("unexpected lm_head.weight: it differs from the embedding although tie_word_embeddings is set")
        missing = [f"missing {name}" for name in state if name not in seen] if strict else []
        if wrong or missing:
            raise ValueError(f"weights do not fit the {self.config.family} decoder: " + "; ".join(missing + wrong))


def _require_fp8(config: DecoderConfig) -> None:
    """Raise ValueError for a shape whose products cannot be float8."""
    depths = {
        "hidden_size": config.hidden_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_intermediate_size": config.shared_intermediate_size,
    }
    wrong = [
        f"{name} = {size} is no multiple of {fp8.DEPTH_MULTIPLE}" for name, size in depths.items() if size % fp8.DEPTH_MULTIPLE
    ]
    widths = {"hidden_size": config.hidden_size, "2 * moe_intermediate_size": 2 * config.moe_intermediate_size}
    if config.num_experts:
        wrong += [f"{name} = {size} is no multiple of {fp8.BLOCK}" for name, size in widths.items() if size % fp8.BLOCK]
    if wrong:
        raise ValueError("precision fp8: " + "; ".join(wrong) + '; use precision "full"')


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def rope_table(config: DecoderConfig, device: str | torch.device, num_positions: int) -> RopeTable:
    """The rotation of a model's heads, as its blocks order them."""
    rope = config.rope
    return RopeTable(config.rotary_dim, rope.rope_theta, rope.to_hf(), device, num_positions, width=config.head_dim)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """In what a tensor of a checkpoint in `dtype` is stored and sent: the routers' correction is float32 always."""
    return torch.float32 if name.endswith(CORRECTION) else dtype


def layer_state(layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
    """One layer's tensors under their names in a checkpoint, as views of the fused parameters."""
    config = layer.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    names = ("q_proj", "k_proj", "v_proj")
    yield "input_layernorm.weight", layer.input_norm.detach()
    yield from _parts("self_attn", names, ".weight", layer.qkv_proj, sizes)
    yield from _parts("self_attn", names, ".bias", layer.qkv_bias, sizes)
    yield from _parts("self_attn", ("q_norm", "k_norm"), ".weight", layer.qk_norm, (dim, dim))
    yield from _parts("self_attn", ("o_proj",), ".weight", layer.o_proj, (config.hidden_size,))
    yield from _parts("self_attn", ("o_proj",), ".bias", layer.o_bias, (config.hidden_size,))
    yield "post_attention_layernorm.weight", layer.post_norm.detach()
    if layer.is_moe:
        yield "mlp.gate.weight", layer.router.detach()
        if layer.router_bias is not None:
            yield f"mlp.{CORRECTION}", layer.router_bias.detach()
        inner = config.moe_intermediate_size
        for expert in range(layer.expert_gate_up_proj.shape[0]):
            prefix = f"mlp.experts.{layer.first_expert + expert}"
            yield from _parts(prefix, ("gate_proj", "up_proj"), ".weight", layer.expert_gate_up_proj[expert], (inner, inner))
            yield f"{prefix}.down_proj.weight", layer.expert_down_proj[expert].detach()
        if config.shared_intermediate_size:
            shared, inner = "mlp.shared_experts", config.shared_intermediate_size
            yield from _parts(shared, ("gate_proj", "up_proj"), ".weight", layer.shared_gate_up_proj, (inner, inner))
            yield f"{shared}.down_proj.weight", layer.shared_down_proj.detach()
        return
    inner = config.intermediate_size
    yield from _parts("mlp", ("gate_proj", "up_proj"), ".weight", layer.gate_up_proj, (inner, inner))
    yield from _parts("mlp", ("gate_proj", "up_proj"), ".bias", layer.gate_up_bias, (inner, inner))
    yield from _parts("mlp", ("down_proj",), ".weight", layer.down_proj, (config.hidden_size,))
    yield from _parts("mlp", ("down_proj",), ".bias", layer.down_bias, (config.hidden_size,))


def _parts(
    prefix: str, names: Sequence[str], suffix: str, fused: Tensor | None, sizes: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The row blocks of a fused parameter, named; nothing when the model has no such parameter."""
    if fused is not None:
        for name, view in zip(names, fused.detach().split(list(sizes)), strict=True):
            yield f"{prefix}.{name}{suffix}", view
