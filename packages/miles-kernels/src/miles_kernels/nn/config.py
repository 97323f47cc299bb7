"""What a decoder is: the shape of a Llama, Qwen2, Qwen3 or Qwen3-MoE model, read from and written to Hugging Face's config.json.

No torch is needed here. Field names are those of config.json, so a reader of one can read the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
RopeType = Literal["default", "linear", "llama3"]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_ROPE_THETA = 10000.0
# Keys of rope_parameters (or rope_scaling) each type needs, beside rope_type, type and rope_theta.
_ROPE_KEYS: dict[RopeType, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary parameters, as in transformers' `rope_parameters`; only types whose angles depend on nothing but the position.

    Example: RopeConfig(rope_theta=1e6)
    """

    rope_theta: float = _ROPE_THETA
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` table of config.json, with the keys its type knows."""
        keys = sorted(_ROPE_KEYS[self.rope_type])
        return {"rope_type": self.rope_type, "rope_theta": self.rope_theta} | {key: getattr(self, key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of one decoder. Lengths in tokens, sizes in elements.

    Example: DecoderConfig(family="qwen3", vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """A bias on q, k, v, and on the output projection too except for qwen2 (where it must be True)."""
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    sliding_window: int | None = None
    """Each query sees this many last positions, itself included, in layers of type "sliding_attention"."""
    layer_types: tuple[str, ...] = ()
    """Per layer "full_attention" or "sliding_attention"; empty means full attention everywhere."""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    expert_ranks: int = 1
    """Processes a layer's experts are dealt to (`nn.parallel`); each holds `num_experts / expert_ranks`. Not of config.json."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        wrong = [f"{name}={getattr(self, name)} must be at least 1" for name in _POSITIVE if getattr(self, name) < 1]
        if self.family not in ARCHITECTURES:
            wrong.append(f"family={self.family!r} must be one of {', '.join(ARCHITECTURES)}")
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            wrong.append(
                f"num_attention_heads={self.num_attention_heads} is no multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            wrong.append(f"head_dim={self.head_dim} must be even (rotary embeddings turn pairs)")
        if self.family == "qwen2" and not self.attention_bias:
            wrong.append("attention_bias=False is not a qwen2 model; use family llama")
        if self.mlp_bias and self.family != "llama":
            wrong.append(f"mlp_bias=True exists only for llama, not {self.family}")
        wrong += self._wrong_moe() + self._wrong_window()
        beyond = [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]
        if beyond:
            wrong.append(f"eos_token_id {beyond} lies outside the vocabulary of {self.vocab_size}")
        if wrong:
            raise ValueError("decoder config: " + "; ".join(wrong))

    def _wrong_moe(self) -> list[str]:
        if self.family != "qwen3_moe":
            return [f"num_experts={self.num_experts} exists only for qwen3_moe, not {self.family}"] if self.num_experts else []
        wrong = [f"{name}={getattr(self, name)} must be at least 1" for name in _MOE_POSITIVE if getattr(self, name) < 1]
        if self.num_experts_per_tok > self.num_experts:
            wrong.append(f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")
        return wrong

    def _wrong_window(self) -> list[str]:
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            return [f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}"]
        unknown = sorted(set(self.layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            return [f"layer_types holds {unknown}; supported are full_attention and sliding_attention"]
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            return [f"sliding_window={self.sliding_window} must be at least 1 when layer_types has sliding_attention"]
        return []

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.family in ("qwen3", "qwen3_moe")

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias and self.family != "qwen2"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        """Sliding window of this layer, None for full attention."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
        """Read a parsed config.json (transformers 4 or 5 spelling).

        Raises ValueError naming every unsupported field and what is supported; `where` names the file in the message.
        """
        family = _family(data, where)
        _refuse_unsupported(data, family, where)
        missing = [key for key in _REQUIRED if data.get(key) is None]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        heads = int(data["num_attention_heads"])
        layers = int(data["num_hidden_layers"])
        max_positions = int(data.get("max_position_embeddings") or _DEFAULT_POSITIONS[family])
        window, layer_types = _sliding(data, family, layers)
        moe: dict[str, Any] = {}
        if family == "qwen3_moe":
            moe = {
                "num_experts": int(data.get("num_experts") or data.get("num_local_experts") or 128),
                "num_experts_per_tok": int(data.get("num_experts_per_tok", 8)),
                "moe_intermediate_size": int(data.get("moe_intermediate_size", 768)),
                "norm_topk_prob": bool(data.get("norm_topk_prob", False)),
                "decoder_sparse_step": int(data.get("decoder_sparse_step", 1)),
                "mlp_only_layers": tuple(data.get("mlp_only_layers") or ()),
            }
        head_dim = data.get("head_dim") or (128 if family == "qwen3" else int(data["hidden_size"]) // heads)
        try:
            return cls(
                family=family,
                vocab_size=int(data["vocab_size"]),
                hidden_size=int(data["hidden_size"]),
                intermediate_size=int(data["intermediate_size"]),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=int(data.get("num_key_value_heads") or heads),
                head_dim=int(head_dim),
                rms_norm_eps=float(data.get("rms_norm_eps", 1e-6)),
                max_position_embeddings=max_positions,
                tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
                attention_bias=True if family == "qwen2" else bool(data.get("attention_bias", False)),
                mlp_bias=bool(data.get("mlp_bias", False)) if family == "llama" else False,
                rope=_rope_from_hf(data, max_positions, where),
                sliding_window=window,
                layer_types=layer_types,
                bos_token_id=data.get("bos_token_id"),
                eos_token_ids=_ids(data.get("eos_token_id")),
                pad_token_id=data.get("pad_token_id"),
                initializer_range=float(data.get("initializer_range", 0.02)),
                **moe,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_hf(self, *, dtype: str = "float32") -> dict[str, Any]:
        """A config.json that transformers 4 and 5 read back to the same model."""
        out: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        skipped = _OWN_FIELDS if self.family == "qwen3_moe" else {*_OWN_FIELDS, *_MOE_POSITIVE, "norm_topk_prob"}
        out |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in skipped}
        out["eos_token_id"] = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        out["rope_parameters"] = self.rope.to_hf()
        out["rope_theta"] = self.rope.rope_theta
        scaling = {key: value for key, value in self.rope.to_hf().items() if key != "rope_theta"}
        out["rope_scaling"] = scaling if self.rope.rope_type != "default" else None
        if self.family != "qwen2":
            out["attention_bias"] = self.attention_bias
        if self.family == "llama":
            out["mlp_bias"] = self.mlp_bias
        else:
            out["use_sliding_window"] = "sliding_attention" in self.layer_types
            out["sliding_window"] = self.sliding_window if out["use_sliding_window"] else None
        if self.family in ("qwen2", "qwen3"):
            out["layer_types"] = list(self.layer_types) or ["full_attention"] * self.num_hidden_layers
        if self.family == "qwen3_moe":
            out["mlp_only_layers"] = list(self.mlp_only_layers)
        return dict(sorted(out.items()))


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_POSITIVE = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
_MOE_POSITIVE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
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
}
_DEFAULT_POSITIONS: dict[Family, int] = {"llama": 2048, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768}


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
    if data.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        wrong.append(f"partial_rotary_factor {data['partial_rotary_factor']} (supported: 1.0)")
    if (data.get("pretraining_tp") or 1) != 1:
        wrong.append(f"pretraining_tp {data['pretraining_tp']} (supported: 1)")
    if family == "llama" and data.get("sliding_window"):
        wrong.append(f"sliding_window {data['sliding_window']} in a llama model (supported: null)")
    if family != "llama" and data.get("mlp_bias"):
        wrong.append(f"mlp_bias true in a {family} model (supported: false)")
    if wrong:
        raise ValueError(f"{where}: unsupported " + "; ".join(wrong))


def _sliding(data: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Window and per-layer types: switched on by use_sliding_window; qwen3_moe slides in every layer."""
    if family == "llama":
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


def _rope_from_hf(data: Mapping[str, Any], max_positions: int, where: str) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4)."""
    table: dict[str, Any] = dict(data.get("rope_scaling") or {}) | dict(data.get("rope_parameters") or {})
    nested = [key for key, value in table.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"{where}: rope_parameters per layer type ({', '.join(nested)}) are not supported; use one table for all layers"
        )
    theta = table.pop("rope_theta", None) or data.get("rope_theta") or _ROPE_THETA
    legacy = table.pop("type", None)
    kind = table.pop("rope_type", None) or legacy or "default"
    if kind not in _ROPE_KEYS:
        raise ValueError(
            f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)} "
            "(types whose angles depend on the length of the batch could not give the same bits in every batch)"
        )
    if table.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"{where}: rope_parameters.partial_rotary_factor is not supported unless 1.0")
    required = _ROPE_KEYS[cast(RopeType, kind)]
    if "original_max_position_embeddings" in required:
        table.setdefault("original_max_position_embeddings", data.get("original_max_position_embeddings") or max_positions)
    values = {key: value for key, value in table.items() if value is not None}
    missing, unknown = sorted(required - set(values)), sorted(set(values) - required)
    if missing or (unknown and kind != "default"):
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unsupported {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"{where}: rope_parameters of type {kind!r}: {'; '.join(parts)}")
    if kind == "default":
        values = {}
    return RopeConfig(rope_theta=float(theta), rope_type=cast(RopeType, kind), **values)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
