"""Small random decoders made of a backend's ops: Llama, Qwen3, Qwen3-MoE, and multi-head latent attention as in DeepSeek and GLM.

Legend: T = packed tokens, H, Hkv = heads, D, DV = head sizes, R = latent rank, L = layers, N = pool slots.

Every op's result can be recorded, so that the first op that differs between two schedules can be named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_kernels.ops.rope import RopeTable
from miles_kernels.verify.backends import Backend, Step

FAMILIES = ("llama", "qwen3", "qwen3_moe", "mla")
_SHAPED = (*FAMILIES, "glm4_moe")
Record = Callable[[str, Tensor], None]
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of a verification decoder."""

    family: str
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    layers: int
    vocab: int
    experts: int = 8
    top_k: int = 2
    rank: int = 64
    rope_dim: int = 16
    dim_v: int = 32


def shape(family: str, *, large: bool) -> Shape:
    """A shape that exercises the real head sizes on a GPU, and one that a CPU finishes in seconds."""
    if family not in _SHAPED:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(_SHAPED)}")
    mla = family == "mla"
    if large:
        return Shape(family, 1024, 16, 16 if mla else 4, 192 if mla else 128, 2048, 4, 32000, 32, 4, 512, 64, 128)
    return Shape(family, 128, 4, 4 if mla else 2, 48 if mla else 32, 192, 2, 1000)


