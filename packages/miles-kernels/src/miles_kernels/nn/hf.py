"""`patch(model)`: a transformers model of the Llama, Qwen and GLM-4.5 families on aligned ops, in place and reversible.

Legend: B = batch, L, Lk = query and key columns (padding included), T = real tokens, H, Hkv = heads, D = head size.

Products, norms, attention, SwiGLU, embedding, router and experts are replaced, forward and backward; weights, caches,
generation and everything else stay transformers' own. A sequence then has the same logits bit for bit alone, in any padded
batch, and decoded with a cache. Gradients are deterministic. The arithmetic is that of `miles_kernels.ops` on the CPU and of
`miles_kernels.cuda` on a GPU; it differs from transformers' in one way: router weights stay float32.

Example:
    with patch(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")) as model:
        model.generate(...)
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe")
ATTENTION = "miles_aligned"


class Patched:
    """Undoes a patch: `undo()`, or leaving a `with` block. Entering the block gives the model."""

    def __init__(self, model: nn.Module, restore: list[Callable[[], None]], counts: dict[str, int]) -> None:
        self.model, self.counts = model, counts
        self._restore = restore

    def undo(self) -> None:
        """Put every replaced part back; a second call does nothing."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch(model: Any) -> Patched:
    """Replace the ops of a Llama, Qwen2, Qwen3, Qwen3-MoE or GLM-4.5 model from transformers; returns what undoes it.

    Raises ValueError for another model type, for attention dropout in training, an activation that is not silu, or a model that
    is patched already.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODEL_TYPES:
        raise ValueError(f"patch knows the model types {', '.join(MODEL_TYPES)}, got {kind!r}")
    if model.config._attn_implementation == ATTENTION:
        raise ValueError("the model is patched already; undo the first patch before another")
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(f"attention_dropout={model.config.attention_dropout}: aligned attention has no dropout; set it to 0")
    replacements: list[tuple[nn.Module, str, Callable[..., Any]]] = []
    for name, module in model.named_modules():
        found = _replacement(name, module)
        if found is not None:
            replacements.append((module, *found))
    _register_attention()
    restore: list[Callable[[], None]] = []
    counts: dict[str, int] = {}
    for module, label, forward in replacements:
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
        restore.append(lambda module=module: delattr(module, "forward"))  # type: ignore[misc]
        counts[label] = counts.get(label, 0) + 1
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    restore.append(lambda: setattr(model.config, "_attn_implementation", before))
    return Patched(model, restore, counts)


def _replacement(name: str, module: nn.Module) -> tuple[str, Callable[..., Any]] | None:
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return "linear", _linear
    if type(module) is nn.Embedding:
        return "embedding", _embedding
    if kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return "norm", _norm
    if kind.endswith("SparseMoeBlock"):
        return "moe", _moe
    if kind.endswith("MoE") and hasattr(getattr(module, "gate", None), "e_score_correction_bias"):
        return "moe", _moe_shared
    if kind.endswith("MLP") and hasattr(module, "gate_proj"):
        act = type(module.act_fn).__name__
        if "silu" not in act.lower():
            raise ValueError(f"{name}: activation {act}; patch knows silu")
        return "mlp", _mlp
    return None


def _linear(self: Any, x: Tensor) -> Tensor:
    out = _ops(x).linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def _embedding(self: Any, ids: Tensor) -> Tensor:
    out = _ops(self.weight).embedding(ids.reshape(-1), self.weight)
    return out.view(*ids.shape, out.shape[-1])


def _norm(self: Any, x: Tensor) -> Tensor:
    return _ops(x).rms_norm(x.contiguous(), self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_ops(x).swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), -1)))


def _moe(self: Any, x: Tensor) -> Tensor:
    ops, gate, experts = _ops(x), self.gate, self.experts
    flat = x.reshape(-1, x.shape[-1])
    ids, weights = ops.router(flat, gate.weight, gate.top_k, gate.norm_topk_prob)
    return ops.moe(flat, experts.gate_up_proj, experts.down_proj, ids, weights).view(x.shape)


def _moe_shared(self: Any, x: Tensor) -> Tensor:
    """Experts chosen by corrected sigmoid scores, and the one that every token visits."""
    from miles_kernels.ops.router import route_sigmoid
    from miles_kernels.routing import SigmoidRule

    ops, gate, experts = _ops(x), self.gate, self.experts
    flat = x.reshape(-1, x.shape[-1])
    rule = SigmoidRule(num_groups=gate.num_group, kept_groups=gate.topk_group, scale=gate.routed_scaling_factor)
    logits = ops.linear(flat, gate.weight, out_dtype=torch.float32)
    correction = gate.e_score_correction_bias.float()
    ids, weights = route_sigmoid(logits, gate.top_k, rule, correction, normalize=gate.norm_topk_prob)
    return ops.moe(flat, experts.gate_up_proj, experts.down_proj, ids, weights).view(x.shape) + self.shared_experts(x)


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, flash_attention_mask)  # the mask as [B, Lk], None when nothing is padded


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, L, D], key and value [B, Hkv, Lk, D] to [B, L, H, D].

    Padding, left or right, is cut away before anything is computed. Raises ValueError for dropout or a mask of another form.
    """
    batch, heads, length, dim = query.shape
    columns = key.shape[2]
    if dropout or (attention_mask is not None and attention_mask.shape != (batch, columns)):
        shape = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(f"aligned attention: dropout {dropout}, mask {shape}; needs no dropout and a mask [{batch}, {columns}]")
    scale = dim**-0.5 if scaling is None else scaling
    if attention_mask is None:
        keep = torch.ones(batch, columns, dtype=torch.bool, device=query.device)
    else:
        keep = attention_mask.bool()
    asked = keep[:, columns - length :]
    q_rows, k_rows = asked.reshape(-1).nonzero().flatten(), keep.reshape(-1).nonzero().flatten()
    q_lens, kv_lens = asked.sum(1).tolist(), keep.sum(1).tolist()
    q = query.transpose(1, 2).reshape(batch * length, heads, dim).index_select(0, q_rows)
    k, v = (x.transpose(1, 2).reshape(batch * columns, x.shape[1], -1).index_select(0, k_rows) for x in (key, value))
    out = _ops(query).attention(q, k, v, q_lens, kv_lens, scale, sliding_window)
    whole = out.new_zeros((batch * length, heads, out.shape[-1])).index_copy(0, q_rows, out)
    return whole.view(batch, length, heads, -1), None


