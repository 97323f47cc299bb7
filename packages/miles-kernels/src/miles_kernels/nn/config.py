"""What a decoder is: the shape of a Llama, Qwen2, Qwen3, Qwen3-MoE or GLM-4.5 model. `config_hf` reads and writes config.json.

No torch is needed here. Field names are those of config.json, so a reader of one can read the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles_kernels.routing import SigmoidRule

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe"]
RopeType = Literal["default", "linear", "llama3"]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
MOE_FAMILIES: tuple[Family, ...] = ("qwen3_moe", "glm4_moe")
ROPE_THETA = 10000.0
# Keys of rope_parameters (or rope_scaling) each type needs, beside rope_type, type and rope_theta.
ROPE_KEYS: dict[RopeType, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary parameters, as in transformers' `rope_parameters`; only types whose angles depend on nothing but the position.

    Example: RopeConfig(rope_theta=1e6)
    """

    rope_theta: float = ROPE_THETA
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    partial_rotary_factor: float = 1.0
    """Part of a head's elements, from the first on, that are rotated."""

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` table of config.json, with the keys its type knows."""
        keys = sorted(ROPE_KEYS[self.rope_type]) + ["partial_rotary_factor"] * (self.partial_rotary_factor != 1.0)
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
    """A bias on q, k, v, and for llama, qwen3 and qwen3_moe on the output projection too. A qwen2 model must have it."""
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
    first_k_dense_replace: int = 0
    """So many first layers are dense (glm4_moe)."""
    shared_intermediate_size: int = 0
    """Width of the expert that every token visits (glm4_moe): in config.json n_shared_experts * moe_intermediate_size."""
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = False
    """Whether a glm4_moe model normalises queries and keys; qwen3 and qwen3_moe always do."""
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
        elif not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            part = self.rope.partial_rotary_factor
            wrong.append(
                f"partial_rotary_factor={part} of head_dim={self.head_dim} must be an even number of elements, 2 or more"
            )
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
        wrong = []
        if self.family not in MOE_FAMILIES:
            if self.num_experts:
                wrong.append(f"num_experts={self.num_experts} exists only for {', '.join(MOE_FAMILIES)}, not {self.family}")
        else:
            wrong += [f"{name}={getattr(self, name)} must be at least 1" for name in MOE_POSITIVE if getattr(self, name) < 1]
            if self.num_experts_per_tok > self.num_experts:
                wrong.append(f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")
        if self.family != "glm4_moe":
            given = [name for name, plain in GLM_FIELDS.items() if getattr(self, name) != plain]
            return wrong + [f"{name}={getattr(self, name)} exists only for glm4_moe, not {self.family}" for name in given]
        if self.first_k_dense_replace < 0 or self.shared_intermediate_size < 0:
            wrong.append("first_k_dense_replace and shared_intermediate_size must not be negative")
        if self.num_experts > 0 and self.sigmoid_rule is not None:
            wrong += self.sigmoid_rule.wrong(self.num_experts, self.num_experts_per_tok)
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
        return self.use_qk_norm or self.family in ("qwen3", "qwen3_moe")

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.attention_bias and self.family not in ("qwen2", "glm4_moe")

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated, from the first on."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def sigmoid_rule(self) -> SigmoidRule | None:
        """How experts are chosen by corrected sigmoid scores; None: by a softmax over all of them."""
        if self.family != "glm4_moe":
            return None
        return SigmoidRule(num_groups=self.n_group, kept_groups=self.topk_group, scale=self.routed_scaling_factor)

    @property
    def rules(self) -> dict[str, str]:
        """Ops that this model computes by another rule than most, and the rule: what a numeric contract adds (`with_rules`)."""
        out = {}
        if self.rotary_dim < self.head_dim:
            out["rope"] = "rotate-half of the first part of a head;the rest as it is;angles float64;table float32;one rounding"
        if self.sigmoid_rule is not None:
            out["router"] = self.sigmoid_rule.words
        if self.shared_intermediate_size:
            out["shared_expert"] = "added to the rounded sum of the chosen experts;one rounding"
        return out

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        dense = layer < self.first_k_dense_replace or layer in self.mlp_only_layers
        return self.num_experts > 0 and not dense and (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        """Sliding window of this layer, None for full attention."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
        """Read a parsed config.json (transformers 4 or 5 spelling).

        Raises ValueError naming every unsupported field and what is supported; `where` names the file in the message.
        """
        from miles_kernels.nn.config_hf import read_fields

        fields = read_fields(data, where)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_hf(self, *, dtype: str = "float32") -> dict[str, Any]:
        """A config.json that transformers 4 and 5 read back to the same model."""
        from miles_kernels.nn.config_hf import write_fields

        return write_fields(self, dtype)


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_POSITIVE = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
MOE_POSITIVE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
GLM_FIELDS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "shared_intermediate_size": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
"""Fields of glm4_moe alone, and what they are elsewhere."""
