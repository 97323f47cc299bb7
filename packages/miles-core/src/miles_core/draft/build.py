"""From `[draft]` to a draft, a trainer that has it beside it, and the arms it is compared with."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from miles_core.config.schema import RunConfig
from miles_core.draft.trainer import Arm, DraftingTrainer
from miles_core.models import model_dir
from miles_core.recipes.catalog import MODEL_PREFIX, packaged_model
from miles_core.trainer.base import Trainer
from miles_core.trainer.fsdp import FsdpTrainer
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_spec.models import DraftModel, Eagle3Draft, MtpConfig, MtpDraft
from miles_spec.train import UPSTREAM, DraftTrainConfig, DraftTrainer


def load_draft(config: RunConfig, policy: Decoder) -> DraftModel | None:
    """The draft a run starts from; None without one. Raises ValueError naming file and tensor when it does not fit the policy."""
    if config.draft.model == "none":
        return None
    if config.draft.path is None and config.draft.model == "eagle3":
        return Eagle3Draft.from_trunk(policy)
    from miles_spec.models.store import load_draft as load
    from miles_spec.models.store import policy_drafts

    folder = model_dir(config.model, lambda _: None) if config.draft.path is None else draft_dir(config.draft.path)
    if config.draft.path is None and (folder is None or policy_drafts(folder, policy.config) is None):
        return MtpDraft.from_trunk(policy, MtpConfig.of(policy.config))
    assert folder is not None
    weight = policy.embed_tokens
    draft = load(folder, policy.config, policy.contract, dtype=weight.dtype, device=weight.device)
    if draft.config.kind != config.draft.model:
        raise ValueError(f'draft.model = "{config.draft.model}", but {folder} holds a draft of kind {draft.config.kind}')
    return draft


def draft_dir(path: str) -> Path:
    """The folder behind `draft.path`; "recipe:NAME" is the draft that lies with that recipe's model."""
    if path.startswith(MODEL_PREFIX):
        return packaged_model(path).parent / "draft"
    return Path(path)


def with_draft(trainer: Trainer, config: RunConfig, draft: DraftModel) -> DraftingTrainer:
    """`trainer` with `draft`, and those it is compared with, beside it. Raises ValueError for a backend that shows no states."""
    if not isinstance(trainer, FsdpTrainer):
        raise ValueError(
            'draft.model needs trainer.backend = "fsdp": the other backend does not show the states a draft learns from'
        )
    section = config.draft
    own = section.training()
    arms = {"draft": _arm(draft, own, section.num_draft, train=section.train)}
    if "frozen" in section.compare:
        arms["frozen"] = _arm(deepcopy(draft), own, section.num_draft, train=False)
    if "upstream" in section.compare:
        upstream = replace(DraftTrainConfig(**UPSTREAM), lr=config.optimizer.lr)  # type: ignore[arg-type]
        arms["upstream"] = _arm(deepcopy(draft), upstream, section.num_draft, train=True)
    return DraftingTrainer(
        trainer,
        arms,
        seed=config.run.seed,
        alarm=section.alarm,
        measure_every=section.measure_every,
        max_new_tokens=config.sampling.max_new_tokens,
        greedy=config.sampling.temperature == 0,
    )


def _arm(draft: DraftModel, config: DraftTrainConfig, num_draft: int, *, train: bool) -> Arm:
    return Arm(trainer=DraftTrainer(draft, config, num_draft=num_draft), train=train)


def engine_settings(config: RunConfig, *, adaptive: bool | None = None) -> EmbeddedConfig:
    """`[engine]`, with the draft length and control of `[draft]` when there is a draft model."""
    import msgspec

    settings = config.engine.embedded()
    if config.draft.model == "none":
        return settings
    control = config.draft.adaptive if adaptive is None else adaptive
    return msgspec.structs.replace(settings, draft_tokens=config.draft.num_draft, draft_adaptive=control)
