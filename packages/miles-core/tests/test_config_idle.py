"""No setting is ignored in silence: contradictions are refused, what has no effect is said, and what may change on resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_core.algorithm.config import _UNREAD
from miles_core.algorithm.loss import LOSSES
from miles_core.config.idle import Mode, idle_settings
from miles_core.config.load import ConfigError, load_config
from miles_core.config.resume import changes_on_resume
from miles_core.config.schema import RunConfig
from miles_core.recipes.catalog import recipe_command, recipe_names

APART = ["--cluster.num_trainers", "1"]
MEGATRON = ["--trainer.backend", "megatron"]


def quickstart(*flags: str) -> RunConfig:
    return load_config("quickstart", flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--algorithm.loss", "cispo", "--algorithm.dual_clip", "3.0"], 'loss = "cispo" does not know dual_clip'),
        (["--algorithm.loss", "sft", "--algorithm.kl_coef", "0.1"], 'loss = "sft" does not know kl_coef'),
        (["--algorithm.loss_options.x", "3"], 'loss = "policy" does not know loss_options'),
        (["--cluster.layout", "disaggregated"], "nothing asks for processes"),
        (["--cluster.address", "auto"], "that of a Ray cluster"),
        (["--sync.directory", "there"], 'is for kind = "disk"'),
        (["--rollout.engine", "sglang"], "name its address as service.url"),
        (["--trainer.updates_per_step", "33"], "rollout.prompts_per_step is 32"),
        ([*MEGATRON, "--trainer.shard", "2"], "only the fsdp backend knows this"),
        ([*MEGATRON, "--memory.sleep", "true", "--memory.optimizer", "host"], "memory.optimizer, memory.sleep: the fsdp backend"),
        ([*MEGATRON, "--model.precision", "fp8"], "full precision only"),
        ([*APART, "--memory.sleep", "true"], "takes turns inside one process"),
        ([*APART, "--memory.trace_step", "3"], "memory.trace_step: for a trainer in this process"),
        ([*APART, "--memory.reserve_bytes", "measured"], "memory.reserve_bytes: for a trainer in this process"),
    ],
)
def test_what_contradicts_another_setting_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        quickstart(*flags)
    assert words in str(caught.value)


def test_the_best_of_what_is_never_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text('[model]\npath = "x"\n[checkpoint]\nkeep_best = "eval/accuracy"\n')
    with pytest.raises(ConfigError, match="nothing is evaluated: set eval.every"):
        load_config(str(tmp_path / "m.toml"))
    assert load_config(str(tmp_path / "m.toml"), ["--eval.every", "1", "--data.eval", "e"]).checkpoint.keep_best


def test_every_built_in_loss_says_what_it_leaves_unread() -> None:
    assert set(_UNREAD) == {"policy", "cispo", "sft"} <= set(LOSSES.names())
    own = quickstart("--algorithm.loss", "mine.py:loss", "--algorithm.loss_options.x", "3", "--algorithm.dual_clip", "2.0")
    assert own.algorithm.loss_options == {"x": 3}


def test_recipes_set_nothing_in_vain() -> None:
    for name in recipe_names():
        mode: Any = recipe_command(name)
        assert idle_settings(load_config(name), mode) == [], name


@pytest.mark.parametrize(
    ("mode", "flags", "named", "unless"),
    [
        ("sft", ["--algorithm.reduction", "sequence"], "algorithm.reduction", None),
        ("sft", ["--trainer.updates_per_step", "2"], "trainer.updates_per_step", None),
        ("train", ["--data.max_sequence_tokens", "9"], "data.max_sequence_tokens", None),
        ("train", ["--trainer.megatron.tp", "8"], "trainer.megatron.tp", MEGATRON),
        ("train", ["--trainer.master", "stochastic"], "trainer.master", ["--model.dtype", "bfloat16"]),
        ("train", ["--algorithm.kl_kind", "k2"], "algorithm.kl_kind", ["--algorithm.kl_coef", "0.1"]),
        ("train", ["--algorithm.constant_tokens", "8"], "algorithm.constant_tokens", ["--algorithm.reduction", "constant"]),
        ("train", ["--algorithm.advantage", "mean", "--algorithm.advantage_eps", "1"], "algorithm.advantage_eps",
         ["--algorithm.advantage", "mean_std"]),
        ("train", ["--optimizer.total_steps", "9"], "optimizer.total_steps", ["--optimizer.schedule", "cosine"]),
        ("train", ["--draft.lr", "1"], "draft.lr", ["--draft.model", "mtp"]),
        ("train", ["--engine.draft_tree", "[2]"], "engine.draft_tree", ["--engine.draft", "mtp"]),
        ("train", ["--draft.model", "mtp", "--engine.draft_tokens", "2"], "engine.draft_tokens", None),
        ("train", ["--rollout.deadline_s", "1"], "rollout.deadline_s", ["--rollout.producer", "mine.py:play"]),
        ("train", ["--sync.bucket_bytes", "8192"], "sync.bucket_bytes", APART),
        ("train", ["--sync.full_every", "2"], "sync.full_every", [*APART, "--sync.kind", "disk", "--sync.directory", "d"]),
        ("train", ["--memory.sleep_to", "disk", "--memory.directory", "d"], "memory.sleep_to", ["--memory.sleep", "true"]),
        ("train", ["--memory.directory", "d"], "memory.directory", ["--memory.optimizer", "disk"]),
        ("train", ["--memory.release_groups", "true"], "memory.release_groups", ["--cluster.num_trainers", "2"]),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(mode: Mode, flags: list[str], named: str, unless: list[str] | None) -> None:
    (line,) = idle_settings(quickstart(*flags), mode)
    assert line.startswith(f"no effect here: {named} (") and line.endswith(")")
    if unless is not None:
        assert not any(named in line for line in idle_settings(quickstart(*flags, *unless), mode))


def test_no_reference_policy_is_held_where_nothing_asks_for_one() -> None:
    from miles_core.compose import make_trainer
    from miles_core.models import load_model

    config = quickstart("--algorithm.kl_coef", "0.1")
    for mode, held in (("sft", False), ("train", True)):
        trainer: Any = make_trainer(config, mode, load_model(config, print).decoder)  # type: ignore[arg-type]
        assert (trainer.reference is not None) is held and trainer.memory.facts.plan.job.reference is held


def test_what_a_resumed_run_may_do_otherwise() -> None:
    old = quickstart()
    free = quickstart(
        *APART, "--trainer.recompute", "true", "--eval.every", "3", "--sync.deadline_s", "9", "--run.num_steps", "99"
    )
    assert changes_on_resume(old, free).refused == []
    assert changes_on_resume(old, free).noticed == ["cluster.num_trainers: None -> 1"]
    smaller = changes_on_resume(old, quickstart("--trainer.max_tokens_per_microbatch", "64"))
    assert smaller == ([], ["trainer.max_tokens_per_microbatch: 16384 -> 64"])
    for flags in (["--optimizer.lr", "1.0"], ["--engine.max_context", "64"], ["--engine.draft", "ngram", "--engine.verification",
                  "rejection"], ["--rollout.group_size", "4"], ["--memory.optimizer", "host", "--run.seed", "1"]):  # fmt: skip
        assert len(changes_on_resume(old, quickstart(*flags)).refused) == 1, flags
    falling = ["--optimizer.schedule", "cosine"]
    longer = changes_on_resume(quickstart(*falling), quickstart(*falling, "--run.num_steps", "99"))
    assert longer == ([], ["run.num_steps: 60 -> 99"])


@pytest.mark.parametrize(
    ("flags", "never"),
    [
        (MEGATRON, {"engine.tensor_parallel", "memory.optimizer", "memory.sleep", "trainer.master"}),
        (["--cluster.kind", "ray"], {"engine.tensor_parallel", "memory.sleep"}),
        (["--draft.model", "mtp"], {"engine.tensor_parallel"}),
        ([], set()),
    ],
)
def test_a_plan_advises_only_what_the_configuration_accepts(flags: list[str], never: set[str]) -> None:
    from miles_core.memory.jobs import job_of_run
    from miles_core.memory.knobs import knobs
    from miles_core.memory.shapes import find_device, find_shape

    config = quickstart("--model.dtype", "bfloat16", *flags)
    job = job_of_run(config, find_shape("qwen3-8b"), "train", find_device("a100-40"), 1)
    assert job.fixed == never
    for each in (job, replace(job, num_gpus=8)):
        advised = [knob for levels in knobs(each) for knob in levels]
        assert advised and not never & {knob.name for knob in advised}
        for knob in advised:
            quickstart("--model.dtype", "bfloat16", *flags, *knob.flag.split())


def test_layers_whose_numbers_no_engine_has_are_refused_before_anything_is_loaded() -> None:
    from miles_core.compose import Request, compose
    from miles_core.config.dryrun import explain

    plain = quickstart(*MEGATRON, "--trainer.megatron.layers", "plain", "--model.path", "nowhere")
    for refused in (lambda: explain(plain, "train"), lambda: compose(plain, Request(), print)):
        with pytest.raises(ValueError, match='layers = "plain" computes other numbers than the engine'):
            refused()
    with pytest.raises(ValueError, match="no model folder"):  # what comes next, where the trainer plays no part
        compose(plain, Request(mode="rollout"), print)
