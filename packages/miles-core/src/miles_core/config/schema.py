"""`RunConfig`: every room's section under its command-line name."""

from __future__ import annotations

from pydantic import model_validator

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.checkpoint import CheckpointConfig
from miles_core.config.base import Section
from miles_core.config.engine import EngineConfig
from miles_core.config.sections import ClusterConfig, ModelConfig, RunSection, SftConfig, SyncConfig
from miles_core.data.config import DataConfig
from miles_core.eval.config import EvalConfig
from miles_core.rollout.config import RewardConfig, RolloutConfig, SamplingConfig
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.layout import ProcessLayout, world_size_of


class RunConfig(Section):
    """One run, completely: what `config.toml` in the run directory holds."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    sync: SyncConfig = SyncConfig()
    cluster: ClusterConfig = ClusterConfig()
    sft: SftConfig = SftConfig()

    @model_validator(mode="after")
    def _rooms_agree(self) -> RunConfig:
        if self.eval.every is not None and not self.data.eval:
            raise ValueError("eval.every is set, but data.eval names no held-out prompts")
        if self.trainer.backend == "fsdp":
            ProcessLayout.of(self.trainer, self.num_trainers)
        return self

    @property
    def num_trainers(self) -> int:
        """Processes of the trainer: those of `[cluster]`, or those a launcher such as torchrun announces, or one."""
        return self.cluster.num_trainers or world_size_of()

    def with_name(self, name: str) -> RunConfig:
        """The same run under its final name."""
        return self.model_copy(update={"run": self.run.model_copy(update={"name": name})})
