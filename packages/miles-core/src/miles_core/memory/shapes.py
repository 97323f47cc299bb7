"""Published model shapes and devices by name, for plans that need neither weights nor a GPU.

Sizes are those of the models' own config.json; a device's bytes are what its driver offers programs, not the number on the box.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from miles_kernels.nn.config import DecoderConfig, Family, RopeConfig

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator. Example: Device(name="h200", memory_bytes=139 << 30, context_bytes=500 << 20)"""

    name: str
    memory_bytes: int
    context_bytes: int
    """What a process takes for the CUDA context and the kernels' code before its first tensor."""
    is_host: bool = False
    """Whether it is this machine's own memory, which costs nothing until it is touched."""


def _device(name: str, gib: float) -> Device:
    return Device(name=name, memory_bytes=int(gib * GIB), context_bytes=int(0.55 * GIB))


DEVICES = {
    device.name: device
    for device in (
        _device("a100-40", 39.4),
        _device("a100-80", 79.2),
        _device("l40s", 44.4),
        _device("h100", 79.1),
        _device("h200", 139.8),
        _device("b200", 178.3),
    )
}


def _dense(
    family: Family,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    tied: bool = False,
    dim: int = 128,
) -> DecoderConfig:
    return DecoderConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        tie_word_embeddings=tied,
        attention_bias=family == "qwen2",
        max_position_embeddings=40960,
    )


def _moe(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3_moe",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=8 * inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
        max_position_embeddings=40960,
    )


def _glm(hidden: int, inner: int, layers: int, experts: int, expert_inner: int, **own: Any) -> DecoderConfig:
    return DecoderConfig(
        family="glm4_moe",
        vocab_size=151552,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_inner,
        shared_intermediate_size=expert_inner,
        norm_topk_prob=True,
        attention_bias=True,
        rope=RopeConfig(rope_theta=1e6, partial_rotary_factor=0.5),
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        **own,
    )


SHAPES = {
    "llama-3.1-8b": _dense("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _dense("llama", 8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-0.5b": _dense("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True, dim=64),
    "qwen2.5-7b": _dense("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-0.6b": _dense("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True),
    "qwen3-1.7b": _dense("qwen3", 2048, 6144, 28, 16, 8, 151936, tied=True),
    "qwen3-4b": _dense("qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True),
    "qwen3-8b": _dense("qwen3", 4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _dense("qwen3", 5120, 17408, 40, 40, 8, 151936),
    "qwen3-32b": _dense("qwen3", 5120, 25600, 64, 64, 8, 151936),
    "qwen3-30b-a3b": _moe(2048, 768, 48, 32, 4),
    "qwen3-235b-a22b": _moe(4096, 1536, 94, 64, 4),
    "glm-4.5-air": _glm(4096, 10944, 46, 128, 1408, first_k_dense_replace=1),
    "glm-4.5": _glm(5120, 12288, 92, 160, 1536, first_k_dense_replace=3, use_qk_norm=True, routed_scaling_factor=2.5),
}


def find_shape(name: str) -> DecoderConfig:
    """A shape by name, in any case. Raises ValueError with the nearest names."""
    return SHAPES[_known(name, SHAPES, "model shape")]


def find_device(name: str) -> Device:
    """A device by name, in any case. Raises ValueError with the nearest names."""
    return DEVICES[_known(name, DEVICES, "GPU")]


def _known(name: str, table: Iterable[str], what: str) -> str:
    names = list(table)
    if name.lower() in names:
        return name.lower()
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    hint = f"near it: {', '.join(near)}; " if near else ""
    raise ValueError(f"{name!r} is no known {what}; {hint}known: {', '.join(names)}")
