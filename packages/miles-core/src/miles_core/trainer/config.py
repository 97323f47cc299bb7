"""The `[trainer]` and `[optimizer]` sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from miles_core.config.base import Section
from miles_core.trainer.megatron.config import MegatronConfig


class TrainerConfig(Section):
    """How a batch becomes optimizer updates. None of the sizes here changes the objective, only its cost."""

    backend: Literal["fsdp", "megatron"] = "fsdp"
    """Implementation of the trainer: "fsdp" is plain torch with FSDP2; one process runs the same code without cutting anything.
    "megatron" is megatron-core (extra `miles-core[megatron]`), with tensor and pipeline parallelism on top."""
    megatron: MegatronConfig = MegatronConfig()
    """Settings of the megatron backend; the other has no use for them, and a run says so."""
    shard: int | None = Field(default=None, ge=1)
    """Processes that weights, gradients and optimizer state are cut over, and sequences dealt to. None: all the others leave."""
    replicate: int = Field(default=1, ge=1)
    """Copies of that arrangement (hybrid sharding): weights are gathered within one, gradients summed over all of them."""
    cp: int = Field(default=1, ge=1)
    """Processes every sequence is cut over along its length (context parallelism). The log-probabilities keep their bits."""
    ep: int = Field(default=1, ge=1)
    """Processes the experts of a mixture-of-experts layer are spread over; a divisor of shard x cp. Keeps the bits as well."""
    master: Literal["float32", "stochastic"] = "float32"
    """What a bfloat16 model is updated in. "float32": a float32 copy of every weight. "stochastic": no copy, each updated
    weight is rounded to bfloat16 up or down by chance, with a noise that depends only on the weight's name, its place and the
    number of the update. Gradients are summed and moments kept in float32 either way; a float32 model ignores this."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates per rollout batch, which is cut into that many mini-batches at group boundaries. With more than
    one, the log-probabilities of the old policy are computed first, in a forward pass of their own."""
    max_tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Most tokens in one forward and backward pass; a prompt shared by a group counts once. Bounds the memory."""
    gradients: Literal["summed", "chained"] = "summed"
    """"chained": gradients whose bits do not depend on `max_tokens_per_microbatch`, as each micro-batch continues the sums of
    the one before; sequences are filled up to 16 tokens. Each fsdp process needs the whole model (`replicate`). "summed": each
    is added whole."""
    recompute: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, about a third more
    time, the same bits."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; a larger gradient is scaled down to it. 0 is off."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """What a NaN or infinite loss or gradient does: stop the run, or leave the weights as they are and count the update
    as skipped. The weights never take such an update."""

    @model_validator(mode="after")
    def _backend_knows_it(self) -> TrainerConfig:
        if self.backend == "megatron":
            self.require_megatron()
        return self

    def require_megatron(self) -> None:
        """Raise ValueError naming what the megatron backend would ignore."""
        plain = TrainerConfig.model_fields
        names = ("shard", "replicate", "master", "gradients")
        wrong = [f"trainer.{name} = {getattr(self, name)}" for name in names if getattr(self, name) != plain[name].default]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: only the fsdp backend knows this; megatron's sizes are in trainer.megatron")


class OptimizerConfig(Section):
    """AdamW and its learning rate schedule, which counts optimizer updates and nothing else."""

    name: Literal["adamw"] = "adamw"
    """Only AdamW (arXiv 1711.05101)."""
    lr: float = Field(default=1e-6, ge=0.0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled decay of matrices; vectors (norm weights, biases) do not decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the rate rises linearly to `lr`."""
    total_steps: int | None = Field(default=None, ge=1)
    """Update at which a falling schedule reaches its floor; None: the number of updates of the whole run."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Floor of a falling schedule, as a share of `lr`."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: both must lie in [0, 1)")
        return self
