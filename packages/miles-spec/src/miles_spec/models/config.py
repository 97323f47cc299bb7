"""What a draft model is: its block's shape, how it joins embedding and hidden state, what it reads of the policy.

No torch is needed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles_kernels.nn.config import GLM_FIELDS, DecoderConfig

Layout = Literal["deepseek", "glm", "qwen3_next", "mimo"]
LAYOUTS: tuple[Layout, ...] = ("deepseek", "glm", "qwen3_next", "mimo")
_KEY = "miles_draft"


@dataclass(frozen=True, kw_only=True)
class MtpConfig:
    """Multi-token prediction layers behind a policy (DeepSeek-V3, 2412.19437, section 2.2).

    One layer is recycled at every depth; several are distinct, depth k being layer k's, and there are no further depths.

    Example: MtpConfig.of(policy_config, layout="mimo")
    """

    block: DecoderConfig
    """Shape of the layers; `num_hidden_layers` counts them. Sizes and vocabulary are the policy's."""
    trunk_layers: int
    """Layers of the policy, from which "deepseek" and "glm" number theirs on."""
    layout: Layout = "deepseek"
    """Names and order in checkpoints; the computation is the same in all."""

    kind = "mtp"

    def __post_init__(self) -> None:
        wrong = []
        if self.layout not in LAYOUTS:
            wrong.append(f"layout={self.layout!r} must be one of {', '.join(LAYOUTS)}")
        if self.trunk_layers < 1:
            wrong.append(f"trunk_layers={self.trunk_layers} must be at least 1")
        if self.layout == "qwen3_next" and self.block.num_hidden_layers > 1:
            wrong.append(f"layout 'qwen3_next' has one layer, not {self.block.num_hidden_layers}: its norms have no number")
        if wrong:
            raise ValueError("MTP config: " + "; ".join(wrong))

    @property
    def recycled(self) -> bool:
        """Whether depth k runs on the output of the same layer at depth k - 1."""
        return self.block.num_hidden_layers == 1

    @property
    def max_depth(self) -> int | None:
        """The deepest draft, None for any."""
        return None if self.recycled else self.block.num_hidden_layers

    @property
    def num_features(self) -> int:
        """Numbers it reads of the policy per token: the hidden state after the final norm."""
        return self.block.hidden_size

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Empty: it reads what the policy's head reads."""
        return ()

    @classmethod
    def of(cls, policy: DecoderConfig, *, num_layers: int = 1, layout: Layout | None = None) -> MtpConfig:
        """Layers shaped as the policy's last one; `layout` is by default that of the policy's family, else "deepseek"."""
        block = _like_last(policy, num_layers)
        return cls(block=block, trunk_layers=policy.num_hidden_layers, layout=layout or layout_of(policy.family))


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """An EAGLE-3 draft (2503.01840): one layer over three of the policy's, with a vocabulary of its own.

    Example: Eagle3Config.of(policy_config, draft_vocab_size=32000)
    """

    block: DecoderConfig
    """Shape of the one layer. Its vocabulary is the policy's, its hidden size too (the embedding is the policy's)."""
    feature_layers: tuple[int, int, int]
    """It reads the residual stream before these layers of the policy, 0-based; the number of layers means after the last."""
    draft_vocab_size: int

    kind = "eagle3"
    recycled = True
    max_depth = None

    def __post_init__(self) -> None:
        wrong = []
        if self.block.num_hidden_layers != 1:
            wrong.append(f"it has one layer, not {self.block.num_hidden_layers}")
        if len(self.feature_layers) != 3 or min(self.feature_layers) < 0:
            wrong.append(f"feature_layers={self.feature_layers} must be three layers, from 0")
        if not 1 <= self.draft_vocab_size <= self.block.vocab_size:
            wrong.append(f"draft_vocab_size={self.draft_vocab_size} must lie in 1..{self.block.vocab_size}, the policy's")
        if wrong:
            raise ValueError("EAGLE-3 config: " + "; ".join(wrong))

    @property
    def num_features(self) -> int:
        """Numbers it reads of the policy per token."""
        return 3 * self.block.hidden_size

    @classmethod
    def of(
        cls, policy: DecoderConfig, *, draft_vocab_size: int | None = None, feature_layers: tuple[int, int, int] | None = None
    ) -> Eagle3Config:
        """A layer shaped as the policy's last, dense.

        It reads by default the layers 2, half-way and third from the end; of a policy too shallow for three such, the last three.
        """
        layers = policy.num_hidden_layers
        default = (2, layers // 2, layers - 3) if layers >= 7 else (max(layers - 2, 0), max(layers - 1, 0), layers)
        block = _like_last(dense_twin(policy), 1)
        return cls(
            block=block,
            feature_layers=feature_layers or default,
            draft_vocab_size=draft_vocab_size or policy.vocab_size,
        )


DraftConfig = MtpConfig | Eagle3Config
_DENSE: dict[str, Any] = {"family": "qwen3", "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
_DENSE |= {"norm_topk_prob": False}


def dense_twin(policy: DecoderConfig) -> DecoderConfig:
    """The policy's config without experts: a plain Qwen3 block, which rotates whole heads. A dense one as it is."""
    if not policy.num_experts:
        return policy
    rope = dataclasses.replace(policy.rope, partial_rotary_factor=1.0)
    return dataclasses.replace(policy, **_DENSE | GLM_FIELDS, rope=rope, attention_bias=policy.output_bias)


def _like_last(policy: DecoderConfig, num_layers: int) -> DecoderConfig:
    """The policy's config for `num_layers` layers of the kind of its last one."""
    last = policy.num_hidden_layers - 1
    kinds: dict[str, Any] = {"num_hidden_layers": num_layers, "layer_types": policy.layer_types[-1:] * num_layers}
    if policy.num_experts:
        kinds |= {"decoder_sparse_step": 1, "mlp_only_layers": (), "first_k_dense_replace": 0}
        if not policy.is_moe_layer(last):
            by_number = {"first_k_dense_replace": num_layers}
            kinds |= by_number if policy.first_k_dense_replace else {"mlp_only_layers": tuple(range(num_layers))}
    return dataclasses.replace(policy, **kinds)


def to_json(config: DraftConfig) -> dict[str, Any]:
    """The config.json of a draft directory: the block as Hugging Face spells it, and what it lacks under "miles_draft"."""
    own: dict[str, Any] = {"kind": config.kind}
    if isinstance(config, MtpConfig):
        own |= {"trunk_layers": config.trunk_layers, "layout": config.layout}
        return config.block.to_hf() | {_KEY: own}
    own |= {"feature_layers": list(config.feature_layers)}
    names = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config.draft_vocab_size}
    return config.block.to_hf() | names | {_KEY: own}


def from_json(data: Mapping[str, Any], policy: DecoderConfig, *, where: str = "config.json") -> DraftConfig:
    """Read a draft's config.json, or that of a policy which carries its MTP layers, for `policy`.

    Raises ValueError naming `where` and what does not fit the policy.
    """
    own = dict(data.get(_KEY) or {})
    kind = own.get("kind") or ("eagle3" if "draft_vocab_size" in data else "mtp")
    config: DraftConfig
    try:
        if kind == "eagle3":
            block = DecoderConfig.from_hf({**data, "architectures": None}, where=where)
            layers = own.get("feature_layers") or (data.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
            chosen = tuple(layers) if layers else Eagle3Config.of(policy).feature_layers
            config = Eagle3Config(block=block, feature_layers=chosen, draft_vocab_size=int(data["draft_vocab_size"]))
        elif kind == "mtp":
            config = _mtp_from(data, own, policy, where)
        else:
            raise ValueError(f"miles_draft.kind={kind!r} must be 'mtp' or 'eagle3'")
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from None
    _check_policy(config, policy, where)
    return config


def _mtp_from(data: Mapping[str, Any], own: Mapping[str, Any], policy: DecoderConfig, where: str) -> MtpConfig:
    if own:
        block = DecoderConfig.from_hf(data, where=where)
        return MtpConfig(block=block, trunk_layers=int(own["trunk_layers"]), layout=own["layout"])
    layers = next((int(data[name]) for name in _COUNTS if data.get(name)), 0)
    if not layers:
        raise ValueError(f"it names no draft: none of miles_draft, draft_vocab_size, {', '.join(_COUNTS)} is set")
    model = str(data.get("model_type", ""))
    return MtpConfig.of(policy, num_layers=layers, layout=layout_of(model))


def count_field(layout: Layout) -> str:
    """The field of a policy's config.json that counts the MTP layers it carries."""
    return "mtp_num_hidden_layers" if layout == "qwen3_next" else "num_nextn_predict_layers"


def layout_of(model_type: str) -> Layout:
    """How the MTP layers of a model of that type are named; "deepseek" where its family has no names of its own."""
    return next((name for start, name in _BY_MODEL.items() if model_type.startswith(start)), "deepseek")


_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers")
_BY_MODEL: dict[str, Layout] = {"mimo": "mimo", "qwen3_next": "qwen3_next", "qwen3_5": "qwen3_next", "glm": "glm"}


def _check_policy(config: DraftConfig, policy: DecoderConfig, where: str) -> None:
    wrong = [
        f"{name} is {getattr(config.block, name)}, the policy's {getattr(policy, name)}"
        for name in ("vocab_size", "hidden_size")
        if getattr(config.block, name) != getattr(policy, name)
    ]
    if isinstance(config, MtpConfig) and config.trunk_layers != policy.num_hidden_layers:
        wrong.append(f"it was made for {config.trunk_layers} layers, the policy has {policy.num_hidden_layers}")
    if max(config.feature_layers, default=0) > policy.num_hidden_layers:
        wrong.append(f"it reads layers {config.feature_layers}, the policy has {policy.num_hidden_layers}")
    if wrong:
        raise ValueError(f"{where}: the draft does not fit the policy: " + "; ".join(wrong))