class _CpuOps:
    """`miles_kernels.ops`, looked up late so that a process without a GPU never imports the rest."""

    def __init__(self) -> None:
        from miles_kernels.ops.act import swiglu
        from miles_kernels.ops.embedding import embedding
        from miles_kernels.ops.linear import linear
        from miles_kernels.ops.moe import moe_mlp
        from miles_kernels.ops.norm import rms_norm

        self.swiglu, self.embedding, self.linear, self.moe, self.rms_norm = swiglu, embedding, linear, moe_mlp, rms_norm

    def router(self, x: Tensor, weight: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
        from miles_kernels.ops.router import router

        return tuple(router(x, weight, top_k, normalize=normalize))  # type: ignore[return-value]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, q_lens: list[int], kv_lens: list[int], scale: float, window: int | None
    ) -> Tensor:
        from miles_kernels.ops.attention import Segment, attention, plan_attention

        segments, q_start, k_start = [], 0, 0
        for count, total in zip(q_lens, kv_lens, strict=True):
            if count:
                segments.append(Segment(q_start, count, total - count, torch.arange(k_start, k_start + total)))
            q_start, k_start = q_start + count, k_start + total
        plan = plan_attention(segments, num_tokens=q_start)
        return attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=scale, window=window)


class _CudaOps:
    """`miles_kernels.cuda`."""

    def __init__(self) -> None:
        from miles_kernels.cuda.act import swiglu
        from miles_kernels.cuda.embedding import embedding
        from miles_kernels.cuda.linear import linear
        from miles_kernels.cuda.moe import moe_mlp
        from miles_kernels.cuda.norm import rms_norm

        self.swiglu, self.embedding, self.linear, self.moe, self.rms_norm = swiglu, embedding, linear, moe_mlp, rms_norm

    def router(self, x: Tensor, weight: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
        from miles_kernels.cuda.router import route

        logits = self.linear(x, weight, out_dtype=torch.float32)
        return tuple(route(logits, top_k, normalize=normalize))  # type: ignore[return-value]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, q_lens: list[int], kv_lens: list[int], scale: float, window: int | None
    ) -> Tensor:
        from miles_kernels.cuda.attention import KVBatch
        from miles_kernels.cuda.attention_op import attention

        cu = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        total = torch.tensor(kv_lens, dtype=torch.int32)
        start = total.cumsum(0, dtype=torch.int32) - total
        cu, total, start = (x.to(q.device) for x in (cu, total, start))
        batch = KVBatch(cu, total, start, None, 0, max(q_lens), max(kv_lens))
        return attention(q, k, v, batch, scale=scale, window=window)


_cached: dict[str, Any] = {}


def _ops(x: Tensor) -> Any:
    kind = x.device.type
    if kind not in _cached:
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"aligned ops run on cpu and cuda, not on {kind}")
        _cached[kind] = _CpuOps() if kind == "cpu" else _CudaOps()
    return _cached[kind]
