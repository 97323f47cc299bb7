"""What the suite trains: small models, random batches drawn from a seed, one update each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder
from miles_rollout.wire import Sample

_DENSE: dict[str, Any] = {
    "family": "qwen3",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
}
_MOE: dict[str, Any] = {
    "family": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
_GLM: dict[str, Any] = {
    "family": "glm4_moe",
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "attention_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "rope": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch, one model, one objective. Everything follows from the fields, so processes need only the JSON.

    The optimizer's eps is of the size of a gradient element: AdamW's first update is then a smooth function of the gradient,
    and a comparison of weights means something. Example: Case(name="mine", seed=7).batch()
    """

    name: str
    model: dict[str, Any] = field(default_factory=lambda: dict(_DENSE))
    """Fields of a DecoderConfig, "rope" being a table of those of a RopeConfig."""
    algorithm: dict[str, Any] = field(default_factory=dict)
    """Fields of an AlgorithmConfig."""
    optimizer: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1})
    kind: Literal["policy", "sft"] = "policy"
    seed: int = 0
    num_groups: int = 6
    max_group: int = 4
    max_prompt: int = 7
    max_completion: int = 9
    temperature: float = 0.8
    max_tokens_per_microbatch: int = 60
    """A few micro-batches, and not as many in every process."""
    grad_clip: float = 0.5
    recompute: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"

    def shape(self) -> DecoderConfig:
        """The model's shape."""
        return DecoderConfig(**{**self.model, "rope": RopeConfig(**self.model.get("rope", {}))})

    def decoder(self) -> Decoder:
        """The whole model with weights drawn from the seed, on the case's device."""
        from miles_kernels.contract import Contract

        contract = Contract.for_device(self.device, self.dtype)
        dtype = torch.float32 if self.dtype == "float32" else torch.bfloat16
        made = random_decoder(self.shape(), self.seed, contract=contract, dtype=dtype, device=self.device)
        for name, view in made.hf_state():
            if name.endswith(CORRECTION):  # zeros would leave a part of the router untested
                view.copy_(torch.linspace(-0.2, 0.2, len(view)).roll(self.seed))
        return made

    def samples(self) -> list[Sample]:
        """Scored samples in uneven groups, some of several turns; their records are made up."""
        return random_samples(
            self.seed,
            num_groups=self.num_groups,
            max_group=self.max_group,
            max_prompt=self.max_prompt,
            max_completion=self.max_completion,
            vocab_size=int(self.model["vocab_size"]),
            temperature=self.temperature,
        )

    def batch(self) -> TrainBatch:
        """The batch every process is given."""
        if self.kind == "sft":
            return TrainBatch.from_sft([SftExample(s.token_ids, s.loss_mask, f"row {s.sample_id}") for s in self.samples()])
        return TrainBatch.from_groups(self.samples(), self.algorithm_config())

    def algorithm_config(self) -> AlgorithmConfig:
        """The objective."""
        return AlgorithmConfig(**self.algorithm)

    def optimizer_config(self) -> OptimizerConfig:
        """AdamW's settings."""
        return OptimizerConfig(**self.optimizer)

    def trainer_config(self, **options: Any) -> TrainerConfig:
        """The sizes, with a backend's own `options` on top."""
        fields = {
            "max_tokens_per_microbatch": self.max_tokens_per_microbatch,
            "grad_clip": self.grad_clip,
            "recompute": self.recompute,
        }
        return TrainerConfig(**{**fields, **options})

    def to_json(self) -> bytes:
        """Inverse of `from_json`."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> Case:
        """Inverse of `to_json`; raises ValueError for unknown types."""
        return msgspec.json.decode(text, type=cls)

    def on(self, device: str, dtype: Literal["float32", "bfloat16"]) -> Case:
        """The same case elsewhere, under a name that says so; in bfloat16 with a step large enough to show in the weights."""
        optimizer = self.optimizer if dtype == "float32" else {**self.optimizer, "lr": 3.0, "weight_decay": 0.0}
        return replace(self, device=device, dtype=dtype, optimizer=optimizer, name=f"{self.name}-{dtype}")


@dataclass(frozen=True)
class Layout:
    """How many processes, and what the backend's factory is told about them."""

    name: str
    num_processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="dense",
            algorithm={"reduction": "sequence", "entropy_coef": 0.01, "mismatch_clip": 2.0, "clip_high": 0.28},
        ),
        Case(name="untied", model={**_DENSE, "family": "llama", "tie_word_embeddings": False}, seed=1, recompute=True),
        Case(name="moe", model={**_DENSE, **_MOE}, algorithm={"advantage": "mean"}, seed=2),
        Case(name="glm", model={**_DENSE, **_GLM}, algorithm={"advantage": "mean"}, seed=9),
        Case(name="sft", kind="sft", seed=3, temperature=1.0),
        Case(name="gspo", algorithm={"ratio_level": "sequence"}, seed=4, recompute=True),
        Case(
            name="long",
            seed=5,
            num_groups=2,
            max_group=2,
            max_prompt=40,
            max_completion=60,
            max_tokens_per_microbatch=130,
            algorithm={"advantage": "none", "reduction": "constant", "constant_tokens": 16},
        ),
        Case(
            name="wide",
            seed=7,
            model={**_DENSE, "hidden_size": 128, "intermediate_size": 256, "head_dim": 128, "vocab_size": 512},
            num_groups=4,
            max_prompt=150,
            max_completion=250,
            max_tokens_per_microbatch=1200,
        ),
        Case(
            name="wide-moe",
            seed=8,
            model={**_DENSE, **_MOE, "hidden_size": 128, "head_dim": 128, "vocab_size": 512, "moe_intermediate_size": 128},
            num_groups=4,
            max_prompt=60,
            max_completion=90,
            max_tokens_per_microbatch=500,
        ),
        Case(name="idle", seed=6, num_groups=1, max_group=1, max_tokens_per_microbatch=400, algorithm={"advantage": "none"}),
    )
}
"""By name: the objective's terms, an untied head with recomputed layers, experts, those of a GLM-4.5, imitation, sequence-level
ratios, long sequences for context parallelism, two models wide enough for a GPU (use them `on("cuda", "bfloat16")`), and
one sequence, so that all data-parallel processes but one have nothing to do."""