class Blocks:
    """Weights of one decoder on one device; `forward` runs it with any backend of that device."""

    def __init__(self, size: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        generator = torch.Generator().manual_seed(seed)

        def weight(*dims: int) -> Tensor:
            return (torch.randn(dims, generator=generator) * dims[-1] ** -0.5).to(device, dtype)

        def gain(*dims: int) -> Tensor:
            return (1 + 0.2 * torch.randn(dims, generator=generator)).to(device, dtype)

        s = size
        self.dim_v = s.dim_v if s.family == "mla" else s.dim
        self.embed, self.head, self.final = weight(s.vocab, s.hidden) * s.hidden**0.5, weight(s.vocab, s.hidden), gain(s.hidden)
        self.layers: list[dict[str, Tensor]] = []
        for _ in range(s.layers):
            layer = {"norm1": gain(s.hidden), "norm2": gain(s.hidden), "o": weight(s.hidden, s.heads * self.dim_v)}
            if s.family == "mla":
                layer["q"] = weight(s.heads * s.dim, s.hidden)
                layer["kv_down"] = weight(s.rank + s.rope_dim, s.hidden)
                layer["kv_norm"] = gain(s.rank)
                layer["kv_up"] = weight(s.heads * (s.dim - s.rope_dim + s.dim_v), s.rank)
            else:
                layer["qkv"] = weight((s.heads + 2 * s.kv_heads) * s.dim, s.hidden)
                layer["qk_norm"] = gain(s.heads + s.kv_heads, s.dim)
            if s.family == "qwen3_moe":
                layer["router"] = weight(s.experts, s.hidden)
                layer["gate_up"], layer["down"] = weight(s.experts, 2 * s.inner, s.hidden), weight(s.experts, s.hidden, s.inner)
            else:
                layer["gate_up"], layer["down"] = weight(2 * s.inner, s.hidden), weight(s.hidden, s.inner)
            self.layers.append(layer)
        self.rope = RopeTable(s.rope_dim if s.family == "mla" else s.dim, 10_000.0, device=device)

    def pools(self, slots: int) -> list[tuple[Tensor, Tensor]]:
        """Empty key and value pools [N, Hkv, D] and [N, Hkv, DV] per layer."""
        s = self.size
        return [
            (
                torch.zeros((slots, s.kv_heads, s.dim), dtype=self.dtype, device=self.device),
                torch.zeros((slots, s.kv_heads, self.dim_v), dtype=self.dtype, device=self.device),
            )
            for _ in range(s.layers)
        ]

    def forward(
        self, ops: Backend, tokens: Tensor, step: Step, pools: list[tuple[Tensor, Tensor]] | None, record: Record | None = None
    ) -> Tensor:
        """Hidden states [T, hidden] after the final norm. `pools` are written at the step's slots; None for packed training."""
        note = record or (lambda name, x: None)
        cos, sin = self.rope.rows(step.positions().to(self.device))
        x = ops.embedding(tokens, self.embed)
        note("embedding", x)
        for index, layer in enumerate(self.layers):

            def named(name: str, value: Tensor, index: int = index) -> Tensor:
                note(f"layer {index} {name}", value)
                return value

            h = named("input norm", ops.rms_norm(x, layer["norm1"], EPS))
            q, k, v = (self._latent if self.size.family == "mla" else self._grouped)(ops, h, layer, cos, sin, named)
            if pools is not None:
                slots = step.slots().to(self.device)
                k_pool, v_pool = pools[index]
                k_pool[slots], v_pool[slots] = k, v
                k, v = k_pool, v_pool
            out = named("attention", ops.attend(q, k, v, step, self.size.dim**-0.5, None))
            x = named("attention residual", x + named("o_proj", ops.linear(out.reshape(out.shape[0], -1), layer["o"])))
            h = named("post norm", ops.rms_norm(x, layer["norm2"], EPS))
            x = named("mlp residual", x + named("mlp", self._mlp(ops, h, layer, named)))
        out = ops.rms_norm(x, self.final, EPS)
        note("final norm", out)
        return out

    def _grouped(
        self, ops: Backend, h: Tensor, layer: dict[str, Tensor], cos: Tensor, sin: Tensor, named: Callable[[str, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        s = self.size
        qkv = named("qkv_proj", ops.linear(h, layer["qkv"])).view(-1, s.heads + 2 * s.kv_heads, s.dim)
        qk, v = qkv.split((s.heads + s.kv_heads, s.kv_heads), 1)
        if s.family.startswith("qwen3"):
            qk = named("q and k norm", ops.rms_norm(qk, layer["qk_norm"], EPS))
        q, k = named("rope", ops.rope(qk, cos, sin)).split((s.heads, s.kv_heads), 1)
        return q, k, v

    def _latent(
        self, ops: Backend, h: Tensor, layer: dict[str, Tensor], cos: Tensor, sin: Tensor, named: Callable[[str, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        s = self.size
        plain = s.dim - s.rope_dim
        q = named("q_proj", ops.linear(h, layer["q"])).view(-1, s.heads, s.dim)
        down = named("kv_down", ops.linear(h, layer["kv_down"]))
        latent = named("kv norm", ops.rms_norm(down[:, : s.rank], layer["kv_norm"], EPS))
        up = named("kv_up", ops.linear(latent, layer["kv_up"])).view(-1, s.heads, plain + s.dim_v)
        turned = ops.rope(torch.cat((q[:, :, plain:], down[:, None, s.rank :]), 1).contiguous(), cos, sin)
        named("rope", turned)
        q = torch.cat((q[:, :, :plain], turned[:, : s.heads]), 2)
        k = torch.cat((up[:, :, :plain], turned[:, s.heads :].expand(-1, s.heads, -1)), 2)
        return q, k, up[:, :, plain:].contiguous()

    def _mlp(self, ops: Backend, h: Tensor, layer: dict[str, Tensor], named: Callable[[str, Tensor], Tensor]) -> Tensor:
        if self.size.family != "qwen3_moe":
            gate_up = named("gate_up", ops.linear(h, layer["gate_up"]))
            return ops.linear(named("swiglu", ops.swiglu(gate_up)), layer["down"])
        logits = named("router logits", ops.linear(h, layer["router"], torch.float32))
        ids, weights = ops.route(logits, self.size.top_k)
        named("router choice", ids)
        return ops.moe(h, layer["gate_up"], layer["down"], ids, weights)
