"""Settings that were given and do nothing in this run, because of another one. Nothing is ignored in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from miles_core.config.base import Section
from miles_core.config.schema import RunConfig

Mode = Literal["train", "sft", "rollout"]


def idle_settings(config: RunConfig, mode: Mode) -> list[str]:
    """One line for every reason, naming the settings that differ from their default and have no effect in `mode`.

    A setting that would mislead is refused by the section it stands in; what is here is kept for another day by many files,
    such as the draft of a run without one.
    """
    given = _given(config)
    lines = []
    for names, why in _reasons(config, mode):
        idle = [key for key in given if key in names or any(name.endswith(".") and key.startswith(name) for name in names)]
        if idle:
            lines.append(f"no effect here: {', '.join(idle)} ({why})")
            given = [key for key in given if key not in idle]
    return lines


def _given(config: RunConfig) -> list[str]:
    """Dotted names of all settings that differ from their default."""
    found: list[str] = []

    def walk(section: Section, prefix: str) -> None:
        for name in section.model_dump(exclude_defaults=True):
            value = getattr(section, name)
            walk(value, f"{prefix}{name}.") if isinstance(value, Section) else found.append(prefix + name)

    walk(config, "")
    return found


def _reasons(config: RunConfig, mode: Mode) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names, or sections with their dot, and why nothing reads them. The first reason that holds is said."""
    algorithm, optimizer, memory, draft = config.algorithm, config.optimizer, config.memory, config.draft
    if mode == "sft":
        yield ("algorithm.",), "miles sft: the loss is the cross entropy, a mean over tokens"
        yield ("trainer.updates_per_step",), "miles sft makes one update a step; see sft.sequences_per_step"
        if config.eval.every is None:
            yield ("data.max_prompt_tokens",), "miles sft: the limit of an example is data.max_sequence_tokens"
    else:
        yield ("sft.", "data.max_sequence_tokens", "data.sft_turns", "data.eos_token_id"), "for miles sft only"
    if config.trainer.backend != "megatron":
        yield ("trainer.megatron.",), 'trainer.backend is "fsdp"'
    if config.model.dtype == "float32":
        yield ("trainer.master",), 'model.dtype is "float32": weights are their own masters'
    if algorithm.kl_coef == 0:
        yield ("algorithm.kl_kind",), "algorithm.kl_coef is 0"
    if algorithm.reduction != "constant":
        yield ("algorithm.constant_tokens",), f'algorithm.reduction is "{algorithm.reduction}"'
    if algorithm.advantage in ("mean", "leave_one_out", "none"):
        yield ("algorithm.advantage_eps",), f'algorithm.advantage is "{algorithm.advantage}", which divides by nothing'
    if algorithm.loss == "sft":
        yield ("algorithm.ratio_level", "algorithm.clip_low", "algorithm.clip_high"), 'algorithm.loss is "sft"'
    if optimizer.schedule == "constant":
        yield ("optimizer.total_steps", "optimizer.min_lr_ratio"), 'optimizer.schedule is "constant"'
    if config.eval.every is None:
        yield ("eval.",), "eval.every is unset: nothing is evaluated"
    if draft.model == "none":
        yield ("draft.",), 'draft.model is "none"'
        yield from _undrafted(config)
    else:
        yield ("engine.draft_tokens",), "draft.model is set: draft.num_draft says how many"
        yield ("engine.draft_adaptive",), "draft.model is set: draft.adaptive says whether"
    if config.rollout.producer == "single_turn":
        yield ("rollout.deadline_s",), "for a rollout.producer of your own"
    yield ("engine.record_routed_experts",), "no run asks for them"
    if mode == "sft" and config.eval.every is None:
        yield ("service.",), "miles sft samples nothing without eval.every"
    if mode == "rollout":
        yield ("service.directory", "service.numbers"), "miles rollout brings the service no weights"
    if config.service.url is None:
        yield ("service.",), "service.url is unset: the run has an engine of its own"
    else:
        kept = ("tensor_parallel", "max_context")  # of the numeric contract, and of the prompts' length
        own = tuple(f"engine.{name}" for name in type(config.engine).model_fields if name not in kept)
        yield own, "service.url is set: the service has its own settings"
    yield from _places(config)
    if not memory.sleep:
        yield ("memory.sleep_to",), "memory.sleep is false"
    if "disk" not in (memory.optimizer, memory.sleep_to):
        yield ("memory.directory",), 'neither memory.optimizer nor memory.sleep_to is "disk"'
    if config.num_trainers == 1:
        yield ("memory.release_groups",), "a trainer of one process has no groups"


def _undrafted(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if config.engine.draft == "none":
        names = ("draft_tokens", "draft_adaptive", "draft_tree", "draft_catch_up", "verification", "allow_lossy")
        yield tuple(f"engine.{name}" for name in names), 'engine.draft is "none"'


def _places(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What says how weights travel, and where nothing travels."""
    if not config.clustered:
        yield ("sync.bucket_bytes", "sync.deadline_s", "sync.full_every"), "engine and trainer share this process"
        yield ("cluster.deadline_s",), "there are no workers without cluster.num_trainers or num_engines"
    elif config.sync.kind != "disk":
        yield ("sync.full_every",), 'for sync.kind = "disk"'
    if config.clustered and config.sync.kind == "disk":
        yield ("sync.bucket_bytes",), 'sync.kind is "disk"'
