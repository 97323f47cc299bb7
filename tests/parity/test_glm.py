"""A GLM-4.5 with its MTP layer, from one folder to both sides and back: losslessness, weight updates, checkpoints, drafts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.config.load import load_config
from miles_core.draft.build import load_draft
from miles_core.models import load_model
from miles_core.sync.inprocess import publish
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import load_decoder, random_decoder, write_model
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.engines.embedded.factory import load_engine
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, SamplingParams
from miles_spec.models import MtpDraft

TOKENIZER = CharTokenizer("abcdefghijklmnop0123456789+-=")
SHAPE = DecoderConfig(
    family="glm4_moe", vocab_size=TOKENIZER.vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=24, shared_intermediate_size=24, first_k_dense_replace=1, norm_topk_prob=True, n_group=4, topk_group=2,
    routed_scaling_factor=1.5, attention_bias=True, use_qk_norm=True, rope=RopeConfig(partial_rotary_factor=0.5),
)  # fmt: skip
SAMPLING = SamplingParams(n=2, max_new_tokens=40, ignore_eos=True)
REQUESTS = [GenerateRequest(request_id=str(i), input_ids=tuple(range(4, 8 + i)), sampling=SAMPLING) for i in range(6)]


def drawn(seed: int) -> Decoder:
    decoder = random_decoder(SHAPE, seed)
    for name, view in decoder.hf_state():
        if name.endswith(CORRECTION):
            view.copy_(torch.linspace(-0.2, 0.2, len(view)).roll(seed))
    return decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Policy and draft under the names and in the one folder of a published checkpoint."""
    policy = drawn(0)
    tensors = dict(policy.hf_state()) | dict(MtpDraft.from_trunk(policy).named_state())
    write_model(tmp_path / "glm", tensors, SHAPE.to_hf() | {"num_nextn_predict_layers": 1})
    TOKENIZER.save(tmp_path / "glm")
    return tmp_path / "glm"


async def completions(engine: EmbeddedEngine) -> tuple[list[object], dict[str, float]]:
    async with engine, asyncio.timeout(120):
        results = await asyncio.gather(*[engine.generate(request) for request in REQUESTS])
        return [done.completions for done in results], engine.metrics()


def test_drafts_from_the_policys_folder_change_no_token_and_no_logprob(folder: Path) -> None:
    settings = {"num_pages": 64, "max_running": 8, "prefill_chunk": 16}
    plain, _ = asyncio.run(completions(load_engine(folder, EmbeddedConfig(**settings))))
    config = EmbeddedConfig(**settings, draft="mtp", draft_tokens=3, draft_adaptive=False)
    drafted, metrics = asyncio.run(completions(load_engine(folder, config)))
    assert drafted == plain
    assert metrics["spec_num_verified"] > 0 and metrics["spec_accept_rate"] > 0
    assert plain != asyncio.run(completions(EmbeddedEngine(drawn(1), TOKENIZER, EmbeddedConfig(**settings))))[0]


def test_a_run_takes_the_policy_and_its_draft_from_one_folder_and_says_so(folder: Path) -> None:
    said: list[str] = []
    config = load_config("quickstart", ["--model.path", str(folder), "--draft.model", "mtp"])
    model = load_model(config, said.append)
    draft = load_draft(config, model.decoder)
    stored, policy = MtpDraft.from_trunk(drawn(0)), drawn(0)
    assert draft is not None and draft.config == stored.config
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(draft.named_state(), stored.named_state(), strict=True))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.decoder.hf_state(), policy.hf_state(), strict=True))
    assert said == [f"{folder}: 1 layer(s) for multi-token prediction behind the policy's 3: the draft starts from them"]
    said.clear()
    load_model(load_config("quickstart", ["--model.path", str(folder)]), said.append)
    assert "they are left out" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_is_never_trained_and_survives_updates_checkpoints_and_sync(folder: Path, dtype: torch.dtype) -> None:
    policy = load_decoder(folder, dtype=dtype)
    wanted = {name: view.clone() for name, view in policy.hf_state() if name.endswith(CORRECTION)}
    assert len(wanted) == 2 and all(view.dtype is torch.float32 and view.any() for view in wanted.values())
    trainer = FsdpTrainer(policy, AlgorithmConfig(), TrainerConfig(max_tokens_per_microbatch=90), OptimizerConfig(lr=0.01))
    before = {name: view.clone() for name, view in policy.hf_state()}
    samples = random_samples(0, num_groups=3, max_group=4, max_prompt=5, max_completion=9, vocab_size=SHAPE.vocab_size)
    trainer.step(TrainBatch.from_groups(samples, AlgorithmConfig()))
    after = dict(trainer.export_weights())
    assert all(torch.equal(after[name], view) for name, view in wanted.items())
    assert not torch.equal(after["model.layers.1.mlp.gate.weight"], before["model.layers.1.mlp.gate.weight"])

    trainer.save(folder.parent / "state")
    other = load_decoder(folder.parent / "state" / "model", dtype=dtype)
    resumed = FsdpTrainer(random_decoder(SHAPE, 5, dtype=dtype), AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=0.01))
    resumed.load(folder.parent / "state")
    for held in (dict(other.hf_state()), dict(resumed.export_weights())):
        assert held.keys() == after.keys() and all(torch.equal(held[name], tensor) for name, tensor in after.items())

    async def served() -> dict[str, torch.Tensor]:
        async with EmbeddedEngine(random_decoder(SHAPE, 7, dtype=dtype), TOKENIZER, EmbeddedConfig(num_pages=16)) as engine:
            await publish(trainer, engine, 1)
            return {name: tensor.clone() for name, tensor in engine.weights()}

    held = asyncio.run(served())
    assert all(torch.equal(held[name], tensor) and held[name].dtype is tensor.dtype for name, tensor in after.items())
