"""`RunConfig`: every room's section under its command-line name."""

from __future__ import annotations

from pydantic import model_validator

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.checkpoint import CheckpointConfig
from miles_core.config.base import Section
from miles_core.config.engine import EngineConfig
from miles_core.config.sections import ClusterConfig, ModelConfig, RunSection, ServiceConfig, SftConfig, SyncConfig
from miles_core.data.config import DataConfig
from miles_core.draft.config import DraftConfig
from miles_core.eval.config import EvalConfig
from miles_core.memory.config import MemoryConfig
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
    draft: DraftConfig = DraftConfig()
    sync: SyncConfig = SyncConfig()
    memory: MemoryConfig = MemoryConfig()
    cluster: ClusterConfig = ClusterConfig()
    service: ServiceConfig = ServiceConfig()
    sft: SftConfig = SftConfig()

    @model_validator(mode="after")
    def _rooms_agree(self) -> RunConfig:
        if self.eval.every is not None and not self.data.eval and not self.eval.sets:
            raise ValueError("eval.every is set, but neither data.eval nor eval.sets names held-out prompts")
        if self.draft.model != "none":
            self._admit_draft()
        if self.engine.tensor_parallel > 1:
            self._check_tensor_parallel()
        if self.trainer.backend == "fsdp":
            ProcessLayout.of(self.trainer, self.num_trainers)
        else:
            self._check_megatron()
        self._check_sync()
        if self.service.url is not None:
            self._check_service()
        if self.clustered:
            self._check_processes()
        self._check_steps()
        return self

    def _check_steps(self) -> None:
        updates, groups = self.trainer.updates_per_step, self.rollout.prompts_per_step
        if updates > groups and self.rollout.producer == "single_turn":
            raise ValueError(
                f"trainer.updates_per_step = {updates}: a step is cut between groups, and rollout.prompts_per_step is {groups}"
            )
        best = self.checkpoint.keep_best
        if best is not None and best.startswith("eval/") and self.eval.every is None:
            raise ValueError(f'checkpoint.keep_best = "{best}", but nothing is evaluated: set eval.every')

    def _check_megatron(self) -> None:
        given = self.memory.model_dump(exclude_defaults=True)
        if given:
            names = ", ".join(f"memory.{name}" for name in given)
            raise ValueError(f'{names}: the fsdp backend alone can do this; leave it out, or use trainer.backend = "fsdp"')
        if self.model.precision != "full":
            raise ValueError('the megatron backend computes in full precision only; use trainer.backend = "fsdp" for fp8')

    def _check_service(self) -> None:
        if self.cluster.num_engines is not None:
            raise ValueError("service.url and cluster.num_engines: the rollouts come from one or the other; leave one out")
        if self.draft.model != "none":
            raise ValueError("draft.model trains a draft for engines of the run's own; with service.url the service has its own")
        if self.memory.sleep:
            raise ValueError("memory.sleep takes turns with an engine in this process, and service.url is another; leave one out")
        if self.sync.model_dump(exclude_defaults=True):
            raise ValueError("[sync] is for engines of the run's own; with service.url weights go by way of service.directory")

    def _check_processes(self) -> None:
        """What works on this process alone, where [cluster] gives the work to others."""
        if self.run.profile_steps:
            raise ValueError(
                "run.profile_steps records this process, and with [cluster] the work is done by others: leave [cluster] out, or "
                "profile a server by its /start_profile"
            )
        if self.memory.sleep:
            raise ValueError(
                "memory.sleep takes turns inside one process; with cluster.num_trainers or num_engines trainer and engine are "
                "processes of their own: leave those out, or give each its own device"
            )
        given = [name for name in ("trace_step", "reserve_bytes") if name in self.memory.model_dump(exclude_defaults=True)]
        if given:
            names = ", ".join(f"memory.{name}" for name in given)
            raise ValueError(
                f"{names}: for a trainer in this process, and with [cluster] it is another; leave one of the two out"
            )

    def _admit_draft(self) -> None:
        if self.engine.draft != "none":
            raise ValueError(f'draft.model = "{self.draft.model}" and engine.draft = "{self.engine.draft}": there is one draft')
        if self.trainer.backend != "fsdp":
            raise ValueError('draft.model needs trainer.backend = "fsdp": the other does not show the states a draft learns from')
        if self.engine.tensor_parallel > 1:
            raise ValueError("draft.model: an engine over several GPUs knows no drafts yet; leave engine.tensor_parallel at 1")
        if self.clustered and self.draft.compare:
            raise ValueError("draft.compare needs trainer and engines in one process: leave it out, or [cluster] as it is")
        if self.draft.compare and self.rollout.producer != "single_turn":
            raise ValueError(
                "draft.compare makes every rollout again from its prompt alone, which a rollout.producer of your own does not: "
                "leave one of the two out"
            )
        if self.num_trainers > 1 and self.draft.model == "eagle3":
            raise ValueError('draft.model = "eagle3" reads layers that a trainer of several processes does not show; use "mtp"')

    def _check_sync(self) -> None:
        kind, what = self.sync.kind, f'sync.kind = "{self.sync.kind}"'
        if not self.clustered and kind not in ("auto", "inprocess"):
            raise ValueError(f"{what} is for engines in processes of their own; leave it out, or set cluster.num_engines")
        if self.clustered and kind == "inprocess":
            raise ValueError(f"{what}, but [cluster] puts trainer and engine into processes of their own; use auto")
        if kind in ("cuda_ipc", "lent") and self.cluster.layout != "colocated":
            raise ValueError(f"{what} needs trainer and engines on one GPU: cluster.layout colocated; or use broadcast")
        if kind == "lent" and self.num_trainers > 1:
            raise ValueError(f"{what} lends the weights of a trainer of one process, and there are {self.num_trainers}; use auto")

    def _check_tensor_parallel(self) -> None:
        what = f"engine.tensor_parallel = {self.engine.tensor_parallel}"
        if self.trainer.backend != "fsdp":
            raise ValueError(f"{what}: the {self.trainer.backend} trainer does not fold its sums as several GPUs do; use fsdp")
        if self.model.precision != "full":
            raise ValueError(f"{what}: float8 products are quantised by whole rows; set model.precision to full")
        if self.cluster.layout == "colocated" and (self.cluster.num_engines or 1) > 1:
            raise ValueError(f"{what}: several engines share no GPUs with trainers one by one; use cluster.layout disaggregated")
        if self.cluster.kind == "ray":
            raise ValueError(f"{what}: an engine's processes share a machine, which Ray is not asked for; use cluster.kind local")

    @property
    def clustered(self) -> bool:
        """Whether the work is done by worker processes."""
        return self.cluster.is_used

    @property
    def num_trainers(self) -> int:
        """Processes of the trainer: those of `[cluster]`, or those a launcher announces to a script of one's own, or one."""
        return self.cluster.num_trainers or (1 if self.clustered else world_size_of())

    def require_equal_numbers(self) -> None:
        """Raise ValueError where a trainer is given other numbers than those of the engine it needs."""
        if self.trainer.backend == "megatron" and self.trainer.megatron.layers == "plain":
            raise ValueError(
                'trainer.megatron.layers = "plain" computes other numbers than the engine whose samples it trains on or that '
                'evaluates it; use "aligned" ("plain" is for miles sft without eval.every, and for --replay)'
            )

    def require_one_driver(self) -> None:
        """Raise ValueError where a launcher has started several of this process, each of which would be a whole run."""
        count = 1 if self.clustered else world_size_of()
        if count > 1:
            raise ValueError(
                f"WORLD_SIZE = {count} in the environment, as torchrun sets it, and a run starts its own processes: start it "
                f"once, without a launcher, with --cluster.num_trainers {count} (--cluster.kind ray over several machines)"
            )

    def with_name(self, name: str) -> RunConfig:
        """The same run under its final name."""
        return self.model_copy(update={"run": self.run.model_copy(update={"name": name})})
