"""config.json of every family into the fields of a `DecoderConfig`, and back. No torch is needed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from miles_kernels.nn.config import (
    ARCHITECTURES,
    GLM_FIELDS,
    MOE_POSITIVE,
    REQUIRED,
    ROPE_KEYS,
    ROPE_THETA,
    DecoderConfig,
    Family,
    RopeConfig,
    RopeType,
)

# Fields of ours that config.json spells otherwise or holds for some families only.
_OWN_FIELDS = {
    "family",
    "expert_ranks",
    "rope",
    "layer_types",
    "mlp_only_layers",
    "eos_token_ids",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    *GLM_FIELDS,
}
_DEFAULT_POSITIONS: dict[Family, int] = {"llama": 2048, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768, "glm4_moe": 131072}
_NO_WINDOW = ("llama", "glm4_moe")
_ROTARY_FACTOR: dict[Family, float] = {"glm4_moe": 0.5}
"""Families that rotate a part of each head, and the part where config.json does not say."""


_NUMBERS = (
    *REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "sliding_window",
    "max_window_layers",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "n_routed_experts",
    "first_k_dense_replace",
    "n_shared_experts",
    "n_group",
    "topk_group",
)
"""Keys of config.json whose values are numbers, where they are there."""


def read_fields(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a DecoderConfig that a parsed config.json states (transformers 4 or 5 spelling).

    Raises ValueError naming every unsupported field and what is supported; `where` names the file in the message.
    """
    family = _family(data, where)
    _refuse_unsupported(data, family, where)
    missing = [key for key in REQUIRED if data.get(key) is None]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    _check_numbers(data, where)
    heads = int(data["num_attention_heads"])
    layers = int(data["num_hidden_layers"])
    max_positions = int(data.get("max_position_embeddings") or _DEFAULT_POSITIONS[family])
    window, layer_types = _sliding(data, family, layers)
    head_dim = data.get("head_dim") or (
        128 if family == "qwen3" else int(data["hidden_size"]) // max(heads, 1)
    )  # 0 is refused by name
    return dict(
        family=family,
        vocab_size=int(data["vocab_size"]),
        hidden_size=int(data["hidden_size"]),
        intermediate_size=int(data["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=int(data.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        rms_norm_eps=float(data.get("rms_norm_eps", 1e-5 if family == "glm4_moe" else 1e-6)),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
        attention_bias=True if family == "qwen2" else bool(data.get("attention_bias", False)),
        mlp_bias=bool(data.get("mlp_bias", False)) if family == "llama" else False,
        rope=_rope_from_hf(data, family, max_positions, where),
        sliding_window=window,
        layer_types=layer_types,
        bos_token_id=data.get("bos_token_id"),
        eos_token_ids=_ids(data.get("eos_token_id")),
        pad_token_id=data.get("pad_token_id"),
        initializer_range=float(data.get("initializer_range", 0.02)),
        **_experts(data, family),
    )


def _check_numbers(data: Mapping[str, Any], where: str) -> None:
    wrong = [f"{key}={data[key]!r}" for key in _NUMBERS if isinstance(data.get(key), str | list | dict)]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} must be a number")


def write_fields(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The config.json of `config`, for weights of `dtype`."""
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    skipped = _OWN_FIELDS if config.family == "qwen3_moe" else {*_OWN_FIELDS, *MOE_POSITIVE, "norm_topk_prob"}
    out |= {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in skipped}
    out["eos_token_id"] = config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None
    out["rope_parameters"] = config.rope.to_hf()
    out["rope_theta"] = config.rope.rope_theta
    scaling = {key: value for key, value in config.rope.to_hf().items() if key != "rope_theta"}
    out["rope_scaling"] = scaling if config.rope.rope_type != "default" else None
    if config.family != "qwen2":
        out["attention_bias"] = config.attention_bias
    if config.family == "llama":
        out["mlp_bias"] = config.mlp_bias
    elif config.family not in _NO_WINDOW:
        out["use_sliding_window"] = "sliding_attention" in config.layer_types
        out["sliding_window"] = config.sliding_window if out["use_sliding_window"] else None
    if config.family in ("qwen2", "qwen3"):
        out["layer_types"] = list(config.layer_types) or ["full_attention"] * config.num_hidden_layers
    if config.family == "qwen3_moe":
        out["mlp_only_layers"] = list(config.mlp_only_layers)
    if config.family == "glm4_moe":
        out |= _glm_fields(config)
    return dict(sorted(out.items()))


def _experts(data: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields of a mixture of experts; those that only one family has as its transformers class sets them by default."""
    if family == "qwen3_moe":
        return {
            "num_experts": int(data.get("num_experts") or data.get("num_local_experts") or 128),
            "num_experts_per_tok": int(data.get("num_experts_per_tok", 8)),
            "moe_intermediate_size": int(data.get("moe_intermediate_size", 768)),
            "norm_topk_prob": bool(data.get("norm_topk_prob", False)),
            "decoder_sparse_step": int(data.get("decoder_sparse_step", 1)),
            "mlp_only_layers": tuple(data.get("mlp_only_layers") or ()),
        }
    if family != "glm4_moe":
        return {}
    inner = int(data.get("moe_intermediate_size", 1408))
    return {
        "num_experts": int(data.get("n_routed_experts") or data.get("num_local_experts") or 128),
        "num_experts_per_tok": int(data.get("num_experts_per_tok", 8)),
        "moe_intermediate_size": inner,
        "norm_topk_prob": bool(data.get("norm_topk_prob", True)),
        "first_k_dense_replace": int(data.get("first_k_dense_replace", 1)),
        "shared_intermediate_size": inner * int(data.get("n_shared_experts", 1)),
        "n_group": int(data.get("n_group") or 1),
        "topk_group": int(data.get("topk_group") or 1),
        "routed_scaling_factor": float(data.get("routed_scaling_factor", 1.0)),
        "use_qk_norm": bool(data.get("use_qk_norm", False)),
    }


def _glm_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a glm4_moe config.json has beside the common fields. Its weights are the policy's alone, hence no MTP layers."""
    shared, rest = divmod(config.shared_intermediate_size, config.moe_intermediate_size)
    if rest:
        raise ValueError(
            f"shared_intermediate_size={config.shared_intermediate_size} is no multiple of "
            f"moe_intermediate_size={config.moe_intermediate_size}: config.json cannot state it"
        )
    own = {name: getattr(config, name) for name in GLM_FIELDS if name != "shared_intermediate_size"}
    own |= {"n_routed_experts": config.num_experts, "n_shared_experts": shared, "num_nextn_predict_layers": 0}
    own |= {name: getattr(config, name) for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
    return own | {"partial_rotary_factor": config.rope.partial_rotary_factor}


def _family(data: Mapping[str, Any], where: str) -> Family:
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a JSON object, got {type(data).__name__}")
    model_type = data.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported: {supported}")
    family = cast(Family, model_type)
    named = data.get("architectures") or [ARCHITECTURES[family]]
    if ARCHITECTURES[family] not in named:
        raise ValueError(
            f"{where}: architectures {named} with model_type {family!r} is not supported; supported: {ARCHITECTURES[family]}"
        )
    return family


def _refuse_unsupported(data: Mapping[str, Any], family: Family, where: str) -> None:
    """Fields that would change the numbers and that the decoder does not compute."""
    wrong = []
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        wrong.append(f"hidden_act {data['hidden_act']!r} (supported: silu)")
    if data.get("attention_dropout"):
        wrong.append(f"attention_dropout {data['attention_dropout']} (supported: 0.0)")
    if data.get("quantization_config"):
        wrong.append("quantization_config (supported: unquantised float32 and bfloat16 weights)")
    if family not in _ROTARY_FACTOR and data.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        wrong.append(f"partial_rotary_factor {data['partial_rotary_factor']} (supported: 1.0)")
    if (data.get("pretraining_tp") or 1) != 1:
        wrong.append(f"pretraining_tp {data['pretraining_tp']} (supported: 1)")
    if family in _NO_WINDOW and data.get("sliding_window"):
        wrong.append(f"sliding_window {data['sliding_window']} in a {family} model (supported: null)")
    if family != "llama" and data.get("mlp_bias"):
        wrong.append(f"mlp_bias true in a {family} model (supported: false)")
    if wrong:
        raise ValueError(f"{where}: unsupported " + "; ".join(wrong))


def _sliding(data: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Window and per-layer types: switched on by use_sliding_window; qwen3_moe slides in every layer."""
    if family in _NO_WINDOW:
        return None, ()
    window = data.get("sliding_window", 4096) if data.get("use_sliding_window") else None
    if family == "qwen3_moe":
        return window, ("sliding_attention",) * layers if window is not None else ()
    types = data.get("layer_types")
    if types is None:
        first = int(data.get("max_window_layers", 28))
        types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    if all(kind == "full_attention" for kind in types) and len(types) == layers:
        return None, ()
    return window, tuple(types)


def _rope_from_hf(data: Mapping[str, Any], family: Family, max_positions: int, where: str) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4)."""
    table: dict[str, Any] = dict(data.get("rope_scaling") or {}) | dict(data.get("rope_parameters") or {})
    nested = [key for key, value in table.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"{where}: rope_parameters per layer type ({', '.join(nested)}) are not supported; use one table for all layers"
        )
    theta = table.pop("rope_theta", None) or data.get("rope_theta") or ROPE_THETA
    legacy = table.pop("type", None)
    kind = table.pop("rope_type", None) or legacy or "default"
    if kind not in ROPE_KEYS:
        raise ValueError(
            f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)} "
            "(types whose angles depend on the length of the batch could not give the same bits in every batch)"
        )
    factor = _rotary_factor(table.pop("partial_rotary_factor", None), data, family, where)
    required = ROPE_KEYS[cast(RopeType, kind)]
    if "original_max_position_embeddings" in required:
        table.setdefault("original_max_position_embeddings", data.get("original_max_position_embeddings") or max_positions)
    values = {key: value for key, value in table.items() if value is not None}
    missing, unknown = sorted(required - set(values)), sorted(set(values) - required)
    if missing or (unknown and kind != "default"):
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unsupported {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"{where}: rope_parameters of type {kind!r}: {'; '.join(parts)}")
    if kind == "default":
        values = {}
    return RopeConfig(rope_theta=float(theta), rope_type=cast(RopeType, kind), partial_rotary_factor=factor, **values)


def _rotary_factor(stated: float | None, data: Mapping[str, Any], family: Family, where: str) -> float:
    """Part of a head that is rotated: as rope_parameters state it, else config.json, else as the family has it."""
    if family not in _ROTARY_FACTOR:
        if stated not in (None, 1.0):
            raise ValueError(f"{where}: rope_parameters.partial_rotary_factor is not supported unless 1.0")
        return 1.0
    other = data.get("partial_rotary_factor")
    if stated is not None and other is not None and stated != other:
        raise ValueError(
            f"{where}: partial_rotary_factor is {other}, but rope_parameters.partial_rotary_factor {stated}; keep one"
        )
    return float(next((x for x in (stated, other) if x is not None), _ROTARY_FACTOR[family]))


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
